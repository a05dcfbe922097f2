"""A process that reads what libraries in C and Rust may end in an abort, a crash or never."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
import tempfile
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from tests.fuzz.judging import ENDLESS, FAULT, PATIENCE, SECONDS, Outcome, bounded_memory, judge

if TYPE_CHECKING:  # the child imports what it is to run, and no more
    from tests.fuzz.target import Target

_START_S = 120
"""What importing everything, and making what is sound, may take on a machine that is busy."""
NO_ANSWER = "no answer"
_SPAWN = multiprocessing.get_context("spawn")  # a fork would have the locks of the parent's threads


class Child:
    """Judges inputs one after the other, and is started again when an input ends it. One thread at a time."""

    def __init__(self, seconds: float = SECONDS) -> None:
        """``seconds``: what one input may take. A child that does not tell is ended after twice what it may by the
        clock."""
        self._seconds = seconds
        self._process: multiprocessing.process.BaseProcess | None = None
        self._folder = Path(tempfile.mkdtemp(prefix="tgate-fuzz-"))
        self._warm: set[str] = set()

    def judge(self, target: Target, data: bytes) -> Outcome:
        """As :func:`tests.fuzz.judging.judge`, which the child asks; and a fault where the child does not answer."""
        if self._process is None:
            self._start()
        if target.name not in self._warm:
            self._warm.add(target.name)
            self._ask(target, target.sound()[0], _START_S)
        return self._ask(target, data, 2 * PATIENCE * self._seconds)

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _start(self) -> None:
        self._ours, theirs = _SPAWN.Pipe()
        self._process = _SPAWN.Process(target=_serve, args=(theirs, str(self._folder)), daemon=True)
        self._process.start()
        theirs.close()

    def _ask(self, target: Target, data: bytes, seconds: float) -> Outcome:
        try:
            self._ours.send((target.run, data, self._seconds, target.endless))
            if not self._ours.poll(seconds):
                self._end()
                return Outcome(ENDLESS if target.endless else FAULT, f"no answer in {seconds:g} seconds", NO_ANSWER)
            found: Outcome = self._ours.recv()
            return found
        except (EOFError, OSError):
            how = how_it_ended(self._end())
            return Outcome(FAULT, how, how)

    def _end(self) -> int:
        """Ends the process if it has not ended. Its exit status, below 0 for a signal."""
        code = 0
        if self._process is not None:
            self._process.join(1)
            self._process.kill()
            self._process.join()
            code = self._process.exitcode or 0
            self._process = None
            self._ours.close()
            self._warm.clear()
        return code


def how_it_ended(code: int) -> str:
    """A process's exit status, below 0 for a signal, in words."""
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"


def _serve(connection: Connection, folder: str) -> None:
    tempfile.tempdir = folder
    _quiet()
    with bounded_memory(), suppress(EOFError):
        while True:
            run, data, seconds, endless = connection.recv()
            connection.send(judge(run, data, seconds=seconds, endless=endless))


def _quiet() -> None:
    """Libraries write to standard error what they think of a file."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 2)
    os.close(nothing)
