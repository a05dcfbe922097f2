"""The memory that a graph works in: what its inner values take at once, at most.

A plan of memory, not a measurement: nodes run in the order of the file, a value lives from the node that makes it to
the last one that reads it, a value of a last reader's own shape may be overwritten in place, and reshaping is free. An
engine that fuses needs less; one that lays values out anew needs more. Attention is taken as ONNX Runtime's CPU kernel
computes it, with all scores of one layer in memory at once.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from tgate_export.graphs import size_for_one

_VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze"})
_IN_PLACE = frozenset({"Add", "Cast", "Div", "Gelu", "Mul", "Neg", "Relu", "Sigmoid", "Softmax", "Sqrt", "Sub", "Tanh"})


def peak_bytes(model: ir.Model) -> int:
    """The most bytes that inner values hold at once, for the batch that was traced, one where it is symbolic.

    Inputs, outputs and weights are not counted: they have places of their own.
    """
    order = list(model.graph)
    place = {node: number for number, node in enumerate(order)}
    outside = {id(value) for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values())}
    root: dict[int, ir.Value] = {}  # of a view: the value whose memory it shows

    def rooted(value: ir.Value) -> ir.Value:
        return root.get(id(value), value)

    for node in order:
        if node.op_type in _VIEWS and node.inputs and node.inputs[0] is not None:
            root[id(node.outputs[0])] = rooted(node.inputs[0])
    last: dict[int, int] = {}
    for node in order:
        for value in (*node.inputs, *node.outputs):
            if value is not None:
                last[id(rooted(value))] = place[node]
    held: dict[int, int] = {}
    now = most = 0
    for number, node in enumerate(order):
        if node.op_type in _VIEWS:
            continue
        dying = [
            memory
            for value in node.inputs
            if value is not None and (memory := id(rooted(value))) in held and last[memory] == number
        ]
        for value in node.outputs:
            if id(value) in outside:
                continue
            size = _nbytes(value)
            spare = next((memory for memory in dying if held.get(memory) == size), None)
            if node.op_type in _IN_PLACE and spare is not None:
                now -= held.pop(spare)
            held[id(value)] = size
            now += size
        most = max(most, now + _scores(node))
        for memory in {*dying, *(id(v) for v in node.outputs if last.get(id(v)) == number)}:
            now -= held.pop(memory, 0)
    return most


def _scores(node: ir.Node) -> int:
    """The scores [B, heads, queries, keys] of an attention layer, while it is computed."""
    if node.op_type != "Attention" or node.inputs[0] is None or node.inputs[1] is None:
        return 0
    query, key = (_shape(value) for value in node.inputs[:2] if value is not None)
    heads = node.attributes.get("q_num_heads")
    return math.prod(query[:-1]) * (1 if heads is None else heads.as_int()) * key[-2] * _itemsize(node.inputs[0])


def _nbytes(value: ir.Value) -> int:
    return math.prod(_shape(value)) * _itemsize(value)


def _itemsize(value: ir.Value) -> int:
    return 4 if value.dtype is None else int(value.dtype.itemsize)


def _shape(value: ir.Value) -> tuple[int, ...]:
    """Nothing where it is not known, which is so for values that shapes are computed from alone."""
    return () if value.shape is None else tuple(size_for_one(dim) for dim in value.shape)
