"""Modules without weights to trace, and with weights to compare with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import accelerate
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tgate_export.checkpoint import Checkpoint
from tgate_export.families.base import Family


def fake_module(
    mode: FakeTensorMode, family: Family, checkpoint: Checkpoint, component: str, dtype: torch.dtype
) -> nn.Module:
    """A component whose parameters are fake: shapes and dtypes, no memory. Its buffers are real constants."""
    with accelerate.init_empty_weights(include_buffers=False):
        module = family.build(checkpoint, component)
    with mode:
        for child in module.modules():
            for name, parameter in list(child._parameters.items()):
                if parameter is not None:
                    child._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=dtype), False)
    for child in module.modules():
        for name, buffer in child._buffers.items():
            if buffer is not None and buffer.is_floating_point():
                child._buffers[name] = buffer.to(dtype)
    return module


def real_module(family: Family, checkpoint: Checkpoint, component: str) -> nn.Module:
    """A component in float32 with the checkpoint's weights, for eager PyTorch. The caller owns it."""
    with accelerate.init_empty_weights(include_buffers=False):
        module = family.build(checkpoint, component)
    tensors = checkpoint.tensors(component)
    weights = {name: tensors.read(name).float() for name, _ in module.named_parameters()}
    for name, parameter in module.named_parameters():
        if weights[name].shape != parameter.shape:  # 1x1 convolutions that today's modules hold as linear layers
            weights[name] = weights[name].reshape(parameter.shape)
    module.load_state_dict(weights, strict=False, assign=True)
    return module.eval().requires_grad_(False)


class Decoder(nn.Module):
    """Latents [B, C, h, w] in the denoiser's scale, float32, to pixels [B, H, W, 3], uint8."""

    def __init__(self, vae: nn.Module, config: Mapping[str, object], dtype: torch.dtype) -> None:
        super().__init__()
        self.vae = vae
        self._dtype = dtype
        self._scale = float(str(config["scaling_factor"]))
        self._shift = float(str(config.get("shift_factor") or 0.0))
        self._mean, self._std = _row(config.get("latents_mean")), _row(config.get("latents_std"))

    def forward(self, latents: Tensor) -> Tensor:
        if self._mean and self._std:
            mean, std = (torch.tensor(row).view(1, -1, 1, 1) for row in (self._mean, self._std))
            latents = latents * std / self._scale + mean
        else:
            latents = latents / self._scale + self._shift
        decode = self.vae.decode
        assert callable(decode)
        image: Tensor = decode(latents.to(self._dtype), return_dict=False)[0]
        pixels = (image.float() / 2 + 0.5).clamp(0, 1)
        return (pixels * 255).round().permute(0, 2, 3, 1).to(torch.uint8)


def _row(values: object) -> list[float]:
    return [float(v) for v in values] if isinstance(values, Sequence) and not isinstance(values, str) else []
