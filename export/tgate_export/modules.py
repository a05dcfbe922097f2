"""Modules without weights to trace, and with weights to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import accelerate
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tgate_export.checkpoints import Checkpoint
from tgate_export.families.base import Family


def fake_module(
    mode: FakeTensorMode, family: Family, checkpoint: Checkpoint, component: str, dtype: torch.dtype
) -> nn.Module:
    """A component whose parameters are fake: shapes and dtypes, no memory. Its buffers are real constants.

    Parameters that the module's authors keep in float32 (T5's, which overflow in half precision) stay so.
    """
    with accelerate.init_empty_weights(include_buffers=False):
        module = family.build(checkpoint, component)
    kept: Sequence[str] = getattr(module, "_keep_in_fp32_modules", None) or ()
    fakes: dict[int, nn.Parameter] = {}  # by the parameter replaced, so that what was shared stays shared
    with mode:
        for path, child in module.named_modules():
            own = torch.float32 if any(part in kept for part in path.split(".")) else dtype
            for name, parameter in list(child._parameters.items()):
                if parameter is not None:
                    if id(parameter) not in fakes:
                        fakes[id(parameter)] = nn.Parameter(torch.empty(parameter.shape, dtype=own), False)
                    child._parameters[name] = fakes[id(parameter)]
    for child in module.modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                child._buffers[name] = buffer.to(dtype)
    return module


def real_module(
    family: Family, checkpoint: Checkpoint, component: str, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A component in ``dtype`` with the checkpoint's weights, for eager PyTorch. The caller owns it."""
    with accelerate.init_empty_weights(include_buffers=False):
        module = family.build(checkpoint, component)
    tensors = checkpoint.tensors(component)
    weights = {name: tensors.read(name).to(dtype) for name, _ in module.named_parameters()}
    for name, parameter in module.named_parameters():
        if weights[name].shape != parameter.shape:  # 1x1 convolutions that today's modules hold as linear layers
            weights[name] = weights[name].reshape(parameter.shape)
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

    ``frames_axis``: see :class:`~tgate_export.families.base.Family`.
    """

    def __init__(
        self, vae: nn.Module, config: Mapping[str, object], dtype: torch.dtype, frames_axis: int | None = None
    ) -> None:
        super().__init__()
        self.vae = vae
        self._dtype = dtype
        self._frames_axis = frames_axis
        self._temporal = "Temporal" in type(vae).__name__
        self._scale = float(str(config["scaling_factor"]))
        self._shift = float(str(config.get("shift_factor") or 0.0))
        self._mean, self._std = _row(config.get("latents_mean")), _row(config.get("latents_std"))

    def forward(self, latents: Tensor) -> Tensor:
        frames = 1
        if self._frames_axis is not None:
            frames = latents.shape[self._frames_axis]
            latents = latents.movedim(self._frames_axis, 1).flatten(0, 1)
        if self._mean and self._std:
            mean, std = (torch.tensor(row).view(1, -1, 1, 1) for row in (self._mean, self._std))
            latents = latents * std / self._scale + mean
        else:
            latents = latents / self._scale + self._shift
        decode = self.vae.decode
        assert callable(decode)
        further = {"num_frames": frames} if self._temporal else {}
        image: Tensor = decode(latents.to(self._dtype), return_dict=False, **further)[0]
        pixels = (image.float() / 2 + 0.5).clamp(0, 1)
        pictures = (pixels * 255).round().permute(0, 2, 3, 1).to(torch.uint8)
        return pictures if self._frames_axis is None else pictures.unsqueeze(0)


def _row(values: object) -> list[float]:
    return [float(v) for v in values] if isinstance(values, Sequence) and not isinstance(values, str) else []
