"""The ONNX operators that occur in bundles, each in a few lines of PyTorch.

A function takes the node's attributes, then its inputs; an input that is left out is None.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor

Attributes = Mapping[str, Any]

TORCH_DTYPE = {
    TensorProto.FLOAT: torch.float32,
    TensorProto.UINT8: torch.uint8,
    TensorProto.INT32: torch.int32,
    TensorProto.INT64: torch.int64,
    TensorProto.BOOL: torch.bool,
    TensorProto.FLOAT16: torch.float16,
    TensorProto.DOUBLE: torch.float64,
    TensorProto.BFLOAT16: torch.bfloat16,
}

# Inputs that are plain lists of whole numbers, some of them symbolic while torch.export traces: shapes, axes, bounds.
HOST: Mapping[str, tuple[int, ...]] = {
    "Expand": (1,),
    "Pad": (1, 2, 3),
    "ReduceL2": (1,),
    "ReduceMax": (1,),
    "ReduceMean": (1,),
    "ReduceSum": (1,),
    "Reshape": (1,),
    "Resize": (2, 3),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Squeeze": (1,),
    "Tile": (1,),
    "TopK": (1,),
    "Unsqueeze": (1,),
}


def _attention(a: Attributes, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, *more: Any) -> Tensor:
    if more or a.get("softcap", 0.0) or a.get("qk_matmul_output_mode", 0):
        raise NotImplementedError("Attention with cache or softcap")
    merged = q.ndim == 3  # [B, L, heads * D]; otherwise [B, heads, L, D]
    if merged:
        heads = (a["q_num_heads"], a["kv_num_heads"], a["kv_num_heads"])
        q, k, v = (x.unflatten(-1, (n, -1)).transpose(1, 2) for x, n in zip((q, k, v), heads, strict=True))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=bool(a.get("is_causal", 0)), scale=a.get("scale")
    )
    return out.transpose(1, 2).flatten(-2) if merged else out


def _conv(a: Attributes, x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    rank = x.ndim - 2
    pads = a.get("pads", [0] * 2 * rank)
    if a.get("auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        raise NotImplementedError(f"Conv with auto_pad {a['auto_pad']}")
    if pads[:rank] != pads[rank:]:
        x = F.pad(x, [pads[i + side * rank] for i in reversed(range(rank)) for side in (0, 1)])
        pads = [0] * 2 * rank
    ones = [1] * rank
    return torch.convolution(
        x, w, bias, a.get("strides", ones), pads[:rank], a.get("dilations", ones), False, [0] * rank, a.get("group", 1)
    )


def _gather(a: Attributes, x: Tensor, index: Tensor) -> Tensor:
    axis = a.get("axis", 0) % x.ndim
    # PyTorch 2.11 asks an index without axes for its number, which it has not yet while torch.export traces.
    found = x[(slice(None),) * axis + (index if index.ndim else index.reshape(1),)]
    return found if index.ndim else found.squeeze(axis)


def _group_norm(a: Attributes, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(x, a["num_groups"], scale.to(x.dtype), bias.to(x.dtype), a.get("epsilon", 1e-5))


def _layer_norm(a: Attributes, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    shape = x.shape[a.get("axis", -1) % x.ndim :]
    return F.layer_norm(x, shape, scale.to(x.dtype), None if bias is None else bias.to(x.dtype), a.get("epsilon", 1e-5))


def _pad(
    a: Attributes, x: Tensor, pads: Sequence[int], value: Sequence[float] | None = None, axes: Any = None
) -> Tensor:
    mode = a.get("mode", b"constant").decode()
    axes = [axis % x.ndim for axis in axes] if axes is not None else list(range(x.ndim))
    around = dict(zip(axes, zip(pads[: len(axes)], pads[len(axes) :], strict=True), strict=True))
    flat = [n for axis in reversed(range(x.ndim)) for n in around.get(axis, (0, 0))]  # the last axis first
    if mode == "constant":
        return F.pad(x, flat, value=value[0] if value else 0)
    if mode != "reflect" or any(flat[2 * x.ndim - 4 :]):
        raise NotImplementedError(f"Pad in mode {mode} of axes {axes}")
    return F.pad(x, flat[: 2 * x.ndim - 4], mode)


def _is(size: Any, number: int) -> bool:
    """Asking this of a symbolic size would make torch.export decide it for good."""
    return isinstance(size, int) and size == number


def _reshape(a: Attributes, x: Tensor, shape: Sequence[int]) -> Tensor:
    if not a.get("allowzero", 0):
        shape = [x.shape[i] if _is(n, 0) else n for i, n in enumerate(shape)]
    return x.reshape(tuple(shape))


def _expand(_: Attributes, x: Tensor, shape: Sequence[int]) -> Tensor:
    """Both ways: a 1 in ``shape`` takes the tensor's own size."""
    lead = max(0, x.ndim - len(shape))
    sizes = [*[1] * lead, *shape]
    skip = len(sizes) - x.ndim
    return x.expand([-1 if i >= skip and _is(n, 1) else n for i, n in enumerate(sizes)])


