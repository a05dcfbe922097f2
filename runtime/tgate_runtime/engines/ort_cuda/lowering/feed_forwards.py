"""Gated feed-forward layers: what follows their first product, as one operator."""

from __future__ import annotations

import onnx_ir as ir

from tgate_runtime.engines.ort_cuda.lowering.edits import (
    CONTRIB,
    HALF_OR_SINGLE,
    attribute,
    constant,
    insert,
    is_weight,
    producer,
    replace,
    sizes,
    used_once,
)

CHANNELS = (2560, 5120, 6144, 10240, 12288)
"""What the kernel is compiled for: the widths of both halves together, in SD, SDXL and their like."""


def lower_feed_forwards(graph: ir.Graph) -> int:
    """Make left * Gelu(right), of the halves of x + bias, a BiasSplitGelu; how many.

    One launch in place of four. Its Gelu is the exact one, x is [N, S, channels], and it knows :data:`CHANNELS` alone.
    """
    return sum(_lower(graph, node) for node in list(graph) if node.op_type == "Mul" and not node.domain)


def _lower(graph: ir.Graph, product: ir.Node) -> bool:
    for gate, left in (product.inputs, product.inputs[::-1]):
        gelu = producer(gate, "Gelu")
        if gelu is not None and left is not None and _of_halves(graph, product, gelu, left):
            return True
    return False


def _of_halves(graph: ir.Graph, product: ir.Node, gelu: ir.Node, left: ir.Value) -> bool:
    split = producer(left, "Split")
    if split is None or len(split.outputs) != 2 or gelu.inputs[0] is not split.outputs[1]:
        return False
    if attribute(gelu, "approximate", "none") != "none" or not used_once(gelu.outputs[0]):
        return False
    whole, shape = split.inputs[0], sizes(split.inputs[0], 3)
    if not shape or shape[2] not in CHANNELS or attribute(split, "axis", 0) not in (2, -1):
        return False
    channels = int(shape[2])
    if not _even(split, channels):
        return False
    if not all(map(used_once, split.outputs)) or whole is None or not used_once(whole):
        return False
    total = producer(whole, "Add")
    if total is None or whole.dtype not in HALF_OR_SINGLE:
        return False
    for value, bias in (total.inputs, total.inputs[::-1]):
        if value is not None and is_weight(bias, channels) and sizes(value, 3) == shape:
            like, half = product.outputs[0], [*shape[:2], channels // 2]
            inputs = [value, bias]
            made = insert(
                graph, product, "BiasSplitGelu", inputs, {}, like=like, name="gated", shape=half, domain=CONTRIB
            )
            replace(graph, like, made, [product, gelu, split, total])
            return True
    return False


def _even(split: ir.Node, channels: int) -> bool:
    """Whether both halves are as wide."""
    if len(split.inputs) < 2 or split.inputs[1] is None:
        return True  # an even number in two parts
    parts = constant(split.inputs[1])
    return parts is not None and parts.tolist() == [channels // 2] * 2
