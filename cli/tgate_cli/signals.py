"""SIGINT and SIGTERM end a command within a second, whatever it is doing, and leave nothing half made.

Python raises in the main thread, but only between two of its own instructions, and a command may be inside an engine
for minutes. So a thread waits for signals beside it. It cancels the calls that can be cancelled, and the stack unwinds
as after any error. What has not ended after :data:`GRACE_S`, or when a second signal comes, it ends hard: what is half
made is removed, the line is written, and the process exits. A load, a compilation or a kernel cannot be cancelled, so
such commands end that way. In the middle of an import nothing is raised, and the end is hard at once: native code that
runs Python while a library is loaded need not bear an exception, and PyTorch's aborts.

A call that keeps Python's lock (AOTInductor's) would stop that thread as well: around it a signal does what it does by
default, and kills the process. Nothing is half made there, and a shell sees the same exit status.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import NoReturn

from tgate_engine import underway

GRACE_S = 0.5
"""How long the stack has to unwind."""
_AGAIN_S = 0.02
"""How often calls are cancelled meanwhile: one may begin just after the first time."""
_SAYS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_IMPORTING = "<frozen importlib._bootstrap>"
"""The file that Python's own frames of an import name."""
_SHOW_CURSOR = "\x1b[?25h"


class Ended(BaseException):
    """SIGTERM came. Not an Exception, so that only clean-up code sees it on its way to the top."""


class Signals:
    """While open, signals end what the main thread does, as this module says. In other threads, which may take none,
    nothing changes.

    ``number``: what came; None before that. ``program``: what the line of a hard end begins with.
    """

    def __init__(self, program: str) -> None:
        self._program = program
        self._taken = contextlib.ExitStack()
        self.number: signal.Signals | None = None

    @property
    def says(self) -> str:
        """What ended the command, in a word."""
        return _SAYS[self.number or signal.SIGINT]

    @property
    def status(self) -> int:
        """The exit status, as shells count it: 130 or 143."""
        return 128 + (self.number or signal.SIGINT)

    def __enter__(self) -> Signals:
        if threading.current_thread() is not threading.main_thread():
            return self
        ours, theirs = os.pipe()
        os.set_blocking(theirs, False)
        watcher = threading.Thread(target=self._watch, args=(ours,), name="signals", daemon=True)
        undo = self._taken.callback  # in the opposite order
        undo(os.close, ours)
        undo(watcher.join)
        undo(os.close, theirs)
        undo(signal.signal, signal.SIGTERM, signal.signal(signal.SIGTERM, self._raise))
        # As tgate_cli.entry leaves it, or as Python does; whoever ignores it goes on ignoring it.
        if signal.getsignal(signal.SIGINT) in (signal.SIG_DFL, signal.default_int_handler):
            undo(signal.signal, signal.SIGINT, signal.signal(signal.SIGINT, self._raise))
        undo(signal.set_wakeup_fd, signal.set_wakeup_fd(theirs, warn_on_full_buffer=False))
        underway.shield_with(_by_default)
        undo(underway.shield_with, None)
        watcher.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._taken.close()

    def leave(self) -> None:
        """Leave signals to what the command does from now on."""
        self._taken.close()

    def ended(self, error: BaseException) -> bool:
        """Whether a signal ended the command with this error. One may come while this opens or closes, and some raise
        KeyboardInterrupt by other means: then the error tells which it was."""
        if self.number is None and isinstance(error, KeyboardInterrupt | Ended):
            self.number = signal.SIGINT if isinstance(error, KeyboardInterrupt) else signal.SIGTERM
        return self.number is not None

    def _raise(self, number: int, frame: FrameType | None) -> NoReturn:
        """What the main thread does when a signal comes."""
        self.number = signal.Signals(number)
        if _imports(frame):
            self._end()
        raise KeyboardInterrupt if number == signal.SIGINT else Ended

    def _watch(self, pipe: int) -> None:
        """Read the numbers of signals until the command has ended, which closes the pipe."""
        while self.number is None:
            read = os.read(pipe, 1)
            if not read:
                return
            self.number = signal.Signals(read[0]) if read[0] in _SAYS else None
        deadline_s = time.monotonic() + GRACE_S
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while time.monotonic() < deadline_s:
                underway.cancel_calls()
                if selector.select(_AGAIN_S):
                    read = os.read(pipe, 1)
                    if not read:
                        return
                    if read[0] in _SAYS:
                        break
        self._end()

    def _end(self) -> NoReturn:
        underway.remove_unfinished()
        with contextlib.suppress(OSError):
            cursor = _SHOW_CURSOR if os.isatty(2) else ""
            os.write(2, f"{cursor}{self._program}: error: {self.says}\n".encode())
        os._exit(self.status)


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported somewhere up the stack."""
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTING:
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def _by_default() -> Iterator[None]:
    """While open, signals that would end the command kill the process, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _SAYS}
    taken = [number for number, handler in before.items() if handler is not signal.SIG_IGN]
    try:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
        yield
    finally:
        for number in taken:
            signal.signal(number, before[number])