def _resize(a: Attributes, x: Tensor, _: Any, scales: Sequence[float] | None, sizes: Any = None) -> Tensor:
    mode, grid = a.get("mode", b"nearest").decode(), a.get("coordinate_transformation_mode", b"half_pixel").decode()
    if (mode, grid, a.get("nearest_mode")) == ("nearest", "asymmetric", b"floor") and scales:
        return F.interpolate(x, scale_factor=[float(scale) for scale in scales[2:]], mode="nearest")
    if (mode, grid, a.get("antialias", 0)) == ("cubic", "align_corners", 0) and sizes:
        return F.interpolate(x, size=sizes[2:], mode="bicubic", align_corners=True)
    raise NotImplementedError(f"Resize in mode {mode}, {grid}")


def _slice(_: Attributes, x: Tensor, starts: Any, ends: Any, axes: Any = None, steps: Any = None) -> Any:
    index = [slice(None)] * x.ndim
    for i, axis in enumerate(axes if axes is not None else range(len(starts))):
        index[axis % x.ndim] = slice(starts[i], ends[i], steps[i] if steps else 1)
    return x[tuple(index)]


def _split(a: Attributes, x: Tensor, sizes: Sequence[int] | None = None) -> Any:
    axis = a.get("axis", 0)
    return torch.split(x, list(sizes), axis) if sizes is not None else torch.tensor_split(x, a["num_outputs"], axis)


def _squeeze(_: Attributes, x: Tensor, axes: Sequence[int] | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(axes))


