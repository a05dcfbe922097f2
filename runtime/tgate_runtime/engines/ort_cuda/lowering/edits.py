"""What the rewrites ask of a graph, and how they change it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

CONTRIB = "com.microsoft"
"""The domain of ONNX Runtime's own operators."""
TO_LAST, TO_FIRST = (0, 2, 3, 1), (0, 3, 1, 2)
"""Permutations: NCHW to NHWC, and back."""
HALF_OR_SINGLE = (ir.DataType.FLOAT16, ir.DataType.FLOAT)
"""What those operators' kernels take."""


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that makes ``value`` as its first output, if it is of that type."""
    node = None if value is None else value.producer()
    if node is None or node.op_type != op_type or node.domain or node.outputs[0] is not value:
        return None
    return node


def readers(value: ir.Value) -> list[ir.Node]:
    """Who reads ``value``: a node for each time."""
    return [use.node for use in value.uses()]


def used_once(value: ir.Value) -> bool:
    """Whether one node reads it, once, and it is no output of the graph."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def is_weight(value: ir.Value | None, *shape: int) -> bool:
    """Whether ``value`` is an initializer of that shape, or of any where none is given."""
    if value is None or not value.is_initializer() or value.is_graph_input() or value.const_value is None:
        return False
    return not shape or tuple(value.const_value.shape) == shape


def constant(value: ir.Value | None) -> NDArray[Any] | None:
    """The numbers of an initializer that lies in the graph itself."""
    if value is None or not is_weight(value) or isinstance(value.const_value, ir.ExternalTensor):
        return None
    return None if value.const_value is None else value.const_value.numpy()


def sizes(value: ir.Value | None, rank: int) -> list[int | str | None]:
    """The dimensions of a tensor of that rank, one that depends on the batch by a name; empty for all others."""
    if value is None or value.shape is None or len(value.shape) != rank:
        return []
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


def attribute(node: ir.Node, name: str, default: Any) -> Any:
    """The value of an attribute, lists as tuples."""
    found = node.attributes.get(name)
    if found is None:
        return default
    return tuple(found.value) if isinstance(found.value, list | tuple) else found.value


def permutation(node: ir.Node | None) -> tuple[int, ...]:
    """That of a Transpose which has one; empty for all other nodes."""
    return tuple(attribute(node, "perm", ())) if node is not None and node.op_type == "Transpose" else ()


def permuted(shape: Sequence[Any], order: Sequence[int]) -> list[Any]:
    """A shape with its dimensions in that order."""
    return [shape[i] for i in order]


def insert(
    graph: ir.Graph,
    before: ir.Node,
    op_type: str,
    inputs: Sequence[ir.Value | None],
    attributes: Mapping[str, Any],
    *,
    like: ir.Value,
    name: str,
    shape: Sequence[int | str | None],
    domain: str = "",
) -> ir.Value:
    """Insert a node; its one output, called ``like``'s name and ``name``, of ``like``'s dtype."""
    out = ir.Value(name=f"{like.name}.{name}", shape=ir.Shape(shape), type=like.type)
    graph.insert_before(before, ir.node(op_type, inputs, attributes, domain=domain, outputs=[out]))
    return out


def to_last(graph: ir.Graph, before: ir.Node, value: ir.Value, name: str) -> ir.Value:
    """``value`` [N, C, H, W] as [N, H, W, C], for the rewrite called ``name``."""
    shape = permuted(sizes(value, 4), TO_LAST)
    return insert(graph, before, "Transpose", [value], {"perm": TO_LAST}, like=value, name=f"{name}.last", shape=shape)


def put_first(graph: ir.Graph, before: ir.Node, made: ir.Value, result: ir.Value, nodes: Sequence[ir.Node]) -> None:
    """``made`` [N, H, W, C], as NCHW, in place of ``result``, and ``nodes`` taken out."""
    shape = sizes(result, 4)
    first = insert(graph, before, "Transpose", [made], {"perm": TO_FIRST}, like=result, name="first", shape=shape)
    replace(graph, result, first, nodes)


def replace(graph: ir.Graph, old: ir.Value, new: ir.Value, nodes: Sequence[ir.Node]) -> None:
    """``new`` in place of ``old``, wherever that is read, an output of the graph's name kept, and ``nodes``, which
    nobody reads any more, taken out."""
    if old.is_graph_output():
        name, old.name = old.name, f"{old.name}.old"
        new.name, new.shape, new.type = name, old.shape, old.type
        old.replace_all_uses_with(new, replace_graph_outputs=True)
    else:
        old.replace_all_uses_with(new)
    graph.remove(nodes, safe=True)


def number(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """A constant of the graph, one for all who ask by that name with the same numbers."""
    if name not in graph.initializers:
        graph.register_initializer(ir.Value(name=name, const_value=ir.tensor(np.asarray(array), name=name)))
    return graph.initializers[name]
