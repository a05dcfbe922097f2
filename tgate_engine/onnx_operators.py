"""What a graph's operators may be, and be given: as many inputs as they take, and attributes that ONNX lists for them,
with values that mean something.

Engines check little of it. ONNX Runtime follows no pointer for an input of ``Sum`` that has no name, and reads beside a
tensor for a ``GatherND`` of ``batch_dims = -2``: both end the process.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Container, Mapping, Sequence
from typing import Any

MOST_DIMENSIONS = 8
MOST_TENSORS = 1 << 10
"""That one operator reads or makes; a concatenation of SDXL's has a few dozen."""
_MOST_SIDE = 1 << 16  # pixels, channels, heads

_OF_ONE = """Abs ArgMax AveragePool Cast Ceil Cos DepthToSpace Erf Exp Flatten Floor Gelu GlobalAveragePool Identity
    IsInf IsNaN LeakyRelu Log MaxPool Neg Not Reciprocal Relu Round Shape Sigmoid Sign Sin Softmax Softplus Sqrt Tanh
    Transpose"""
_OF_TWO = """Add And Div Equal Expand Gather GatherElements GatherND Greater GreaterOrEqual Less LessOrEqual MatMul Mod
    Mul Or PRelu Pow RMSNormalization Reshape Sub Tile TopK Unsqueeze"""
INPUTS: Mapping[str, str] = {
    **dict.fromkeys(_OF_ONE.split(), "1"),
    **dict.fromkeys(_OF_TWO.split(), "11"),
    **dict.fromkeys(("Concat", "Einsum", "Max", "Min", "Sum"), "1*"),
    **dict.fromkeys(("GroupNormalization", "InstanceNormalization", "Where"), "111"),
    **dict.fromkeys(("ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"), "1?"),
    **dict.fromkeys(("Split", "Squeeze", "Trilu"), "1?"),
    **dict.fromkeys(("Conv", "Gemm", "LayerNormalization"), "11?"),
    "Attention": "111???",
    "Clip": "1??",
    "Pad": "11??",
    "Resize": "1???",
    "Slice": "111??",
    # Of ONNX Runtime's own.
    "BiasAdd": "111",
    "BiasSplitGelu": "11",
    "GroupNorm": "111",
    "MultiHeadAttention": "111",
    "NhwcConv": "11?",
    "SkipGroupNorm": "1111?",
    "SkipLayerNormalization": "111??",
}
"""The inputs of every operator that a graph may hold: a 1 for one that has to be there, a question mark for one that
may be left out, a star for any number more.

Plain arithmetic: no control flow, nothing random, no text, nothing that holds a graph. Export writes two thirds of
them, over all families, methods and rewrites; the others are what another network may need.
"""
CONTRIB = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""
LOWERED = frozenset(
    (
        *("BiasAdd", "BiasSplitGelu", "GroupNorm", "MultiHeadAttention", "NhwcConv", "SkipGroupNorm"),
        "SkipLayerNormalization",
    )
)
"""What a node may be of that domain, in a graph that was lowered for CUDA, and in no other."""
OPERATORS = frozenset(INPUTS) - LOWERED
"""What a node may be, of the default domain."""

OUTPUTS: Mapping[str, int] = {
    "Attention": 4,
    "LayerNormalization": 3,
    "MaxPool": 2,
    "SkipGroupNorm": 2,
    "SkipLayerNormalization": 4,
    "Split": MOST_TENSORS,
    "TopK": 2,
}
"""How many outputs an operator has at most, where that is more than one. The first has to be there."""

