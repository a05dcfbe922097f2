"""What was asked of the stub, read from its log."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Iterator
from enum import IntEnum
from typing import Any, NamedTuple

from tests.cuda_stub.build import STUB


class Kind(IntEnum):
    """``stub_kind`` of ``stub.h``."""

    LAUNCH = 0
    COPY = 1
    SET = 2
    ALLOCATE = 3
    PIN = 4
    FREE = 5
    WAIT = 6
    CAPTURE = 7
    CAPTURED = 8
    REPLAY = 9
    RELEASE = 10
    BROKEN = 11
    REFUSED = 12
    TRIED = 13


class Event(NamedTuple):
    """One line. ``captured``: it became a node of a graph. Addresses and sizes in bytes; what they are of, ``stub.h``
    says for each kind. ``across``: it is a copy between the device and the host."""

    kind: Kind
    captured: bool
    name: str
    address: int
    source: int
    size_bytes: int
    across: bool


class _Event(ctypes.Structure):
    _fields_ = (
        ("kind", ctypes.c_int32),
        ("captured", ctypes.c_int32),
        ("name", ctypes.c_char_p),
        ("address", ctypes.c_uint64),
        ("source", ctypes.c_uint64),
        ("size_bytes", ctypes.c_uint64),
        ("across", ctypes.c_int32),
    )


def library() -> Any:
    """The stub. Raises :class:`OSError` where this process was not started with it."""
    stub = ctypes.CDLL(STUB)
    stub.stub_event_count.restype = ctypes.c_size_t
    return stub


@contextlib.contextmanager
def recorded() -> Iterator[list[Event]]:
    """A list, which has what was asked meanwhile once the block is left."""
    stub = library()
    events: list[Event] = []
    first = stub.stub_event_count()
    try:
        yield events
    finally:
        number = stub.stub_event_count() - first
        raw = (_Event * number)()
        stub.stub_events(ctypes.c_size_t(first), ctypes.c_size_t(number), raw)
        events += (
            Event(
                Kind(each.kind),
                bool(each.captured),
                (each.name or b"").decode(),
                each.address,
                each.source,
                each.size_bytes,
                bool(each.across),
            )
            for each in raw
        )


def of(events: list[Event], *kinds: Kind) -> list[Event]:
    """Those of some kinds."""
    return [event for event in events if event.kind in kinds]


def memory(address: int) -> tuple[str, int, int]:
    """What memory an address is of, ``host``, ``pinned`` or ``device``, and where its block begins and ends; the
    stub knows no block of the host's."""
    begin, end = ctypes.c_uint64(), ctypes.c_uint64()
    kind = library().stub_memory(ctypes.c_void_p(address), ctypes.byref(begin), ctypes.byref(end))
    return ("host", "pinned", "device")[kind], begin.value, end.value
