"""Every value of a JSON file, put to every other type and to the usual bad numbers."""

from __future__ import annotations

import contextlib
import json
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_BEYOND = "@@1e400@@"
BAD: dict[str, Any] = {
    "text": "text",
    "list": [],
    "object": {},
    "null": None,
    "true": True,
    "-1": -1,
    "0": 0,
    "0.5": 0.5,
    "1e400": _BEYOND,
    "2^63": 2**63,
    "10^7": 10**7,
}
"""What is put in a value's place, by the name of a case."""

SECONDS = 10
MEMORY = 3 << 30
"""What one case may take, in bytes over what the process has."""

Leaf = tuple[str | int, ...]


def leaves(value: Any, path: Leaf = ()) -> Iterator[Leaf]:
    """The places of a document: itself, and every value in it."""
    yield path
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from leaves(inner, (*path, key))


def changed(document: Any, path: Leaf, bad: str) -> str:
    """The text of a document with one value replaced."""
    if not path:
        return _text(BAD[bad])
    copy: Any = json.loads(json.dumps(document))
    place = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = BAD[bad]
    return _text(copy)


def _text(document: Any) -> str:
    return json.dumps(document).replace(f'"{_BEYOND}"', "1e400")


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """While open, more than :data:`SECONDS` or :data:`MEMORY` is an error that nobody takes for a refusal."""

    def late(*_: object) -> None:
        raise _TooMuch(f"more than {SECONDS} seconds")

    held = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()
    limits, handler = resource.getrlimit(resource.RLIMIT_AS), signal.signal(signal.SIGALRM, late)
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, limits[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, limits)


class _TooMuch(BaseException):
    """No Exception, so that nothing turns it into one line."""