NAMES: Mapping[str, str] = {
    **dict.fromkeys(("Concat", "Flatten", "Gather", "GatherElements", "Softmax"), "axis"),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization"), "axis epsilon stash_type"),
    **dict.fromkeys(
        ("ReduceL2", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"), "keepdims noop_with_empty_axes"
    ),
    "ArgMax": "axis keepdims select_last_index",
    "Attention": "is_causal kv_num_heads q_num_heads qk_matmul_output_mode scale softcap softmax_precision",
    **dict.fromkeys(("GroupNorm", "SkipGroupNorm"), "activation channels_last epsilon groups"),
    "MultiHeadAttention": "num_heads scale",
    "NhwcConv": "dilations group kernel_shape pads strides",
    "SkipLayerNormalization": "epsilon",
    "AveragePool": "auto_pad ceil_mode count_include_pad dilations kernel_shape pads strides",
    "Cast": "saturate to",
    "Conv": "auto_pad dilations group kernel_shape pads strides",
    "DepthToSpace": "blocksize mode",
    "Einsum": "equation",
    "GatherND": "batch_dims",
    "Gelu": "approximate",
    "Gemm": "alpha beta transA transB",
    "GroupNormalization": "epsilon num_groups stash_type",
    "InstanceNormalization": "epsilon",
    "IsInf": "detect_negative detect_positive",
    "LeakyRelu": "alpha",
    "MaxPool": "auto_pad ceil_mode dilations kernel_shape pads storage_order strides",
    "Mod": "fmod",
    "Pad": "mode",
    "Reshape": "allowzero",
    "Resize": "antialias axes coordinate_transformation_mode cubic_coeff_a exclude_outside extrapolation_value "
    "keep_aspect_ratio_policy mode nearest_mode",
    "Shape": "start end",
    "Split": "axis num_outputs",
    "TopK": "axis largest sorted",
    "Transpose": "perm",
    "Trilu": "upper",
}
"""Attributes by operator; one that is not here has none."""

Rule = tuple[int, Callable[[Any], bool]]
"""The type, by its number in ``AttributeProto.AttributeType``, and whether a value of it will do."""


def _whole(known: Container[int]) -> Rule:
    return 2, lambda value: value in known


def _several(known: Container[int]) -> Rule:
    return 7, lambda values: len(values) <= 2 * MOST_DIMENSIONS and all(value in known for value in values)


def _text(words: str) -> Rule:
    known = {word.encode() for word in words.split()}
    return 3, lambda value: value in known


_FLAG = _whole(range(2))
_DIMENSION = range(-MOST_DIMENSIONS, MOST_DIMENSIONS + 1)
_FINITE: Rule = (1, math.isfinite)
_TYPE = _whole((1, 2, 6, 7, 9, 10, 11, 16))
_EQUATION = re.compile(rb"[A-Za-z.,> -]{1,64}")

RULES: Mapping[str, Rule] = {
    **dict.fromkeys(("alpha", "beta", "cubic_coeff_a", "epsilon", "extrapolation_value", "scale", "softcap"), _FINITE),
    **dict.fromkeys(("activation", "allowzero", "antialias", "ceil_mode", "channels_last"), _FLAG),
    **dict.fromkeys(("count_include_pad", "detect_negative"), _FLAG),
    **dict.fromkeys(("detect_positive", "exclude_outside", "fmod", "is_causal", "keepdims", "largest"), _FLAG),
    **dict.fromkeys(("noop_with_empty_axes", "saturate", "select_last_index", "sorted", "storage_order"), _FLAG),
    **dict.fromkeys(("transA", "transB", "upper"), _FLAG),
    **dict.fromkeys(("softmax_precision", "stash_type", "to"), _TYPE),
    **dict.fromkeys(("axis", "start", "end"), _whole(_DIMENSION)),
    **dict.fromkeys(("blocksize", "group", "groups", "num_groups", "num_outputs"), _whole(range(1, _MOST_SIDE))),
    **dict.fromkeys(("kv_num_heads", "num_heads", "q_num_heads"), _whole(range(1, _MOST_SIDE))),
    "batch_dims": _whole(range(MOST_DIMENSIONS)),
    "qk_matmul_output_mode": _whole(range(4)),
    "axes": _several(_DIMENSION),
    "perm": _several(range(MOST_DIMENSIONS)),
    "pads": _several(range(_MOST_SIDE)),
    **dict.fromkeys(("dilations", "kernel_shape", "strides"), _several(range(1, _MOST_SIDE))),
    "approximate": _text("none tanh"),
    "auto_pad": _text("NOTSET VALID SAME_UPPER SAME_LOWER"),
    "coordinate_transformation_mode": _text(
        "half_pixel half_pixel_symmetric pytorch_half_pixel align_corners asymmetric"
    ),
    "equation": (3, lambda value: _EQUATION.fullmatch(value) is not None),
    "keep_aspect_ratio_policy": _text("stretch not_larger not_smaller"),
    "mode": _text("constant reflect edge wrap nearest linear cubic DCR CRD"),
    "nearest_mode": _text("round_prefer_floor round_prefer_ceil floor ceil"),
}
"""What an attribute of a name is, whatever operator has it."""

_OF = {operator: frozenset(names.split()) for operator, names in NAMES.items()}


def takes(operator: str, inputs: Sequence[str], outputs: Sequence[str]) -> bool:
    """Whether an operator may have inputs and outputs of those names, an empty one being left out."""
    pattern = INPUTS[operator].rstrip("*")
    places = pattern if pattern == INPUTS[operator] else pattern.ljust(min(len(inputs), MOST_TENSORS), "1")
    if len(inputs) > len(places) or not 0 < len(outputs) <= OUTPUTS.get(operator, 1):
        return False
    missing = places[len(inputs) :] + "".join(place for place, name in zip(places, inputs, strict=False) if not name)
    return "1" not in missing and bool(outputs[0])


def may_say(operator: str, name: str, kind: int, value: Any) -> bool:
    """Whether an operator may have an attribute of that name, type and value: a number, bytes, or numbers."""
    if name not in _OF.get(operator, ()):
        return False
    wanted, fits = RULES[name]
    return kind == wanted and fits(value)
