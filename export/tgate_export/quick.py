"""What PyTorch's exporters do for every graph and nothing here reads, left out: three quarters of the time of tracing.

The parts of PyTorch that are asked for it are its own affair: where a version has them elsewhere, it does all its work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import fx

from tgate_engine.garbage import uncollected
from tgate_export.translatable import rewritten

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
try:
    from torch.fx.experimental import proxy_tensor as recorder
    from torch.fx.experimental import symbolic_shapes as symbols
except ImportError:
    recorder = symbols = None
try:
    from onnx_ir import schemas
except ImportError:
    schemas = None  # type: ignore[assignment]
try:
    from torch._dynamo import config as results
except ImportError:
    results = None

_read: dict[Any, Any] = {}


@contextmanager
def quick(*, symbolic: bool = False) -> Iterator[None]:
    """While open, graphs are exported

    - without notes of which line made each node, and of strides that each node's value tells as well;
    - without Python code for graphs that are never run;
    - with PyTorch's table of translations to ONNX, and every operator's signature, as first read;
    - traced once where PyTorch would trace them again: to take apart operators that have no translation, and to see
      which numbers have to be cast;
    - without a search for unknown sizes where there are none, or, where a size is a symbol (``symbolic``), with no
      results kept, which are found again for few operators and cost as much as they save for the others;
    - without a search for garbage among millions of new objects, of which most stay until the graph is done.
    """
    with ExitStack() as stack:
        stack.enter_context(_replaced(torch.fx.config, "do_not_emit_stack_traces", True))
        if lazily is not None:
            stack.enter_context(lazily(True))
        if hasattr(recorder, "_extract_tensor_metadata"):
            stack.enter_context(_replaced(recorder, "_extract_tensor_metadata", lambda *_values, **_options: None))
        if hasattr(symbols, "_free_unbacked_symbols_with_path"):
            stack.enter_context(_nothing_sought())
        if symbolic and hasattr(results, "fake_tensor_cache_enabled"):
            stack.enter_context(_replaced(results, "fake_tensor_cache_enabled", False))
        if hasattr(Translations, "from_torchlib"):
            stack.enter_context(_kept(Translations, "from_torchlib", lambda **options: repr(options)))
        if hasattr(getattr(schemas, "OpSignature", None), "from_op_schema"):
            stack.enter_context(_kept(schemas.OpSignature, "from_op_schema", _operator))
        if hasattr(passes, "decompose_with_registry"):
            stack.enter_context(_traced_once())
        if hasattr(promotion, "_TypePromotionInterpreter") and hasattr(promotion, "get_type_promotion_rule"):
            stack.enter_context(_results_known())
        stack.enter_context(uncollected())
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    own = vars(owner)[name] if name in vars(owner) else getattr(owner, name, False)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, own)


def _kept(owner: Any, name: str, key: Any) -> Any:
    """A class method that gives for equal arguments, told by their key, what it gave at first."""
    own = getattr(owner, name)

    def kept(_class: Any, /, *values: Any, **options: Any) -> Any:
        place = (owner, name, key(*values, **options))
        if place not in _read:
            _read[place] = own(*values, **options)
        return _read[place]

    return _replaced(owner, name, classmethod(kept))


def _operator(schema: Any) -> tuple[str, str, int]:
    return schema.domain, schema.name, schema.since_version


def _nothing_sought() -> Any:
    own = symbols._free_unbacked_symbols_with_path

    def found(value: Any, path: Any, *values: Any, **options: Any) -> Any:
        return {} if options.get("pending") == set() else own(value, path, *values, **options)

    return _replaced(symbols, "_free_unbacked_symbols_with_path", found)


def _traced_once() -> Any:
    own = passes.decompose_with_registry

    def take_apart(program: Any, registry: Any) -> Any:
        return program if rewritten(program.graph_module, set(translated(registry))) else own(program, registry)

    return _replaced(passes, "decompose_with_registry", take_apart)


def _results_known() -> Any:
    """Casts are put in by what tracing noted of each result, which the pass that does it would compute again."""
    own = promotion._TypePromotionInterpreter.run_node

    def run_node(self: Any, node: fx.Node) -> Any:
        if node.op != "call_function" or "val" not in node.meta:
            return own(self, node)
        rule = promotion.get_type_promotion_rule(node, self.type_promotion_table)
        if rule is not None:
            with self._set_current_node(node):
                self._maybe_promote_node(node, rule)
        return node.meta["val"]

    return _replaced(promotion._TypePromotionInterpreter, "run_node", run_node)
