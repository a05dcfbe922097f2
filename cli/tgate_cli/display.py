"""What a command shows its user while it works: on stderr, so that stdout holds results alone."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any, TextIO

from tgate_cli.command import LONGEST
from tgate_engine.errors import shown
from tgate_engine.report import Reporter, Silent


class Lines:
    """For a log or a pipe: one plain line for each stage and note, and progress at most every few seconds."""

    def __init__(self, stream: TextIO | None = None, *, program: str = "tgate", interval_s: float = 5.0) -> None:
        self._stream = stream or sys.stderr
        self._program = program
        self._interval_s = interval_s
        self._last_s = time.monotonic()

    def stage(self, text: str) -> None:
        self._last_s = time.monotonic()
        _line(self._stream, text)

    def progress(self, done: int, total: int, text: str = "") -> None:
        now = time.monotonic()
        if now - self._last_s >= self._interval_s:
            self._last_s = now
            _line(self._stream, f"  {done}/{total} {text}".rstrip())

    def note(self, text: str) -> None:
        _line(self._stream, text)

    def warn(self, text: str) -> None:
        _line(self._stream, f"{self._program}: warning: {text}")


class Display:
    """For a person at a terminal: a live line with the stage, a bar, what is at work and the time, drawn by rich."""

    def __init__(self, bar: Any, *, program: str = "tgate") -> None:
        self._bar = bar
        self._program = program
        self._task: Any = None

    def stage(self, text: str) -> None:
        self._bar.start()  # not before: a command without stages leaves the terminal alone
        self._finish()
        self._task = self._bar.add_task(_escaped(text), total=None, count="")

    def progress(self, done: int, total: int, text: str = "") -> None:
        if self._task is None:
            self.stage(text)
        self._bar.update(self._task, completed=done, total=total, count=_escaped(f"{done}/{total} {text}".rstrip()))

    def note(self, text: str) -> None:
        self._bar.console.print(_escaped(text), highlight=False)

    def warn(self, text: str) -> None:
        self._bar.console.print(f"[yellow]{self._program}: warning:[/] {_escaped(text)}", highlight=False)

    def _finish(self) -> None:
        if self._task is not None:
            total = self._bar.tasks[-1].total or 1
            self._bar.update(self._task, completed=total, total=total)


@contextlib.contextmanager
def reporter(program: str = "tgate", *, quiet: bool = False) -> Iterator[Reporter]:
    """The reporter that suits stderr: silent, live (a terminal, with rich installed) or plain lines. ``program`` is who
    warns.

    Print nothing on stdout before it is closed: a live display owns the terminal until then.
    """
    if quiet:
        yield Silent(program=program)
        return
    bar = _bar() if sys.stderr.isatty() else None
    if bar is None:
        yield Lines(program=program)
        return
    try:
        display = Display(bar, program=program)
        yield display
        display._finish()
    finally:
        bar.stop()


def _bar() -> Any:
    """rich's progress display on stderr, or None where rich is not installed."""
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    except ImportError:
        return None
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"))
    # stdout is not for rich to redirect: it would send results to its own console, which is stderr.
    return Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), redirect_stdout=False)


def _escaped(text: str) -> str:
    """A text for rich, whose square brackets are no markup."""
    from rich.markup import escape

    return escape(shown(text, LONGEST))


def _line(stream: TextIO, text: str) -> None:
    stream.write(f"{shown(text, LONGEST)}\n")
    stream.flush()
