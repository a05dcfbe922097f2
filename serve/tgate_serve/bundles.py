"""The bundles that a server is asked for, by the names that they are served under."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tgate_engine.errors import RequestError, shown


def places_asked(asked: Sequence[str]) -> dict[str, str]:
    """Directories, or ``mini``, by name: of NAME=DIRECTORY, or of a directory, whose own name is taken. None of them is
    looked into. Raises :class:`RequestError` for a name that is none, or that two would have."""
    places: dict[str, str] = {}
    for text in asked:
        name, _, directory = ("", "", text) if Path(text).is_dir() else text.rpartition("=")
        if not directory or text.startswith("="):
            raise RequestError(f"a bundle is a directory, or NAME=DIRECTORY, got '{shown(text)}'")
        name = name or Path(text).name or Path(text).resolve().name
        if not name.isprintable() or "/" in name:
            raise RequestError(f"a model's name is printable and without /, got '{shown(name)}'")
        if name in places:
            raise RequestError(f"two bundles would be called '{shown(name)}'; give one a name: NAME=DIRECTORY")
        places[name] = directory
    return places
