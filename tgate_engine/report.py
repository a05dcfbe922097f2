"""What long work tells whoever waits for it."""

from __future__ import annotations

import sys
from typing import Protocol, TextIO

from tgate_engine.errors import shown

_LONGEST = 1000
"""Characters of a warning: texts of strangers are quoted in some."""


class Reporter(Protocol):
    """Hears what a long piece of work is doing. Not thread-safe. All texts are single lines."""

    def stage(self, text: str) -> None:
        """The next part of the work begins: ``tracing the graphs``."""

    def progress(self, done: int, total: int, text: str = "") -> None:
        """``done`` of ``total`` pieces of this stage are finished; ``text`` names the last one, or the one at work."""

    def note(self, text: str) -> None:
        """A fact worth keeping on the screen."""

    def warn(self, text: str) -> None:
        """Something the user should know of, shown even with ``--quiet``."""


class Silent:
    """``--quiet``: warnings only, of ``program``."""

    def __init__(self, stream: TextIO | None = None, *, program: str = "tgate") -> None:
        self._stream = stream or sys.stderr
        self._program = program

    def stage(self, text: str) -> None:
        """Says nothing."""

    def progress(self, done: int, total: int, text: str = "") -> None:
        """Says nothing."""

    def note(self, text: str) -> None:
        """Says nothing."""

    def warn(self, text: str) -> None:
        self._stream.write(f"{self._program}: warning: {shown(text, _LONGEST)}\n")
        self._stream.flush()
