"""Convolutions over pictures whose channels lie last, where tensor cores want them."""

from __future__ import annotations

import onnx_ir as ir

from tgate_runtime.engines.ort_cuda.lowering.edits import (
    CONTRIB,
    TO_LAST,
    attribute,
    insert,
    is_weight,
    permuted,
    put_first,
    sizes,
    to_last,
)
from tgate_runtime.engines.ort_cuda.lowering.laid import laid


def lower_convolutions(graph: ir.Graph) -> int:
    """Make each Conv in two dimensions an NhwcConv between transposes; how many.

    Its kernel takes float16, and weights that are an initializer, as [out, height, width, in]: they are laid out so
    when they are uploaded, once for all graphs. Tensor cores work on channels that lie last, and cuDNN would turn
    around what a Conv reads and gives in every step.
    """
    return sum(_lower(graph, node) for node in list(graph) if node.op_type == "Conv" and not node.domain)


def _lower(graph: ir.Graph, node: ir.Node) -> bool:
    source, weight, *bias = node.inputs
    shape, result = sizes(source, 4), node.outputs[0]
    if source is None or weight is None or not shape or not sizes(result, 4) or source.dtype != ir.DataType.FLOAT16:
        return False
    if not is_weight(weight) or weight.const_value is None or len(weight.const_value.shape) != 4:
        return False
    if any(each is not None and not is_weight(each) for each in bias):
        return False
    kernel = weight.const_value.shape.numpy()[2:]
    if attribute(node, "group", 1) != 1 or attribute(node, "auto_pad", "NOTSET") != "NOTSET":
        return False
    attributes = {
        "kernel_shape": kernel,
        "strides": attribute(node, "strides", (1, 1)),
        "pads": attribute(node, "pads", (0, 0, 0, 0)),
        "dilations": attribute(node, "dilations", (1, 1)),
        "group": 1,
    }
    inputs = [to_last(graph, node, source, f"of.{result.name}"), laid(graph, weight, TO_LAST), *bias]
    last = permuted(sizes(result, 4), TO_LAST)
    made = insert(graph, node, "NhwcConv", inputs, attributes, like=result, name="last", shape=last, domain=CONTRIB)
    put_first(graph, node, made, result, [node])
    return True
