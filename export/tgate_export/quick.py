"""What PyTorch's exporters do for every graph and nothing here reads, left out: some third of the time of tracing.

The parts of PyTorch that are asked for it are its own affair: where a version has them elsewhere, it does all its work.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

try:
    from torch.fx._lazy_graph_module import _use_lazy_graph_module as lazily
except ImportError:
    lazily = None
try:
    from torch.onnx._internal.exporter._registration import ONNXRegistry as Translations
except ImportError:
    Translations = None

_read: dict[str, Any] = {}


@contextmanager
def quick() -> Iterator[None]:
    """While open, graphs are exported without notes of which line made each node, without Python code for graphs that
    are never run, and with PyTorch's table of translations to ONNX as it was read for the first of them."""
    noted = getattr(torch.fx.config, "do_not_emit_stack_traces", False)
    with ExitStack() as stack:
        if lazily is not None:
            stack.enter_context(lazily(True))
        if hasattr(Translations, "from_torchlib"):
            stack.enter_context(_translations_kept())
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
