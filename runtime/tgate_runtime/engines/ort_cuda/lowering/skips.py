"""Sums before a group normalization, taken into it."""

from __future__ import annotations

import onnx_ir as ir

from tgate_runtime.engines.ort_cuda.lowering.edits import CONTRIB, producer, replace, sizes


def lower_skips(graph: ir.Graph) -> int:
    """Make GroupNorm(x + skip) of [N, H, W, C] a SkipGroupNorm, where skip is as large or [N, 1, 1, C]; how many.

    What is added is an embedding of the time, or the way around a block. The sum, where it is read again, is the
    operator's second output.
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
    pair = next(((x, skip) for x, skip in pairs if sizes(skip, 4) in (shape, small)), None)
    if pair is None:
        return False
    outputs = [ir.Value(name=f"{norm.outputs[0].name}.skipped", shape=result.shape, type=result.type)]
    again = len(result.uses()) > 1
    if again:
        outputs.append(ir.Value(name=f"{result.name}.sum", shape=result.shape, type=result.type))
    inputs = [pair[0], *norm.inputs[1:3], pair[1]]
    made = ir.Node(CONTRIB, "SkipGroupNorm", inputs, norm.attributes.values(), outputs=outputs)
    graph.insert_before(total, made)
    if again:
        replace(graph, result, outputs[1], [])
    replace(graph, norm.outputs[0], outputs[0], [norm, total])
    return True
