"""Calls into libraries with what a stranger wrote: whatever they raise becomes one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from tgate_engine.errors import ExportError, TgateError


@contextlib.contextmanager
def refusing(what: str, advice: str) -> Iterator[None]:
    """While open, an exception of a library becomes an :class:`ExportError`: ``what (the exception); advice``.

    Libraries raise many kinds for values that they cannot use, and those written in Rust a panic, which is no
    :class:`Exception`. Nothing but a library's own call belongs inside, or faults of ours would look like a stranger's.
    """
    try:
        yield
    except TgateError:
        raise
    except BaseException as error:  # panics are no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ExportError(f"{what} ({one_line(error)}); {advice}") from None


def one_line(error: BaseException) -> str:
    """A library's exception as the end of our own sentence."""
    text = " ".join(str(error).split()).rstrip(".")
    return f"{type(error).__name__}: {text[:200]}" if text else type(error).__name__
