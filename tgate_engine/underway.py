"""What is under way in this process, for whoever has to end it in the middle: calls to cancel, files to remove.

A library's caller never meets it. The command line asks it when a signal comes, from a thread that watches while the
main thread is inside an engine: see ``tgate_cli.signals``.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

# Adding to a set, removing from it and copying it are atomic, so neither needs a lock.
_calls: set[Cancellable] = set()
_unfinished: set[Path] = set()
_shield: Callable[[], contextlib.AbstractContextManager[None]] | None = None


class Cancellable:
    """While open, a call that ``cancel()`` ends early, with the engine's error; asked from another thread, perhaps more
    than once. A class, since a step is made in microseconds around the engine's call."""

    __slots__ = ("cancel",)

    def __init__(self, cancel: Callable[[], object]) -> None:
        self.cancel = cancel

    def __enter__(self) -> None:
        _calls.add(self)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _calls.discard(self)


def cancel_calls() -> None:
    """Cancel every call that is under way, whichever thread made it."""
    for call in list(_calls):
        call.cancel()


def without_python() -> contextlib.AbstractContextManager[None]:
    """Around a call that can neither be cancelled nor lets Python's threads run meanwhile: what :func:`shield_with` was
    given guards it, or nothing."""
    return contextlib.nullcontext() if _shield is None else _shield()


def shield_with(shield: Callable[[], contextlib.AbstractContextManager[None]] | None) -> None:
    """Set what :func:`without_python` gives from now on; None takes it away."""
    global _shield  # noqa: PLW0603 - one process, one way to take its signals
    _shield = shield


@contextlib.contextmanager
def unfinished(path: Path) -> Iterator[None]:
    """While open, ``path``, a file or a directory, is half made: it goes if the process has to end here."""
    _unfinished.add(path)
    try:
        yield
    finally:
        _unfinished.discard(path)


def remove_unfinished() -> None:
    """Remove what is half made. What cannot be removed stays."""
    for path in list(_unfinished):
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)
