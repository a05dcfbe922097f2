"""Attention over heads that are split and merged around it, given the merged tensors."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True, kw_only=True)
class _Merged:
    """What an operand of attention was before its heads were split: [B, length, heads * width]."""

    value: ir.Value
    heads: int
    width: int
    length: int


def merge_heads(graph: ir.Graph) -> None:
    """Give attention its queries, keys and values as [B, L, heads * width]: engines that split the heads themselves
    need no kernel for it, where PyTorch's [B, heads, L, width] takes a transposition for each of them.

    Only where nothing happens between the split and the attention, nor between the attention and the merge.
    """
    for node in list(graph):
        if node.op_type != "Attention" or node.domain or len(node.outputs) != 1:
            continue
        operands = [whole for whole in map(_before_split, node.inputs[:3]) if whole is not None]
        transpose = _only_use(node, "Transpose")
        merge = _only_use(transpose, "Reshape")
        if len(operands) < 3 or transpose is None or merge is None or merge.outputs[0].is_graph_output():
            continue
        query, key, value = operands
        if not _merges(merge, query.length, query.heads * value.width):
            continue
        for place, whole in enumerate(operands):
            node.replace_input_with(place, whole.value)
        for name, whole in (("q_num_heads", query), ("kv_num_heads", key)):
            node.attributes[name] = ir.AttrInt64(name, whole.heads)
        node.outputs[0].shape = merge.outputs[0].shape
        merge.outputs[0].replace_all_uses_with(node.outputs[0])
        graph.remove([merge, transpose], safe=True)


def _before_split(value: ir.Value | None) -> _Merged | None:
    """Where ``value`` [B, heads, L, width] is a tensor [B, L, heads * width], reshaped and transposed: that tensor."""
    transpose = None if value is None else value.producer()
    if transpose is None or not _swaps_heads(transpose) or transpose.inputs[0] is None:
        return None
    split = transpose.inputs[0].producer()
    if split is None or split.op_type != "Reshape" or split.inputs[0] is None:
        return None
    whole, parts = split.inputs[0].shape, split.outputs[0].shape
    if whole is None or parts is None or len(whole) != 3 or len(parts) != 4:
        return None
    length, heads, width = parts[1:]
    if not isinstance(length, int) or not isinstance(heads, int) or not isinstance(width, int):
        return None
    same = tuple(whole[1:]) == (length, heads * width)
    return _Merged(value=split.inputs[0], heads=heads, width=width, length=length) if same else None


def _merges(reshape: ir.Node, length: int, size: int) -> bool:
    """Whether its result is [B, length, size]; a reshape leaves no other B."""
    shape = reshape.outputs[0].shape
    return shape is not None and len(shape) == 3 and tuple(shape[1:]) == (length, size)


def _only_use(node: ir.Node | None, op_type: str) -> ir.Node | None:
    """The one node that reads the first output of ``node``, if it is of that type, and nothing else reads it."""
    uses = [] if node is None else [use.node for use in node.outputs[0].uses()]
    if node is None or node.outputs[0].is_graph_output() or len(uses) != 1 or uses[0].op_type != op_type:
        return None
    return uses[0] if op_type != "Transpose" or _swaps_heads(uses[0]) else None


def _swaps_heads(node: ir.Node) -> bool:
    permutation = node.attributes.get("perm") if node.op_type == "Transpose" else None
    return permutation is not None and tuple(permutation.as_ints()) == (0, 2, 1, 3)
