"""Operators that have no translation to ONNX, written with such as have one.

PyTorch takes them apart by tracing the whole graph again, which takes longer than tracing it at first.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import fx

aten = torch.ops.aten


class Call(NamedTuple):
    """What a node calls in place of its own target: the operator, its arguments, some of which may be calls
    themselves, its keyword arguments."""

    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def rewritten(module: fx.GraphModule, translations: set[Any]) -> bool:
    """Whether every operator of a traced graph has a translation now, once the few that this project's models use
    without one, or with one that ONNX would compute with its shape, are rewritten. Otherwise the graph is as it was:
    also where it changes in place a tensor that anything else reads, or holds graphs of its own."""
    nodes = [node for node in module.graph.nodes if node.op == "call_function" and node.target is not _ASSERTION]
    rewrites = {node: _REWRITES[node.target](node) for node in nodes if node.target in _REWRITES}
    others = (node.target for node in nodes if node not in rewrites and not _is_taken_apart(node))
    if None in rewrites.values() or not all(_translates(target, translations) for target in others):
        return False
    for node, call in rewrites.items():
        assert call is not None
        with module.graph.inserting_before(node):
            node.target, node.args, node.kwargs = _with_nodes(call)
    module.graph.eliminate_dead_code()
    return True


def _translates(target: Any, translations: set[Any]) -> bool:
    return target in translations and not getattr(getattr(target, "_schema", None), "is_mutable", False)


def _with_nodes(call: Call) -> Call:
    """The call with a node of its own for each argument that is a call."""
    return call._replace(args=tuple(_node(item) if isinstance(item, Call) else item for item in call.args))


def _node(call: Call) -> fx.Node:
    target, args, kwargs = _with_nodes(call)
    source = next(item for item in args if isinstance(item, fx.Node))
    node = source.graph.call_function(target, args, kwargs)
    values = [item.meta["val"] if isinstance(item, fx.Node) else item for item in args]
    with source.meta["val"].fake_mode:
        node.meta["val"] = target(*values, **kwargs)
    return node


_ASSERTION = aten._assert_tensor_metadata.default
"""Of no use to a graph of fixed dtypes; the exporter drops it."""


def _cast(node: fx.Node) -> Call | None:
    return Call(aten._to_copy.default, (node.args[0],), {"dtype": node.meta["val"].dtype})


def _view(node: fx.Node) -> Call | None:
    """A view whose sizes are numbers, but for the batch; what PyTorch left to be inferred is inferred here."""
    if node.kwargs:  # sizes are read by their place
        return None
    asked = node.args[1] if node.target is not aten.flatten.using_ints else ()
    got = node.meta["val"].shape
    sizes = [
        size if isinstance(size, int) else next(iter(asked[place : place + 1]), -1) for place, size in enumerate(got)
    ]
    return None if sizes.count(-1) > 1 else Call(aten.view.default, (node.args[0], sizes), {})


def _chunk(node: fx.Node) -> Call | None:
    if node.kwargs:  # a dimension by its name would be taken for the first
        return None
    tensor, _, *axis = node.args
    dim = axis[0] if axis else 0
    size = node.meta["val"][0].shape[dim]
    return Call(aten.split.Tensor, (tensor, size, dim), {}) if isinstance(size, int) else None


def _moved(node: fx.Node) -> Call | None:
    if node.kwargs:
        return None
    tensor, source, target = node.args
    order = list(range(node.meta["val"].dim()))
    order.insert(target % len(order), order.pop(source % len(order)))
    return Call(aten.permute.default, (tensor, order), {})


def _subtracted(node: fx.Node) -> Call | None:
    if node.kwargs or len(node.args) != 2:  # a factor
        return None
    return Call(aten.sub.Tensor, (node.args[1], node.args[0]), {})


def _detached(node: fx.Node) -> Call | None:
    """In place, but no number changes."""
    return Call(aten.detach.default, node.args, {})


def _outer(node: fx.Node) -> Call | None:
    """Each of the first vector times the second."""
    rows, columns = node.args
    return Call(aten.mul.Tensor, (Call(aten.unsqueeze.default, (rows, 1), {}), columns), {})


def _is_taken_apart(node: fx.Node) -> bool:
    """A grid, of which nothing is left where each of its parts is made by itself (:func:`_part`)."""
    return node.target is aten.meshgrid.indexing


def _part(node: fx.Node) -> Call | None:
    """One of a grid's two tensors is a vector repeated; parts of anything else stay what they are."""
    source, place = node.args
    if not isinstance(source, fx.Node) or source.target is not aten.meshgrid.indexing:
        return Call(node.target, node.args, node.kwargs)
    vectors, sizes = source.args[0], list(node.meta["val"].shape)
    if len(sizes) != 2 or not all(isinstance(size, int) for size in sizes):
        return None
    vector = vectors[place]
    if vector.meta["val"].dim() != 1:  # a number
        return None
    along = place if source.kwargs["indexing"] == "ij" else 1 - place
    return Call(aten.expand.default, (Call(aten.unsqueeze.default, (vector, 1 - along), {}), sizes), {})


def _sorted(node: fx.Node) -> Call | None:
    """The largest, or smallest, of as many as there are."""
    if node.kwargs:
        return None
    tensor, dim, largest = node.args[0], -1, False
    if len(node.args) > 1:
        dim = node.args[1]
    if len(node.args) > 2:
        largest = node.args[2]
    size = node.meta["val"][0].shape[dim]
    return Call(aten.topk.default, (tensor, size, dim, largest), {}) if isinstance(size, int) else None


def _out_of_place(operation: Any) -> Callable[[fx.Node], Call | None]:
    """An operation in place is the same out of place where what it changes is new and nothing else reads it."""

    def rewrite(node: fx.Node) -> Call | None:
        changed, *others = node.args
        if node.kwargs or len(others) != 1 or not isinstance(changed, fx.Node):
            return None
        values = [item.meta["val"] if isinstance(item, fx.Node) else item for item in node.args]
        alone = len(changed.users) == 1 and _is_new(changed)
        return Call(operation, node.args, {}) if alone and torch.result_type(*values) == values[0].dtype else None

    return rewrite


def _is_new(node: fx.Node) -> bool:
    """Whether a node's result is memory of its own. What PyTorch takes apart by itself may give an argument back."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return False
    made_of_others = node.target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd)
    return not made_of_others and all(result.alias_info is None for result in node.target._schema.returns)


def _same(operation: Any) -> Callable[[fx.Node], Call | None]:
    """The operation of another name, or that Python's own operator stands for."""
    return lambda node: Call(operation, node.args, node.kwargs)


_REWRITES: dict[Any, Callable[[fx.Node], Call | None]] = {
    operator.getitem: _part,
    aten.__and__.Tensor: _same(aten.bitwise_and.Tensor),
    aten.add_.Tensor: _out_of_place(aten.add.Tensor),
    aten.chunk.default: _chunk,
    aten.detach_.default: _detached,
    aten.div_.Tensor: _out_of_place(aten.div.Tensor),
    aten.flatten.using_ints: _view,
    aten.min.other: _same(aten.minimum.default),
    aten.movedim.int: _moved,
    aten.outer.default: _outer,
    aten.reshape.default: _view,
    aten.rsub.Scalar: _subtracted,
    aten.sort.default: _sorted,
    aten.to.device: _cast,
    aten.to.dtype: _cast,
    aten.to.dtype_layout: _cast,
    aten.view.default: _view,
}
