"""Sums before a group normalization, taken into it."""

from __future__ import annotations

import onnx_ir as ir

from tgate_runtime.engines.ort_cuda.lowering.edits import CONTRIB, producer, replace, sizes, used_once


def lower_skips(graph: ir.Graph) -> int:
    """Make GroupNorm(x + skip) of [N, H, W, C] a SkipGroupNorm, where skip is as large or [N, 1, 1, C]; how many.

    What is added is an embedding of the time, or the way around a block. The sum, where it is read again, is the
    operator's second output. Where x is what a convolution gives, its bias goes along: cuDNN adds one in a launch of
    its own.
    """
    return sum(_lower(graph, norm) for norm in list(graph) if (norm.domain, norm.op_type) == (CONTRIB, "GroupNorm"))


def _lower(graph: ir.Graph, norm: ir.Node) -> bool:
    total = producer(norm.inputs[0], "Add")
    if total is None:
        return False
    result, shape = total.outputs[0], sizes(total.outputs[0], 4)
    if not shape or result.is_graph_output():
        return False
    small = [shape[0], 1, 1, shape[3]]
    pairs = [(x, skip) for x, skip in (total.inputs, total.inputs[::-1]) if sizes(x, 4) == shape]
    pairs = [(x, skip) for x, skip in pairs if sizes(skip, 4) in (shape, small)]
    if not pairs:
        return False
    pair = next((pair for pair in pairs if _convolution(pair[0]) is not None), pairs[0])
    outputs = [ir.Value(name=f"{norm.outputs[0].name}.skipped", shape=result.shape, type=result.type)]
    again = len(result.uses()) > 1
    if again:
        outputs.append(ir.Value(name=f"{result.name}.sum", shape=result.shape, type=result.type))
    inputs = [pair[0], *norm.inputs[1:3], pair[1], *_bias(pair[0])]
    made = ir.Node(CONTRIB, "SkipGroupNorm", inputs, norm.attributes.values(), outputs=outputs)
    graph.insert_before(total, made)
    if again:
        replace(graph, result, outputs[1], [])
    replace(graph, norm.outputs[0], outputs[0], [norm, total])
    return True


def _convolution(value: ir.Value | None) -> ir.Node | None:
    """The NhwcConv with a bias that makes ``value``, if nothing else reads it."""
    node = None if value is None else value.producer()
    if node is None or value is None or (node.domain, node.op_type) != (CONTRIB, "NhwcConv") or not used_once(value):
        return None
    return node if len(node.inputs) > 2 and node.inputs[2] is not None else None


def _bias(value: ir.Value | None) -> list[ir.Value | None]:
    """The bias of the convolution that makes ``value``, taken from it."""
    node = _convolution(value)
    if node is None:
        return []
    bias = node.inputs[2]
    node.resize_inputs(2)
    return [bias]
