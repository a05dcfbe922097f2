"""What conditions the denoiser, in eager PyTorch: for prompts encoded ahead of time."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tgate_engine.errors import ExportError


def encode(module: nn.Module, names: Sequence[str], *arguments: Tensor) -> dict[str, Tensor]:
    """A text or image module's outputs by name, float32 [1, ...]."""
    try:
        with torch.no_grad():
            outputs = module(*arguments)
    except Exception as error:  # PyTorch and transformers raise many kinds for configurations that do not fit
        message = " ".join(str(error).split())
        raise ExportError(
            f"the encoders do not run ({type(error).__name__}: {message:.300}); their configurations do not fit each "
            "other"
        ) from error
    return {name: value.float() for name, value in zip(names, outputs, strict=True)}
