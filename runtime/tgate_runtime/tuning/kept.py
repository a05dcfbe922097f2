"""What was measured, kept in a file, so that a run that was ended goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tgate_engine.atomic import check_place, write_atomically
from tgate_engine.errors import RequestError, shown
from tgate_engine.manifest_json import content_digest
from tgate_engine.plain_files import read_plain
from tgate_engine.reader import parse_json

FORM = 1
"""Of the JSON; another one means something else."""
MOST_BYTES = 64 << 20

Facts = Mapping[str, str | int]
"""What the measurements hold for, by a word for each."""


class Kept:
    """Measurements, in memory and, where there is one, in a file that is replaced at each of them. One thread's."""

    def __init__(self, path: Path | None, of: Facts) -> None:
        """Go on with the file at ``path``, or begin it; None keeps them in memory alone.

        ``of``: what they hold for. Raises :class:`RequestError` in one line for a file that holds no measurements or
        those of something else, and for one that cannot be written.
        """
        self._path, self._of = path, dict(of)
        self._facts: dict[str, Any] = {}
        self._scores: dict[str, dict[str, list[float]]] = {}
        if path is None:
            return
        check_place(path, RequestError)
        if path.exists():
            self._read(path)

    def fact(self, name: str, make: Callable[[], Any]) -> Any:
        """The JSON value of that name; ``make()`` measures it where it is not known yet."""
        if name not in self._facts:
            self._facts[name] = make()
            self._save()
        return self._facts[name]

    def scores(self, metric: str, program: str) -> tuple[float, ...]:
        """Of the first pictures of a plan, by the digest of its program; empty where none is known."""
        return tuple(self._scores.get(metric, {}).get(program, ()))

    def add(self, metric: str, program: str, values: Sequence[float]) -> None:
        """Those of the pictures that come next."""
        self._scores.setdefault(metric, {}).setdefault(program, []).extend(map(float, values))
        self._save()

    def _save(self) -> None:
        if self._path is not None:
            data: dict[str, Any] = {"form": FORM, "of": self._of, "facts": self._facts, "scores": self._scores}
            data["digest"] = content_digest(data)
            write_atomically(self._path, (json.dumps(data, allow_nan=False) + "\n").encode())

    def _read(self, path: Path) -> None:
        none = f"{path} holds no measurements of `tgate tune`"
        try:
            data = parse_json(read_plain(path, MOST_BYTES, RequestError))
        except ValueError as error:
            raise RequestError(f"{none} ({shown(error)}); name another --state") from None
        if not isinstance(data, dict) or data.get("form") != FORM:
            raise RequestError(f"{none} that this version reads; name another --state")
        if data.pop("digest", None) != content_digest(data):
            raise RequestError(f"{path} does not match its own digest; remove it, and measure again")
        if data["of"] != self._of:
            theirs: Facts = data["of"]
            what = next(name for name in {**self._of, **theirs} if theirs.get(name) != self._of.get(name))
            raise RequestError(
                f"{path} holds other measurements, whose {shown(what, 40)} is {shown(theirs.get(what), 40)}, not "
                f"{shown(self._of.get(what), 40)}; name another --state, or remove it"
            )
        self._facts, self._scores = data["facts"], data["scores"]
