"""What may come of an input that a stranger wrote: it is taken, or refused in one line. All else is a fault."""

from __future__ import annotations

import resource
import signal
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tgate_engine.errors import TgateError

ACCEPTED, REFUSED, ENDLESS, FAULT = "accepted", "refused", "endless", "fault"

LONGEST = 1000
"""Characters of a refusal; what strangers wrote is quoted in part."""
SECONDS = 10
"""What one input may take of the processor."""
PATIENCE = 6
"""How much longer it may take by the clock: the machine may be busy with other things."""
MEMORY_BYTES = 3 << 30
"""What one input may take beyond what the process has."""

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Outcome:
    """``says``: the refusal, with its class, or what is wrong. ``place``: of a fault, where; two of one place are one
    fault."""

    kind: str
    says: str = ""
    place: str = ""


class TooLong(BaseException):
    """No Exception, so that nothing turns it into one line."""


def judge(run: Callable[[bytes], object], data: bytes, *, seconds: float = SECONDS, endless: bool = False) -> Outcome:
    """What comes of ``data``. An input that keeps a library from returning keeps this from it, too: see
    :mod:`tests.fuzz.child`. ``endless``: whether taking longer than ``seconds`` is no fault."""
    try:
        with _stopped_after(seconds):
            run(data)
    except TgateError as error:
        return _refusal(error)
    except KeyboardInterrupt:
        raise
    except TooLong as error:
        return Outcome(ENDLESS if endless else FAULT, str(error), _place(error))
    except BaseException as error:  # panics of Rust are no Exception
        return Outcome(FAULT, f"{type(error).__name__}: {str(error)[:300]!r}", _place(error))
    return Outcome(ACCEPTED)


def _refusal(error: TgateError) -> Outcome:
    line = str(error)
    says = f"{type(error).__name__}: {line}"
    if "\n" in line or not line:
        return Outcome(FAULT, f"not one line: {says[:300]!r}", _place(error))
    if len(line) > LONGEST:
        return Outcome(FAULT, f"{len(line)} characters: {says[:300]!r}", _place(error))
    if "MemoryError" in line:
        return Outcome(FAULT, f"more than {MEMORY_BYTES} bytes were asked for: {says[:300]!r}", _place(error))
    return Outcome(REFUSED, says)


def _place(error: BaseException) -> str:
    """The innermost function of ours, or of a library where none of ours is on the way, and what was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [f for f in frames if Path(f.filename).is_relative_to(ROOT) and "/tests/" not in f.filename] or frames
    where = f"{Path(ours[-1].filename).name}:{ours[-1].name}" if ours else "nowhere"
    return f"{type(error).__name__} in {where}"


_TIMERS = {signal.ITIMER_PROF: signal.SIGPROF, signal.ITIMER_REAL: signal.SIGALRM}


@contextmanager
def _stopped_after(seconds: float) -> Iterator[None]:
    """Raises :class:`TooLong` in Python code that takes more of the processor, or far more by the clock."""

    def late(*_: object) -> None:
        raise TooLong(f"more than {seconds:g} seconds")

    before = {number: signal.signal(number, late) for number in _TIMERS.values()}
    signal.setitimer(signal.ITIMER_PROF, seconds)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE * seconds)
    try:
        yield
    finally:
        for timer in _TIMERS:
            signal.setitimer(timer, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _held_bytes() -> int:
    """The addresses that this process has taken."""
    return int(Path("/proc/self/statm").read_text("ascii").split()[0]) * resource.getpagesize()


@contextmanager
def bounded_memory() -> Iterator[None]:
    """While open, this process gets :data:`MEMORY_BYTES` more, and no memory beyond."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_held_bytes() + MEMORY_BYTES, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
