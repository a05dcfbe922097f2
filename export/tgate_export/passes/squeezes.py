"""Squeezes of dimensions that are not 1, dropped."""

from __future__ import annotations

import onnx_ir as ir


def drop_vain_squeezes(graph: ir.Graph) -> None:
    """Squeezing a dimension that is not 1 does nothing in PyTorch, and is an error in ONNX: tracing writes it down.

    Only a squeeze of one dimension, of a known size, is dropped.
    """
    for node in list(graph):
        if node.op_type != "Squeeze" or len(node.inputs) != 2:
            continue
        value, axes = node.inputs
        axis = None if axes is None else ir.convenience.get_const_tensor(axes)
        if value is None or value.shape is None or axis is None or axis.size != 1:
            continue
        size = value.shape[int(axis.numpy().reshape(-1)[0])]
        if isinstance(size, int) and size != 1 and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(value)
            graph.remove(node, safe=True)
