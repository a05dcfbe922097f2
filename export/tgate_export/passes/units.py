"""Multiplications by one, dropped."""

from __future__ import annotations

import onnx_ir as ir


def drop_units(graph: ir.Graph) -> None:
    """Multiplying or dividing by the constant 1 is the identity; diffusers does so after every attention.

    The one must be the second operand, and a scalar: one of shape [1] could give its result a dimension more.
    """
    for node in list(graph):
        if node.op_type not in ("Mul", "Div") or len(node.inputs) != 2:
            continue
        value, unit = node.inputs
        constant = None if unit is None else ir.convenience.get_const_tensor(unit)
        if value is None or constant is None or constant.size != 1 or len(constant.shape) > 0:
            continue
        if float(constant.numpy()) == 1.0 and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(value)
            graph.remove(node, safe=True)
