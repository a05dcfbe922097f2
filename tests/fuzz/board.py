"""What a process that fuzzes shows of itself: how far it is, and the input that it reads now.

It lies in a file that is mapped, so that it is there still when the process ends in a crash.
"""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

MOST_BYTES = 1 << 20
"""Of an input."""
_FORM = struct.Struct("<5QI")


class Board:
    """Counts of outcomes by kind, in the order of ``KINDS``, and the input that is read. For one writer."""

    KINDS = ("accepted", "refused", "endless", "fault")

    def __init__(self, path: Path) -> None:
        """``path`` is made where it is not there."""
        with path.open("a+b") as file:
            file.truncate(_FORM.size + MOST_BYTES)
            self._shared = mmap.mmap(file.fileno(), _FORM.size + MOST_BYTES)

    def begin(self, data: bytes) -> None:
        """``data`` is read from now on."""
        number, *counts, _ = _FORM.unpack_from(self._shared)
        self._shared[_FORM.size : _FORM.size + len(data)] = data
        _FORM.pack_into(self._shared, 0, number + 1, *counts, len(data))

    def end(self, kind: str) -> None:
        """That is what came of it."""
        number, *counts, length = _FORM.unpack_from(self._shared)
        counts[self.KINDS.index(kind)] += 1
        _FORM.pack_into(self._shared, 0, number, *counts, length)

    @property
    def begun(self) -> int:
        """How many inputs were begun."""
        return int(_FORM.unpack_from(self._shared)[0])

    @property
    def counts(self) -> dict[str, int]:
        """What came of those that ended, by kind."""
        _, *counts, _ = _FORM.unpack_from(self._shared)
        return dict(zip(self.KINDS, counts, strict=True))

    @property
    def current(self) -> bytes:
        """The input that was begun last."""
        length = _FORM.unpack_from(self._shared)[-1]
        return self._shared[_FORM.size : _FORM.size + length]
