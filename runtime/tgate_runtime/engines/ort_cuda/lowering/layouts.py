"""Transposes between NCHW and NHWC: moved down the graph until they meet their inverses, and dropped there."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from tgate_runtime.engines.ort_cuda.lowering.edits import (
    TO_FIRST,
    TO_LAST,
    attribute,
    constant,
    insert,
    number,
    permutation,
    permuted,
    put_first,
    replace,
    sizes,
)

_OF_ONE = ("Abs", "Cast", "Cos", "Erf", "Exp", "Gelu", "Identity", "Neg", "Relu", "Sigmoid", "Sin", "Sqrt", "Tanh")
_OF_SEVERAL = ("Add", "Div", "Max", "Min", "Mul", "Pow", "Sub", "Sum")
_TOKENS = (0, 2, 1)
"""The permutation of [N, channels, places] to [N, places, channels]."""


def settle_layouts(graph: ir.Graph) -> int:
    """Move each Transpose from NHWC to NCHW below what works on either: arithmetic element by element, concatenation,
    enlarging by the nearest pixel. Then drop pairs that cancel each other; how many changes.

    Without this each operator of the two rewrites before it would be transposed in and out. Below arithmetic on two
    tensors a Transpose is only moved where it saves one: where both came from NHWC, or the other one has no
    height and width.
    """
    changed = 0
    while any(rewritten := [_rewrite(graph, node) for node in list(graph) if node.graph is graph]):
        changed += sum(rewritten)
    for node in reversed(graph) if changed else ():
        if node.op_type == "Transpose" and not node.outputs[0].uses() and not node.outputs[0].is_graph_output():
            graph.remove(node, safe=True)  # or who counts the readers of what it reads would count it
    return changed


def _rewrite(graph: ir.Graph, node: ir.Node) -> bool:
    if node.domain or not node.inputs:
        return False
    if node.op_type == "Transpose":
        return _cancel(graph, node) or _to_tokens(graph, node) or _from_tokens(graph, node)
    if node.op_type in _OF_ONE or node.op_type in _OF_SEVERAL:
        return _sink(graph, node, node.inputs, {})
    if node.op_type == "Concat":
        rank = attribute(node, "axis", 0)
        return rank in (1, -3) and _sink(graph, node, node.inputs, {"axis": 3}, all_large=True)
    return node.op_type == "Resize" and _sink_resize(graph, node)


# --- pairs --------------------------------------------------------------------------------------


def _cancel(graph: ir.Graph, node: ir.Node) -> bool:
    """A Transpose of a Transpose is one, or none."""
    before = None if node.inputs[0] is None else node.inputs[0].producer()
    outer, inner = permutation(node), permutation(before)
    if before is None or not outer or len(outer) != len(inner) or before.inputs[0] is None:
        return False
    source, result, order = before.inputs[0], node.outputs[0], tuple(permuted(inner, outer))
    if order != tuple(range(len(order))):
        node.replace_input_with(0, source)
        node.attributes["perm"] = ir.AttrInt64s("perm", order)
    elif not result.is_graph_output() or (source.producer() is not None and not source.is_graph_output()):
        replace(graph, result, source, [node])
    else:
        return False
    return True


def _to_tokens(graph: ir.Graph, node: ir.Node) -> bool:
    """NHWC to NCHW to [N, C, HW] to [N, HW, C] is a Reshape of NHWC."""
    reshape = None if node.inputs[0] is None else node.inputs[0].producer()
    if permutation(node) != _TOKENS or reshape is None or reshape.op_type != "Reshape" or reshape.domain:
        return False
    source, flat = _before_first(reshape.inputs[0]), sizes(reshape.outputs[0], 3)
    shape = sizes(source, 4)
    if source is None or not flat or not _flattens(flat, shape):
        return False
    _, places, channels = permuted(flat, _TOKENS)
    target = number(graph, f"lowered.tokens.{places}.{channels}", np.array([-1, places, channels], np.int64))
    made = insert(
        graph, node, "Reshape", [source, target], {}, like=node.outputs[0], name="tokens", shape=permuted(flat, _TOKENS)
    )
    replace(graph, node.outputs[0], made, [node])
    return True


def _from_tokens(graph: ir.Graph, node: ir.Node) -> bool:
    """[N, HW, C] to [N, C, HW] to NCHW to NHWC is a Reshape."""
    reshape = None if node.inputs[0] is None else node.inputs[0].producer()
    if permutation(node) != TO_LAST or reshape is None or reshape.op_type != "Reshape" or reshape.domain:
        return False
    before = None if reshape.inputs[0] is None else reshape.inputs[0].producer()
    if permutation(before) != _TOKENS or before is None:
        return False
    tokens, shape = before.inputs[0], permuted(sizes(reshape.outputs[0], 4), TO_LAST)
    if tokens is None or not _flattens(sizes(before.outputs[0], 3), shape):
        return False
    target = number(graph, f"lowered.places.{shape[1:]}", np.array([-1, *shape[1:]], np.int64))
    made = insert(graph, node, "Reshape", [tokens, target], {}, like=node.outputs[0], name="places", shape=shape)
    replace(graph, node.outputs[0], made, [node])
    return True


def _flattens(flat: list[int | str | None], shape: list[int | str | None]) -> bool:
    """Whether [N, C, HW] is the shape [N, H, W, C] with its places in a row, all but N known."""
    if len(flat) != 3 or len(shape) != 4 or flat[0] is None:
        return False
    height, width, channels = shape[1:]
    if not isinstance(height, int) or not isinstance(width, int) or not isinstance(channels, int):
        return False
    return flat == [shape[0], channels, height * width]


# --- moving down --------------------------------------------------------------------------------


def _before_first(value: ir.Value | None) -> ir.Value | None:
    """What was NHWC, where ``value`` is that as NCHW. An output of the graph is transposed in any case: nothing."""
    node = None if value is None or value.is_graph_output() else value.producer()
    return node.inputs[0] if node is not None and permutation(node) == TO_FIRST else None


def _sink(graph: ir.Graph, node: ir.Node, inputs: Any, attributes: dict[str, Any], *, all_large: bool = False) -> bool:
    """Have ``node`` work on NHWC, with those attributes changed, and transpose what it gives. ``all_large``: none of
    its inputs may be without height and width."""
    result = node.outputs[0]
    shape = sizes(result, 4)
    if not shape or not any(_before_first(value) is not None for value in inputs):
        return False
    if not all(value is not None and _has_last(value, all_large) for value in inputs):
        return False
    own = {each.name: each.value for each in node.attributes.values()} | attributes
    last = [_last(graph, node, value) for value in inputs]
    made = insert(graph, node, node.op_type, last, own, like=result, name="last", shape=permuted(shape, TO_LAST))
    put_first(graph, node, made, result, [node])
    return True


def _has_last(value: ir.Value, large: bool) -> bool:
    """Whether :func:`_last` has an answer for ``value``."""
    if _before_first(value) is not None:
        return True
    if large or value.shape is None:
        return False
    return _is_one(value) or _channels(value) > 0


def _last(graph: ir.Graph, before: ir.Node, value: ir.Value) -> ir.Value:
    """``value`` for an operator on NHWC: what it was before it became NCHW, itself where it is one number, and
    [N, 1, 1, C] where it has no height and width."""
    source = _before_first(value)
    if source is not None:
        return source
    if _is_one(value):
        return value
    channels = _channels(value)
    target = number(graph, f"lowered.channels.{channels}", np.array([-1, 1, 1, channels], np.int64))
    shape = value.shape
    batch = sizes(value, 4)[0] if shape is not None and len(shape) == 4 else 1
    name = f"for.{before.outputs[0].name}"
    return insert(graph, before, "Reshape", [value, target], {}, like=value, name=name, shape=[batch, 1, 1, channels])


def _is_one(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) <= 4 and all(dim == 1 for dim in value.shape)


def _channels(value: ir.Value) -> int:
    """How many, where ``value`` is [N, C, 1, 1] or [C, 1, 1]; 0 for all others."""
    rank = 0 if value.shape is None else len(value.shape)
    shape = sizes(value, rank)
    if rank not in (3, 4) or shape[-2:] != [1, 1] or not isinstance(shape[-3], int):
        return 0
    return shape[-3]


def _sink_resize(graph: ir.Graph, node: ir.Node) -> bool:
    """By the nearest pixel alone: the CUDA kernel does that in any dimension, and all else in the last two."""
    inputs = [*node.inputs, None, None]
    source, region, scales = inputs[:3]
    if attribute(node, "mode", "nearest") != "nearest" or attribute(node, "antialias", 0) or "axes" in node.attributes:
        return False
    factors = constant(scales)
    if region is not None or any(inputs[3:]) or factors is None or factors.shape != (4,):
        return False
    if not sizes(source, 4) or _before_first(source) is None:
        return False
    order = permuted(factors.tolist(), TO_LAST)
    turned = number(graph, f"lowered.scales.{order}", np.array(order, factors.dtype))
    own = {each.name: each.value for each in node.attributes.values()}
    result, shape = node.outputs[0], sizes(node.outputs[0], 4)
    if not shape:
        return False
    made = insert(
        graph, node, "Resize", [_before_first(source), None, turned], own, like=result, name="last",
        shape=permuted(shape, TO_LAST),
    )  # fmt: skip
    put_first(graph, node, made, result, [node])
    return True
