"""What PyTorch's exporters do for every graph and nothing here reads, left out: two thirds of the time of tracing.

The parts of PyTorch that are asked for it are its own affair: where a version has them elsewhere, it does all its work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx

try:
    from torch.fx._lazy_graph_module import _use_lazy_graph_module as lazily
except ImportError:
    lazily = None
try:
    from torch.onnx._internal.exporter._registration import ONNXRegistry as Translations
except ImportError:
    Translations = None
try:
    from torch.onnx._internal.exporter import _fx_passes as passes
    from torch.onnx._internal.exporter._decomp import get_onnx_implemented_overloads as translated
except ImportError:
    passes = translated = None
try:
    from torch.onnx._internal.fx.passes import type_promotion as promotion
except ImportError:
    promotion = None

_read: dict[str, Any] = {}


@contextmanager
def quick() -> Iterator[None]:
    """While open, graphs are exported without notes of which line made each node, without Python code for graphs that
    are never run, with PyTorch's table of translations to ONNX as it was read for the first of them, and traced once
    where PyTorch would trace them again: to take apart operators that have no translation, and to see which numbers
    have to be cast."""
    noted = getattr(torch.fx.config, "do_not_emit_stack_traces", False)
    with ExitStack() as stack:
        if lazily is not None:
            stack.enter_context(lazily(True))
        if hasattr(Translations, "from_torchlib"):
            stack.enter_context(_translations_kept())
        if hasattr(passes, "decompose_with_registry"):
            stack.enter_context(_traced_once())
        if hasattr(promotion, "_TypePromotionInterpreter") and hasattr(promotion, "get_type_promotion_rule"):
            stack.enter_context(_results_known())
        torch.fx.config.do_not_emit_stack_traces = True
        try:
            yield
        finally:
            torch.fx.config.do_not_emit_stack_traces = noted


@contextmanager
def _translations_kept() -> Iterator[None]:
    own, read = vars(Translations)["from_torchlib"], Translations.from_torchlib

    def kept(_table: Any, /, **options: Any) -> Any:
        key = repr(options)
        if key not in _read:
            _read[key] = read(**options)
        return _read[key]

    Translations.from_torchlib = classmethod(kept)
    try:
        yield
    finally:
        Translations.from_torchlib = own


@contextmanager
def _traced_once() -> Iterator[None]:
    own = passes.decompose_with_registry

    def take_apart(program: Any, registry: Any) -> Any:
        return program if _rewritten(program.graph_module, set(translated(registry))) else own(program, registry)

    passes.decompose_with_registry = take_apart
    try:
        yield
    finally:
        passes.decompose_with_registry = own


@contextmanager
def _results_known() -> Iterator[None]:
    """Casts are put in by what tracing noted of each result, which the pass that does it would compute again."""
    interpreter = promotion._TypePromotionInterpreter
    own = interpreter.run_node

    def run_node(self: Any, node: fx.Node) -> Any:
        if node.op != "call_function" or "val" not in node.meta:
            return own(self, node)
        rule = promotion.get_type_promotion_rule(node, self.type_promotion_table)
        if rule is not None:
            with self._set_current_node(node):
                self._maybe_promote_node(node, rule)
        return node.meta["val"]

    interpreter.run_node = run_node
    try:
        yield
    finally:
        interpreter.run_node = own


def _rewritten(module: fx.GraphModule, translations: set[Any]) -> bool:
    """Whether every operator of a traced graph has a translation now, once the few that this project's models use
    without one, or with one that ONNX would compute with its shape, are rewritten. Otherwise the graph is as it was:
    also where it changes a tensor in place, or holds graphs of its own."""
    nodes = [node for node in module.graph.nodes if node.op == "call_function" and node.target is not _ASSERTION]
    rewrites = {node: _REWRITES[node.target](node) for node in nodes if node.target in _REWRITES}
    others = (node.target for node in nodes if node not in rewrites)
    if None in rewrites.values() or not all(_translates(target, translations) for target in others):
        return False
    for node, new in rewrites.items():
        assert new is not None
        node.target, node.args, node.kwargs = new
    module.graph.eliminate_dead_code()
    return True


def _translates(target: Any, translations: set[Any]) -> bool:
    return target in translations and not getattr(getattr(target, "_schema", None), "is_mutable", False)


_ASSERTION = torch.ops.aten._assert_tensor_metadata.default
"""Of no use to a graph of fixed dtypes; the exporter drops it."""

Rewrite = tuple[Any, tuple[Any, ...], dict[str, Any]]
"""What a node calls in place of its own target: the operator, its arguments, its keyword arguments."""


def _cast(node: fx.Node) -> Rewrite | None:
    return torch.ops.aten._to_copy.default, (node.args[0],), {"dtype": node.meta["val"].dtype}


def _view(node: fx.Node) -> Rewrite | None:
    """A view whose sizes are numbers, but for the batch; what PyTorch left to be inferred is inferred here."""
    if node.kwargs:  # sizes are read by their place
        return None
    asked = node.args[1] if node.target is not torch.ops.aten.flatten.using_ints else ()
    got = node.meta["val"].shape
    sizes = [
        size if isinstance(size, int) else next(iter(asked[place : place + 1]), -1) for place, size in enumerate(got)
    ]
    return None if sizes.count(-1) > 1 else (torch.ops.aten.view.default, (node.args[0], sizes), {})


def _chunk(node: fx.Node) -> Rewrite | None:
    if node.kwargs:  # a dimension by its name would be taken for the first
        return None
    tensor, _, *axis = node.args
    dim = axis[0] if axis else 0
    size = node.meta["val"][0].shape[dim]
    return (torch.ops.aten.split.Tensor, (tensor, size, dim), {}) if isinstance(size, int) else None


def _moved(node: fx.Node) -> Rewrite | None:
    if node.kwargs:
        return None
    tensor, source, target = node.args
    order = list(range(node.meta["val"].dim()))
    order.insert(target % len(order), order.pop(source % len(order)))
    return torch.ops.aten.permute.default, (tensor, order), {}


def _subtracted(node: fx.Node) -> Rewrite | None:
    if node.kwargs or len(node.args) != 2:  # a factor
        return None
    return torch.ops.aten.sub.Tensor, (node.args[1], node.args[0]), {}


def _detached(node: fx.Node) -> Rewrite | None:
    """In place, but no number changes."""
    return torch.ops.aten.detach.default, node.args, {}


_REWRITES: dict[Any, Callable[[fx.Node], Rewrite | None]] = {
    torch.ops.aten.chunk.default: _chunk,
    torch.ops.aten.detach_.default: _detached,
    torch.ops.aten.flatten.using_ints: _view,
    torch.ops.aten.movedim.int: _moved,
    torch.ops.aten.reshape.default: _view,
    torch.ops.aten.rsub.Scalar: _subtracted,
    torch.ops.aten.to.device: _cast,
    torch.ops.aten.to.dtype: _cast,
    torch.ops.aten.to.dtype_layout: _cast,
    torch.ops.aten.view.default: _view,
}
