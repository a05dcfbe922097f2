"""What is fuzzed: every place where bytes of a stranger come in, with files that are sound to begin with.

An entry takes the bytes as if they had come by the usual way, and returns, or raises a
:class:`~tgate_engine.errors.TgateError` of one line. ``assert`` in it: what has to hold of whatever was let through.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

from tests.fuzz.target import Target

MODULES = ("bundles", "requests", "checkpoints")


def targets(module: str) -> Sequence[Target]:
    """Those of a module. Checkpoints' take seconds to import."""
    found: Sequence[Target] = import_module(f"tests.fuzz.{module}").TARGETS
    return found


def every_target() -> list[Target]:
    return [target for module in MODULES for target in targets(module)]


def find_target(name: str) -> Target:
    """The target of that name, looked for in one module after the other."""
    return next(target for module in MODULES for target in targets(module) if target.name == name)
