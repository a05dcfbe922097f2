"""Attention as the operator whose kernel knows cuDNN's."""

from __future__ import annotations

import onnx_ir as ir

from tgate_runtime.engines.ort_cuda.lowering.edits import CONTRIB, attribute, insert, replace, sizes


def lower_attentions(graph: ir.Graph) -> int:
    """Make an Attention in 16 bits, of tensors [N, S, heads * D] and without a mask, a MultiHeadAttention; how many.

    Both compute the same. On Hopper and later ONNX Runtime takes cuDNN's kernel for the second, where it has
    FlashAttention 2 alone for the first; elsewhere they run the same kernel.
    """
    nodes = [node for node in graph if node.op_type == "Attention" and not node.domain]
    return sum(_lower(graph, node) for node in nodes)


def _lower(graph: ir.Graph, node: ir.Node) -> bool:
    result = node.outputs[0]
    if len(node.inputs) < 3 or any(value is not None for value in node.inputs[3:]) or len(node.outputs) > 1:
        return False
    if result.dtype != ir.DataType.FLOAT16 or any(len(sizes(value, 3)) != 3 for value in node.inputs[:3]):
        return False
    heads = attribute(node, "q_num_heads", 0)
    if not heads or attribute(node, "kv_num_heads", heads) != heads:
        return False
    if (
        attribute(node, "softcap", 0.0)
        or attribute(node, "qk_matmul_output_mode", 0)
        or attribute(node, "is_causal", 0)
    ):
        return False
    scale = attribute(node, "scale", None)
    own = {"num_heads": heads} | ({"scale": scale} if scale is not None else {})
    shape = [*sizes(node.inputs[0], 3)[:2], sizes(node.inputs[2], 3)[2]]
    made = insert(
        graph, node, "MultiHeadAttention", node.inputs[:3], own, like=result, name="heads", shape=shape, domain=CONTRIB
    )
    replace(graph, result, made, [node])
    return True