def _top_k(a: Attributes, x: Tensor, count: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The first ``count`` of all, sorted; of equal ones the lower first, as ONNX has it."""
    axis = a.get("axis", -1)
    found = torch.sort(x, dim=axis, descending=bool(a.get("largest", 1)), stable=True)
    return found.values.narrow(axis, 0, count[0]), found.indices.narrow(axis, 0, count[0])


def _unsqueeze(_: Attributes, x: Tensor, axes: Sequence[int]) -> Tensor:
    rank = x.ndim + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        x = x.unsqueeze(axis)
    return x


def _over(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A reduction over some axes, or all."""

    def run(a: Attributes, x: Tensor, axes: Sequence[int] | None = None) -> Tensor:
        if not axes and a.get("noop_with_empty_axes", 0):
            return x
        return function(x, tuple(axes) if axes else tuple(range(x.ndim)), keepdim=bool(a.get("keepdims", 1)))

    return run


def _pairwise(function: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Tensor]:
    def run(_: Attributes, first: Tensor, *more: Tensor) -> Tensor:
        for each in more:
            first = function(first, each)
        return first

    return run


def _clip(_: Attributes, x: Tensor, least: Tensor | None = None, most: Tensor | None = None) -> Tensor:
    x = x if least is None else torch.maximum(x, least)
    return x if most is None else torch.minimum(x, most)


def _depth_to_space(a: Attributes, x: Tensor) -> Tensor:
    side = a["blocksize"]
    if a.get("mode", b"DCR") == b"CRD":
        return F.pixel_shuffle(x, side)
    return F.pixel_shuffle(x.unflatten(1, (side * side, -1)).transpose(1, 2).flatten(1, 2), side)


def _divide(x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _plain(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda _, *inputs: function(*inputs)


OPERATORS: Mapping[str, Callable[..., Any]] = {
    "Add": _plain(torch.add),
    "And": _plain(torch.logical_and),
    "ArgMax": lambda a, x: torch.argmax(x, a.get("axis", 0), keepdim=bool(a.get("keepdims", 1))),
    "Attention": _attention,
    "Cast": lambda a, x: x.to(TORCH_DTYPE[a["to"]]),
    "Clip": _clip,
    "Concat": lambda a, *inputs: torch.cat(inputs, a["axis"]),
    "Conv": _conv,
    "Cos": _plain(torch.cos),
    "DepthToSpace": _depth_to_space,
    "Div": _plain(_divide),
    "Einsum": lambda a, *inputs: torch.einsum(a["equation"].decode(), *inputs),
    "Equal": _plain(torch.eq),
    "Exp": _plain(torch.exp),
    "Expand": _expand,
    "Flatten": lambda a, x: x.flatten(a.get("axis", 1)) if a.get("axis", 1) == 1 else x.reshape(1, -1),
    "Gather": _gather,
    "GatherElements": lambda a, x, index: torch.gather(x, a.get("axis", 0), index),
    "GatherND": lambda a, x, index: x[tuple(index.unbind(-1))],
    "Gelu": lambda a, x: F.gelu(x, approximate=a.get("approximate", b"none").decode()),
    "GroupNormalization": _group_norm,
    "Identity": _plain(lambda x: x),
    "LayerNormalization": _layer_norm,
    "Less": _plain(torch.lt),
    "LessOrEqual": _plain(torch.le),
    "MatMul": _plain(torch.matmul),
    "Max": _pairwise(torch.maximum),
    "Min": _pairwise(torch.minimum),
    "Mul": _plain(torch.mul),
    "Not": _plain(torch.logical_not),
    "Pad": _pad,
    "Pow": _plain(torch.pow),
    "Reciprocal": _plain(torch.reciprocal),
    "ReduceL2": _over(lambda x, axes, keepdim: torch.linalg.vector_norm(x, dim=axes, keepdim=keepdim)),
    "ReduceMax": _over(torch.amax),
    "ReduceMean": _over(torch.mean),
    "ReduceSum": _over(torch.sum),
    "Relu": _plain(torch.relu),
    "Reshape": _reshape,
    "Resize": _resize,
    "Round": _plain(torch.round),
    "Sigmoid": _plain(torch.sigmoid),
    "Sin": _plain(torch.sin),
    "Slice": _slice,
    "Split": _split,
    "Sqrt": _plain(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _plain(torch.sub),
    "Sum": _pairwise(torch.add),
    "Tanh": _plain(torch.tanh),
    "Tile": lambda _, x, repeats: x.repeat(repeats),
    "TopK": _top_k,
    "Transpose": lambda a, x: x.permute(a["perm"]),
    "Unsqueeze": _unsqueeze,
    "Where": _plain(torch.where),
}

# --- shapes -------------------------------------------------------------------------------------
# What comes from a Shape node: arrays of whole numbers, some of them symbolic while torch.export traces.

SHAPE_OPERATORS: Mapping[str, Callable[..., NDArray[Any]]] = {
    "Concat": lambda a, *parts: np.concatenate(parts, a["axis"]),
    "Div": lambda _, x, y: np.asarray(x // y),
    "Mul": lambda _, x, y: np.asarray(x * y),
    "Reshape": lambda _, x, shape: x.reshape(tuple(shape)),
    "Squeeze": lambda _, x, axes=None: x.squeeze() if axes is None else x.squeeze(tuple(axes)),
}


def shape_of(a: Attributes, x: Tensor) -> NDArray[Any]:
    """What a Shape node gives."""
    return np.array(x.shape[a.get("start", 0) : a.get("end")], dtype=object)
