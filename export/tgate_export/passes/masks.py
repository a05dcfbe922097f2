"""Attention masks of one row, widened to a row for every query."""

from __future__ import annotations

import onnx_ir as ir


def widen_masks(graph: ir.Graph) -> None:
    """Give attention masks a row for every query: engines do not repeat one row, though the operator says so.

    A mask [B, heads, 1, keys] becomes [B, heads, queries, keys]. Masks with fewer dimensions stay as they are.
    """
    for node in list(graph):
        if node.op_type != "Attention" or node.domain or len(node.inputs) < 4:
            continue
        query, mask = node.inputs[0], node.inputs[3]
        if query is None or mask is None or query.shape is None or mask.shape is None or len(mask.shape) != 4:
            continue
        length = query.shape[-2]  # of [B, heads, L, width], and of [B, L, heads * width]
        if mask.shape[-2] != 1 or not isinstance(length, int) or length == 1:
            continue
        result = node.outputs[0].name  # names of values are unique, where nodes need none
        rows = ir.Value(name=f"{result}.rows", const_value=ir.tensor([1, 1, length, 1], dtype=ir.DataType.INT64))
        graph.register_initializer(rows)
        expand = ir.Node("", "Expand", [mask, rows])
        wide = expand.outputs[0]
        wide.name, wide.type = f"{result}.mask", mask.type
        wide.shape = ir.Shape([*mask.shape[:2], length, mask.shape[3]])
        graph.insert_before(node, expand)
        node.replace_input_with(3, wide)
