"""What the commands share: what one is, and what it says where a library is missing."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tgate_engine.errors import EngineError, shown

Show = Callable[[], None]
"""Prints a command's results on stdout, once the reporter has let go of the terminal."""

LONGEST = 4000
"""Characters of a line: what a library says may be a page."""

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


def print_lines(lines: Iterable[object]) -> None:
    """Prints results for people, a line each: what a terminal would obey is shown."""
    for line in lines:
        print(shown(line, LONGEST))


def print_json(data: Any) -> None:
    """Prints what ``--json`` asks for. Letters stay letters; what a terminal would obey is escaped as JSON has it."""
    text = json.dumps(data, indent=1, ensure_ascii=False)
    print("".join(c if c.isprintable() or c in " \n" else json.dumps(c)[1:-1] for c in text))
