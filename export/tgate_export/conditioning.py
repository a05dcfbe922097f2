"""What conditions the denoiser, in eager PyTorch: for goldens, and for prompts encoded ahead of time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_export.families.base import ConditioningInput

Tensors = Mapping[str, Tensor]


def encode(module: nn.Module, names: Sequence[str], *arguments: Tensor) -> dict[str, Tensor]:
    """A text or image module's outputs by name, float32 [1, ...]."""
    try:
        with torch.no_grad():
            outputs = module(*arguments)
    except Exception as error:  # PyTorch and transformers raise many kinds for configurations that do not fit
        said = " ".join(str(error).split())
        raise ExportError(
            f"the encoders do not run ({type(error).__name__}: {said:.300}); their configurations do not fit each other"
        ) from error
    return {name: value.float() for name, value in zip(names, outputs, strict=True)}


def halves(
    inputs: Sequence[ConditioningInput], positive: Tensors, negative: Tensors | None, *, guided: bool
) -> dict[str, Tensor]:
    """``<name>.<half>`` to [1, ...]. ``negative`` None stands for zeros; what it has as ``<name>.negative`` is what a
    negative prompt becomes. Without guidance there is no negative half."""
    found: dict[str, Tensor] = {}
    for c in inputs:
        name = c.conditioning.name
        here = torch.tensor([c.conditioning.value]) if c.conditioning.source == "constant" else positive[name]
        found[f"{name}.positive"] = here
        if not guided:
            continue
        if c.conditioning.negative == "same" or c.conditioning.source == "constant":
            found[f"{name}.negative"] = here
        elif c.conditioning.negative == "zeros" or negative is None:
            found[f"{name}.negative"] = torch.zeros_like(here)
        else:
            found[f"{name}.negative"] = negative.get(f"{name}.negative", negative[name])
    return found
