"""The suite can fail: targets with a fault in them are told from sound ones."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.child import Child
from tests.fuzz.judging import ACCEPTED, ENDLESS, FAULT, LONGEST, REFUSED, judge
from tests.fuzz.mutations import mutate_bytes
from tests.fuzz.target import Target
from tgate_engine.errors import BundleError, RequestError


def key_error(data: bytes) -> None:
    if data.startswith(b"\xff"):
        dict[bytes, int]()[data]


def panic(_data: bytes) -> None:
    """As one of Rust comes: no Exception."""

    class PanicException(BaseException):
        pass

    raise PanicException("index out of bounds")


def exits(_data: bytes) -> None:
    sys.exit(0)


def several_lines(_data: bytes) -> None:
    class Talkative(BundleError):
        def __str__(self) -> str:
            return "a\nb"

    raise Talkative


def says_nothing(_data: bytes) -> None:
    raise BundleError


def says_too_much(_data: bytes) -> None:
    raise RequestError("x" * (LONGEST + 1))


def takes_all_memory(data: bytes) -> None:
    bytearray(1 << 45)


def hides_that(data: bytes) -> None:
    try:
        takes_all_memory(data)
    except MemoryError as error:
        raise RequestError(f"x cannot be read ({type(error).__name__})") from None


def wrong_answer(_data: bytes) -> None:
    assert 1 + 1 == 3


def never_ends(_data: bytes) -> None:
    while True:
        pass


def waits(_data: bytes) -> None:
    time.sleep(60)


def swallows_what_stops_it(_data: bytes) -> None:
    try:
        never_ends(b"")
    except Exception:
        raise RequestError("it took too long") from None


@pytest.mark.parametrize(
    ("run", "says"),
    [
        (key_error, "KeyError"),
        (panic, "PanicException"),
        (exits, "SystemExit"),
        (several_lines, "not one line"),
        (says_nothing, "not one line"),
        (says_too_much, f"{LONGEST + 1} characters"),
        (takes_all_memory, "MemoryError"),
        (hides_that, "were asked for"),
        (wrong_answer, "AssertionError"),
        (never_ends, "more than 0.2 seconds"),
        (waits, "more than 0.2 seconds"),
        (swallows_what_stops_it, "more than 0.2 seconds"),
    ],
)
def test_a_fault_is_seen(run: Callable[[bytes], None], says: str) -> None:
    outcome = judge(run, b"\xff", seconds=0.2)
    assert outcome.kind == FAULT
    assert says in outcome.says
    assert outcome.place


def refuses(_data: bytes) -> None:
    raise BundleError("no")


def test_what_is_none() -> None:
    assert judge(key_error, b"").kind == ACCEPTED
    assert judge(refuses, b"").kind == REFUSED
    assert judge(never_ends, b"", seconds=0.2, endless=True).kind == ENDLESS
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # or a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            judge(lambda _: signal.raise_signal(signal.SIGINT), b"")
    finally:
        signal.signal(signal.SIGINT, before)


def test_nothing_is_left_to_go_off() -> None:
    before = signal.getsignal(signal.SIGALRM)
    judge(key_error, b"", seconds=0.1)
    time.sleep(0.2)
    assert signal.getsignal(signal.SIGALRM) is before


# --- what ends the process ----------------------------------------------------------------------


def ends(data: bytes) -> None:
    """Each in its way, by its first letter."""
    match data[:1]:
        case b"a":
            os.abort()
        case b"e":
            os._exit(3)
        case b"n":
            # As a library that does not come back.
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGALRM, signal.SIGPROF])
            never_ends(data)
        case b"m":
            bytearray(16 << 30)
        case b"p":
            print("\x1b[2J", file=sys.stderr)


def sound() -> list[bytes]:
    return [b""]


def test_a_child_tells_how_it_ended_and_goes_on(capfd: pytest.CaptureFixture[str]) -> None:
    target = Target(name="planted", run=ends, sound=sound, mutate=mutate_bytes)
    with Child(seconds=0.3) as child:
        assert child.judge(target, b"p").kind == ACCEPTED
        assert "MemoryError" in child.judge(target, b"m").says
        assert child.judge(target, b"a").says == "ended by SIGABRT"
        assert child.judge(target, b"").kind == ACCEPTED
        assert child.judge(target, b"e").says == "ended with exit status 3"
    assert "\x1b" not in capfd.readouterr().err


def test_a_child_that_does_not_come_back_is_ended() -> None:
    target = Target(name="endless", run=ends, sound=sound, mutate=mutate_bytes, endless=True)
    with Child(seconds=0.1) as child:
        assert child.judge(replace(target, endless=False), b"n").place == "no answer"
        assert child.judge(target, b"n").kind == ENDLESS


# --- the whole ----------------------------------------------------------------------------------


def test_a_fault_that_few_inputs_reach_is_found(tmp_path: Path) -> None:
    """Mutations and drawing reach what lies behind one changed byte."""
    from hypothesis import Phase, given, settings

    from tests.fuzz.inputs import inputs

    target = Target(name="planted", run=key_error, sound=lambda: [b"sound"], mutate=mutate_bytes)

    @settings(max_examples=500, derandomize=True, database=None, deadline=None, phases=[Phase.generate])
    @given(inputs(target))
    def short_run(data: bytes) -> None:
        assert judge(target.run, data).kind != FAULT

    with pytest.raises(AssertionError):
        short_run()


def test_mutations_are_the_same_each_time() -> None:
    assert mutate_bytes(b"sound" * 9, Random(3)) == mutate_bytes(b"sound" * 9, Random(3))
