"""What a checkpoint's tensors must be before they are taken for weights: all of them, floating point, finite.

Whoever reads tensors asks here, so that no export, golden or embedding is made from anything else.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_export.checkpoints import Holder, Stored
from tgate_export.checkpoints.directory import spellings

_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
"""Dtypes of safetensors that hold numbers as they are."""

_HARMLESS = (
    "position_ids",  # buffers of old text encoders
    "logit_scale",
    "text_projection.weight",  # in the files of text encoders that are used without it
    "visual_projection.weight",
)
"""Ends of the names of tensors that a component's file may hold beside its weights."""

_OTHER_HALVES = {
    "CLIPTextModel": ("vision_model.",),
    "CLIPTextModelWithProjection": ("vision_model.",),
    "CLIPVisionModelWithProjection": ("text_model.",),
    "T5EncoderModel": ("decoder.", "lm_head."),
}
"""Beginnings of the names of what else a file of the whole model holds, by the class that reads a part of it."""


def check_tensors(checkpoint: Holder, component: str, module: nn.Module) -> None:
    """Check the names, shapes and dtypes of a component's tensors, without reading their values.

    ``module``: the component, with or without memory for its weights. Raises :class:`ExportError` naming the first
    tensor that is missing, of another shape, no floating-point number, or read by nothing in the module.
    """
    tensors = checkpoint.tensors(component)
    stored = tensors.stored()
    read: set[str] = set()
    for key, parameter in module.named_parameters(remove_duplicate=False):
        try:
            name = tensors.find(key)
        except ExportError:
            if any(other in stored for other in _tied(module, key)):
                continue
            raise
        read.update(spelling for spelling in spellings(key) if spelling in stored)
        _check_form(checkpoint, component, name, stored[name], tuple(parameter.shape))
    buffers = dict(module.named_buffers())
    persistent = set(module.state_dict())
    for name in stored:
        if name in read or name.endswith(_HARMLESS):
            continue
        if name.startswith(_OTHER_HALVES.get(type(module).__name__, ())):
            continue
        if name in buffers:
            if name in persistent:
                _check_buffer(checkpoint, component, name, buffers[name])
            continue
        raise ExportError(
            f"{checkpoint.where}: {component} has a tensor {name!r} ({stored[name].dtype} {list(stored[name].shape)}) "
            f"that nothing in a {type(module).__name__} of its config.json reads: scales of quantised weights, or "
            "parts that the config leaves out; give floating-point weights and the config that belongs to them"
        )


def sound(checkpoint: Holder, component: str, key: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor of a parameter of that shape, read, in the checkpoint's dtype. The caller owns it.

    Raises :class:`ExportError` where it is no floating-point number, not finite, or of another shape.
    """
    tensor = checkpoint.tensors(component).read(key)
    where = f"{checkpoint.where}: {component} tensor {key!r}"
    if not tensor.is_floating_point():
        raise ExportError(f"{where} is {tensor.dtype}; floating-point weights are wanted")
    if not _fits(tuple(tensor.shape), shape):
        raise ExportError(_shapes(checkpoint, component, key, tuple(tensor.shape), shape))
    values = tensor.float() if tensor.element_size() == 1 else tensor  # PyTorch has no tests for 8-bit numbers
    if not torch.isfinite(values).all():
        what = "NaN" if torch.isnan(values).any() else "an infinity"
        raise ExportError(f"{where} holds {what}; the checkpoint is damaged, or a merge of models went wrong")
    return tensor.reshape(shape)


def cast(checkpoint: Holder, component: str, key: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A finite tensor in another dtype. Raises :class:`ExportError` where that cannot hold its numbers."""
    held = tensor.to(dtype)
    if dtype.itemsize < tensor.dtype.itemsize and not torch.isfinite(held).all():
        largest = float(tensor.abs().max())
        raise ExportError(
            f"{checkpoint.where}: {component} tensor {key!r} holds numbers as large as {largest:.6g}, beyond the "
            f"{torch.finfo(dtype).max:.6g} of {str(dtype).removeprefix('torch.')}; export with --dtype fp32 or bf16"
        )
    return held


def _tied(module: nn.Module, key: str) -> list[str]:
    """Other names of the same parameter: files hold a shared one once."""
    parameters: Mapping[str, nn.Parameter] = dict(module.named_parameters(remove_duplicate=False))
    same = [name for name, parameter in parameters.items() if parameter is parameters[key]]
    return [spelling for name in same for spelling in spellings(name)]


def _check_form(checkpoint: Holder, component: str, name: str, stored: Stored, shape: tuple[int, ...]) -> None:
    if stored.dtype not in _FLOATS:
        raise ExportError(
            f"{checkpoint.where}: {component} tensor {name!r} is stored as {stored.dtype}: integers are no weights, so "
            "the checkpoint is quantised; give it with floating-point weights"
        )
    if not _fits(stored.shape, shape):
        raise ExportError(_shapes(checkpoint, component, name, stored.shape, shape))


def _fits(stored: tuple[int, ...], own: tuple[int, ...]) -> bool:
    """The same shape, or that of a 1x1 convolution which today's modules hold as a linear layer, or the reverse."""
    if stored == own:
        return True
    short, long = sorted((stored, own), key=len)
    return len(short) == 2 and len(long) in (3, 4) and long[:2] == short and math.prod(long[2:]) == 1


def _shapes(checkpoint: Holder, component: str, name: str, stored: tuple[int, ...], own: tuple[int, ...]) -> str:
    return (
        f"{checkpoint.where}: {component} tensor {name!r} has shape {list(stored)}, the model wants {list(own)}; the "
        "checkpoint is of another architecture than its config.json says"
    )


def _check_buffer(checkpoint: Holder, component: str, name: str, own: Tensor) -> None:
    """A table that a module computes from its config, and that its file holds too: they must agree."""
    held = checkpoint.tensors(component).read(name)
    if held.shape != own.shape or not torch.allclose(held.double(), own.double(), rtol=1e-2, atol=1e-3):
        raise ExportError(
            f"{checkpoint.where}: {component} tensor {name!r} is not what its config.json makes of it; "
            "the config is of another checkpoint"
        )
