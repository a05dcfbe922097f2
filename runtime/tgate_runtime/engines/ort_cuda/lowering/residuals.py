"""Residual sums, with the bias before and the layer normalization after them, as one operator."""

from __future__ import annotations

import onnx_ir as ir

from tgate_runtime.engines.ort_cuda.lowering.edits import (
    CONTRIB,
    HALF_OR_SINGLE,
    attribute,
    is_weight,
    producer,
    replace,
    sizes,
    used_once,
)


def lower_residuals(graph: ir.Graph) -> int:
    """Make LayerNormalization(x + skip), or of (x + bias) + skip, a SkipLayerNormalization; how many.

    One launch in place of two or three. The sum, where it is read again, is the operator's fourth output.
    """
    norms = [node for node in graph if node.op_type == "LayerNormalization" and not node.domain]
    return sum(_lower(graph, norm) for norm in norms)


def _lower(graph: ir.Graph, norm: ir.Node) -> bool:
    total = producer(norm.inputs[0], "Add")
    if total is None:
        return False
    result, shape = total.outputs[0], sizes(total.outputs[0], 3)
    if not shape or not isinstance(shape[2], int) or result.is_graph_output() or result.dtype not in HALF_OR_SINGLE:
        return False
    channels, scale, *shift = shape[2], *norm.inputs[1:3]
    if attribute(norm, "axis", -1) not in (-1, 2) or attribute(norm, "stash_type", 1) != ir.DataType.FLOAT.value:
        return False
    if any(value.uses() or value.is_graph_output() for value in norm.outputs[1:]):
        return False
    if not is_weight(scale, channels) or not all(each is None or is_weight(each, channels) for each in shift):
        return False
    if any(sizes(value, 3) != shape for value in total.inputs):
        return False
    value, skip = total.inputs
    gone = [norm, total]
    bias = None
    for one, other in ((value, skip), (skip, value)):
        before = producer(one, "Add")
        if before is None or one is None or not used_once(one):
            continue
        pair = next((p for p in (before.inputs, before.inputs[::-1]) if is_weight(p[1], channels)), None)
        if pair is not None and sizes(pair[0], 3) == shape:
            value, bias, skip = pair[0], pair[1], other
            gone.append(before)
            break
    again = len(result.uses()) > 1
    outputs = [ir.Value(name=f"{norm.outputs[0].name}.skipped", shape=norm.outputs[0].shape, type=result.type)]
    if again:
        outputs += [ir.Value(name="") for _ in range(2)]
        outputs.append(ir.Value(name=f"{result.name}.sum", shape=result.shape, type=result.type))
    inputs = [value, skip, scale, *(shift or [None]), bias]
    made = ir.node(
        "SkipLayerNormalization",
        inputs,
        {"epsilon": attribute(norm, "epsilon", 1e-5)},
        domain=CONTRIB,
        outputs=outputs,
    )
    graph.insert_before(total, made)
    if again:
        replace(graph, result, outputs[3], [])
    replace(graph, norm.outputs[0], outputs[0], gone)
    return True
