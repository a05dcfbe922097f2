"""Group normalization, with the SiLU after it, as ONNX Runtime's own operator."""

from __future__ import annotations

import onnx_ir as ir

from tgate_runtime.engines.ort_cuda.lowering.edits import (
    CONTRIB,
    HALF_OR_SINGLE,
    TO_LAST,
    attribute,
    insert,
    is_weight,
    permuted,
    put_first,
    readers,
    sizes,
    to_last,
)
from tgate_runtime.engines.ort_cuda.lowering.laid import in_float32

_MOST_CHANNELS = 512  # of one group: more than a block of threads takes


def lower_group_norms(graph: ir.Graph) -> int:
    """Make GroupNormalization, and x * Sigmoid(x) where that alone follows, a GroupNorm between transposes; how many.

    ONNX Runtime has no CUDA kernel for GroupNormalization and takes it apart into some fifteen launches. GroupNorm is
    two. It normalizes [N, H, W, C] of float16 or float32 in groups of an even number of channels, at most 512, by
    statistics, scales and shifts in float32.
    """
    return sum(_lower(graph, node) for node in list(graph) if node.op_type == "GroupNormalization" and not node.domain)


def _lower(graph: ir.Graph, node: ir.Node) -> bool:
    source, scale, shift = node.inputs
    groups = attribute(node, "num_groups", 0)
    shape = sizes(source, 4)
    if source is None or scale is None or shift is None or not shape or not groups:
        return False
    channels = shape[1]
    if source.dtype not in HALF_OR_SINGLE or attribute(node, "stash_type", 1) != ir.DataType.FLOAT.value:
        return False
    if not isinstance(channels, int) or not is_weight(scale, channels) or not is_weight(shift, channels):
        return False
    if channels % groups or (channels // groups) % 2 or channels // groups > _MOST_CHANNELS:
        return False
    result, gone = node.outputs[0], [node]
    if (silu := _silu(result)) is not None:
        gone = [silu[1], silu[0], node]
        result = silu[1].outputs[0]
    attributes = {
        "epsilon": attribute(node, "epsilon", 1e-5),
        "groups": groups,
        "activation": int(silu is not None),
        "channels_last": 1,
    }
    last = to_last(graph, node, source, f"of.{node.outputs[0].name}")
    inputs = [last, in_float32(graph, scale), in_float32(graph, shift)]
    shape = permuted(shape, TO_LAST)
    made = insert(graph, node, "GroupNorm", inputs, attributes, like=result, name="last", shape=shape, domain=CONTRIB)
    put_first(graph, node, made, result, gone)
    return True


def _silu(value: ir.Value) -> tuple[ir.Node, ir.Node] | None:
    """The Sigmoid and the Mul that make x * Sigmoid(x) of ``value``, if nothing else reads it."""
    uses = readers(value)
    if value.is_graph_output() or sorted(node.op_type for node in uses) != ["Mul", "Sigmoid"]:
        return None
    product, sigmoid = sorted(uses, key=lambda node: node.op_type)
    inner = sigmoid.outputs[0]
    if inner.is_graph_output() or readers(inner) != [product]:
        return None
    return sigmoid, product
