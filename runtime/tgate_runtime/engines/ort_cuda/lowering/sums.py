"""Residual sums that no normalization follows, with the bias before them, as one operator."""

from __future__ import annotations

import onnx_ir as ir

from tgate_runtime.engines.ort_cuda.lowering.edits import (
    CONTRIB,
    HALF_OR_SINGLE,
    insert,
    is_weight,
    producer,
    replace,
    sizes,
    used_once,
)

CHANNELS = (320, 640, 1280)
"""What the kernel is compiled for."""


def lower_sums(graph: ir.Graph) -> int:
    """Make (x + bias) + skip, of a product x [N, S, channels], a BiasAdd; how many.

    One launch in place of two, and the product that ONNX Runtime would otherwise write the bias for, and read it back,
    is one without.
    """
    return sum(_lower(graph, node) for node in list(graph) if node.op_type == "Add" and not node.domain)


def _lower(graph: ir.Graph, total: ir.Node) -> bool:
    result, shape = total.outputs[0], sizes(total.outputs[0], 3)
    if not shape or shape[2] not in CHANNELS or result.dtype not in HALF_OR_SINGLE:
        return False
    for biased, skip in (total.inputs, total.inputs[::-1]):
        inner = producer(biased, "Add")
        if inner is None or biased is None or not used_once(biased) or sizes(skip, 3) != shape:
            continue
        for x, bias in (inner.inputs, inner.inputs[::-1]):
            if is_weight(bias, int(shape[2])) and producer(x, "MatMul") is not None and sizes(x, 3) == shape:
                inputs = [x, bias, skip]
                made = insert(graph, total, "BiasAdd", inputs, {}, like=result, name="sum", shape=shape, domain=CONTRIB)
                replace(graph, result, made, [total, inner])
                return True
    return False
