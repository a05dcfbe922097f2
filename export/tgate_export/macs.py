"""Multiply-accumulates, counted from the exported graph itself.

Two counts, as in the method's tables: the paper's tool counts linear and convolution layers; the true total adds
the two attention products QK^T and AV. Norms, activations and additions are in neither.
"""

from __future__ import annotations

import math

import onnx_ir as ir

from tgate_engine.errors import ExportError
from tgate_engine.graph import Macs
from tgate_export.graphs import size_for_one


def count(model: ir.Model, weights: frozenset[str], images: int) -> Macs:
    """Multiply-accumulates for one image.

    ``weights``: names of the weight initializers, which tell a layer's product from an attention product.
    ``images``: the fixed batch of the graph, or 1 where it is symbolic.
    """
    layers = products = 0
    for node in model.graph:
        if node.op_type in ("MatMul", "Gemm"):
            macs = _product(node)
            if any(value is not None and value.name in weights for value in node.inputs[:2]):
                layers += macs
            else:
                products += macs
        elif node.op_type == "Conv":
            layers += _convolution(node)
        elif node.op_type == "Attention":
            products += _attention(node)
    return Macs(paper=layers // images, all=(layers + products) // images)


def _product(node: ir.Node) -> int:
    inner = _shape(node, node.inputs[0])[-1]
    if node.op_type == "Gemm" and _transposed(node):
        inner = _shape(node, node.inputs[0])[0]
    return inner * math.prod(_shape(node, node.outputs[0]))


def _transposed(node: ir.Node) -> bool:
    attribute = node.attributes.get("transA")
    return attribute is not None and bool(attribute.as_int())


def _convolution(node: ir.Node) -> int:
    kernel = _shape(node, node.inputs[1])  # [out channels, in channels / groups, *kernel]
    return math.prod(kernel[1:]) * math.prod(_shape(node, node.outputs[0]))


def _attention(node: ir.Node) -> int:
    """QK^T and AV: heads lie beside the batch [B, heads, L, width], or in the width [B, L, heads * width]."""
    query, key, value = (_shape(node, v) for v in node.inputs[:3])
    return math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _shape(node: ir.Node, value: ir.Value | None) -> tuple[int, ...]:
    if value is None or value.shape is None:
        name = None if value is None else value.name
        raise ExportError(f"{node.op_type} {node.name!r}: the shape of {name!r} is not known, so it cannot be counted")
    return tuple(size_for_one(dim) for dim in value.shape)
