"""What the commands share: what one is, and what it says where a library is missing."""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tgate_engine.errors import EngineError

Show = Callable[[], None]
"""Prints a command's results on stdout, once the reporter has let go of the terminal."""

OWN_PACKAGES = ("tgate_engine", "tgate_export", "tgate_runtime", "tgate_cli")
ADVICE = "it is not installed: pip install 'tgate-engine[{}]'"
EXPORT_ADVICE, RUN_ADVICE = ADVICE.format("export"), ADVICE.format("cpu")


@contextlib.contextmanager
def needs(work: str, advice: str) -> Iterator[None]:
    """Turns a library that is not installed into one line that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in OWN_PACKAGES:
            raise
        raise EngineError(f"{work} needs {error.name}; {advice}") from None


def bundle_place(args: argparse.Namespace) -> Path:
    """The directory that BUNDLE names; `mini` is made ready where it names that. Needs what the contract needs."""
    from tgate_runtime.mini import place_of

    return place_of(args.bundle)


def print_json(data: Any) -> None:
    """Prints what ``--json`` asks for."""
    print(json.dumps(data, indent=1, ensure_ascii=False))
