"""Modules without weights to trace, and with weights to compare with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import accelerate
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tgate_export.checkpoints import Checkpoint
from tgate_export.families.base import Family, Scaling
from tgate_export.storage import sound


def fake_module(
    mode: FakeTensorMode, family: Family, checkpoint: Checkpoint, component: str, dtype: torch.dtype
) -> nn.Module:
    """A component whose parameters are fake: shapes and dtypes, no memory. Its buffers are real constants.

    Parameters and buffers of what is kept in float32 (T5's, which overflow in half precision) stay so.
    """
    return faked(mode, lambda: family.build(checkpoint, component), dtype)


def faked(mode: FakeTensorMode, build: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    """The module that ``build`` makes, as :func:`fake_module` has it."""
    with accelerate.init_empty_weights(include_buffers=False):
        module = build()
    kept = frozenset[str](getattr(module, "_keep_in_fp32_modules", None) or ())
    fakes: dict[int, nn.Parameter] = {}  # by the parameter replaced, so that what was shared stays shared
    with mode:
        for path, child in module.named_modules():
            for name, parameter in list(child._parameters.items()):
                if parameter is not None:
                    own = torch.float32 if kept.intersection((*path.split("."), name)) else dtype
                    if id(parameter) not in fakes:
                        fakes[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=own), False)
                    child._parameters[name] = fakes[id(parameter)]
    for path, child in module.named_modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and buffer.is_floating_point() and not kept.intersection((*path.split("."), name)):
                child._buffers[name] = buffer.to(dtype)
    return module


def real_module(
    family: Family, checkpoint: Checkpoint, component: str, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A component in ``dtype`` with the checkpoint's weights, for eager PyTorch. The caller owns it."""
    with accelerate.init_empty_weights(include_buffers=False):
        module = family.build(checkpoint, component)
    weights = {
        name: sound(checkpoint, component, name, tuple(parameter.shape)).to(dtype)
        for name, parameter in module.named_parameters()
    }
    _assign(module, weights)
    return module.eval().requires_grad_(False)


def _assign(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put ``weights`` in place of the parameters of those names, and of others that are the same parameter."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for child in module.modules():
        for leaf, parameter in list(child._parameters.items()):
            if parameter is not None:
                child._parameters[leaf] = nn.Parameter(weights[names[id(parameter)]], False)


class Decoder(nn.Module):
    """Final latents [1, ...] in the denoiser's scale, float32, to pixels, uint8: [1, H, W, 3], or [1, F, H, W, 3].

    Beside them it gives what they were rounded from, as the autoencoder decodes it: float32, [1, 3, H, W] or, for a
    video, [F, 3, H, W], from -1 to 1 where nothing is clipped. ``frames_axis``, ``together`` (its
    ``decodes_frames_together``): see :class:`~tgate_export.families.base.Family`.
    """

    def __init__(
        self,
        vae: nn.Module,
        scaling: Scaling,
        dtype: torch.dtype,
        frames_axis: int | None = None,
        *,
        together: bool = False,
    ) -> None:
        super().__init__()
        self.vae = vae
        self._scaling = scaling
        self._dtype = dtype
        self._frames_axis = frames_axis
        self._together = together
        self._temporal = "Temporal" in type(vae).__name__

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        frames = 1
        if self._frames_axis is not None and not self._together:
            frames = latents.shape[self._frames_axis]
            latents = latents.movedim(self._frames_axis, 1).flatten(0, 1)
        if self._frames_axis is None and self._together:
            latents = latents.unsqueeze(2)
        std, mean = self._statistics()
        if std is not None:
            latents = latents * self._by_channel(std, latents)
        latents = latents / self._scaling.scale
        if mean is not None:
            latents = latents + self._by_channel(mean, latents)
        decode = self.vae.decode
        assert callable(decode)
        further = {"num_frames": frames} if self._temporal else {}
        decoded: Tensor = decode(latents.to(self._dtype), return_dict=False, **further)[0].float()
        if self._together:
            decoded = decoded.squeeze(0).movedim(1, 0)
        pixels = (decoded / 2 + 0.5).clamp(0, 1)
        pictures = (pixels * 255).round().permute(0, 2, 3, 1).to(torch.uint8)
        return pictures if self._frames_axis is None else pictures.unsqueeze(0), decoded

    def _statistics(self) -> tuple[Tensor | None, Tensor | None]:
        """Deviation and mean by channel, [C] or [1] each; None for one that changes nothing."""
        if self._scaling.stored:
            return self.vae.get_parameter("latents_std"), self.vae.get_parameter("latents_mean")
        std, mean = self._scaling.std, self._scaling.mean
        return torch.tensor(std) if std != (1.0,) else None, torch.tensor(mean) if mean != (0.0,) else None

    @staticmethod
    def _by_channel(numbers: Tensor, latents: Tensor) -> Tensor:
        return numbers.view(1, -1, *[1] * (latents.dim() - 2))


class Encoder(nn.Module):
    """A picture, uint8 [1, H, W, 3], to the mean and the standard deviation of its latents in the denoiser's scale,
    both float32 [1, C, h, w]: a trajectory begins from a sample of them.

    It takes a mask as well, uint8 [1, H, W], if it is called with one: where that is not 0, the picture is the middle
    of all colours.
    """

    def __init__(self, vae: nn.Module, scaling: Scaling, dtype: torch.dtype) -> None:
        super().__init__()
        self.vae = vae
        self._scaling = scaling
        self._dtype = dtype

    def forward(self, picture: Tensor, *masks: Tensor) -> tuple[Tensor, Tensor]:
        pixels = picture.permute(0, 3, 1, 2).float() / 255 * 2 - 1
        for mask in masks:
            pixels = pixels * (mask == 0).float().unsqueeze(1)
        encode = self.vae.encode
        assert callable(encode)
        posterior: Any = encode(pixels.to(self._dtype)).latent_dist
        mean, deviation = posterior.mean.float(), posterior.std.float()
        if self._scaling.mean != (0.0,):
            mean = mean - torch.tensor(self._scaling.mean).view(1, -1, 1, 1)
        mean, deviation = mean * self._scaling.scale, deviation * self._scaling.scale
        if self._scaling.std != (1.0,):
            std = torch.tensor(self._scaling.std).view(1, -1, 1, 1)
            mean, deviation = mean / std, deviation / std
        return mean, deviation
