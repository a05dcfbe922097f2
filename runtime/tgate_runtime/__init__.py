"""Run time: walks a plan over the graphs of a bundle.

``Pipeline`` draws from prompts. One level below, a ``Session`` is an opened bundle, a ``State`` holds the buffers of
images, ``run`` and ``advance`` take their steps. Each is imported when it is asked for, so that a host without pictures
or prompts needs neither Pillow nor tokenizers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tgate_runtime.conditioning import conditioning_of
    from tgate_runtime.generators import noise
    from tgate_runtime.pipeline import Pipeline
    from tgate_runtime.runner import advance, run
    from tgate_runtime.session import Session
    from tgate_runtime.state import State
    from tgate_runtime.text import TextEncoder

__all__ = ["Pipeline", "Session", "State", "TextEncoder", "advance", "conditioning_of", "noise", "run"]

_HOMES = {
    "Pipeline": "pipeline",
    "Session": "session",
    "State": "state",
    "TextEncoder": "text",
    "advance": "runner",
    "conditioning_of": "conditioning",
    "noise": "generators",
    "run": "runner",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"tgate_runtime.{_HOMES[name]}"), name)
