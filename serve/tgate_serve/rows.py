"""Which row of a state an image lies in, and what has to move so that those of a call are neighbours.

Pure: rows hold tickets here, and the moves that are planned are somebody else's to make. Images that stay together stay
where they are: a call whose images are neighbours already moves nothing.
"""

from __future__ import annotations

from collections.abc import Collection

from tgate_engine.errors import RequestError


class Rows:
    """``count`` rows for images, and one more, which is nobody's between two calls, for those that change places.

    Not thread-safe.
    """

    def __init__(self, count: int) -> None:
        """Raises :class:`RequestError` for less than one row."""
        if count < 1:
            raise RequestError(f"there is at least 1 row, got {count}")
        self.count = count
        self._tickets: list[int | None] = [None] * (count + 1)
        self._row: dict[int, int] = {}

    @property
    def total(self) -> int:
        """All rows, the spare one among them."""
        return len(self._tickets)

    def row(self, ticket: int) -> int:
        """Where an image lies. Raises KeyError for one that has no row."""
        return self._row[ticket]

    def take(self, ticket: int) -> int:
        """A row for an image that joins: behind the last one that is taken where there is room, so that those that join
        together lie together. Raises :class:`RequestError` where all rows are taken."""
        if len(self._row) >= self.count:
            raise RequestError(f"all {self.count} rows are taken; let an image go first")
        behind = next((row + 1 for row in reversed(range(self.total)) if self._tickets[row] is not None), 0)
        row = behind if behind < self.total else self._tickets.index(None)
        self._put(ticket, row)
        return row

    def __contains__(self, ticket: int) -> bool:
        return ticket in self._row

    def free(self, ticket: int) -> int:
        """An image has left; the row that it had. Raises KeyError for one that had none."""
        row = self._row.pop(ticket)
        self._tickets[row] = None
        return row

    def gather(self, tickets: Collection[int]) -> tuple[range, list[tuple[int, int]]]:
        """Make the images of a call neighbours: their rows, and the moves that bring them there, each from a row to one
        that is nobody's by then, in this order.

        Of all stretches of so many rows it takes the one where most of them lie already, then the one with the fewest
        others, then the first. Each image moves once at most, and of the others only those that lie in that stretch.
        """
        count, wanted = len(tickets), {self._row[ticket] for ticket in tickets}
        if max(wanted) - min(wanted) == count - 1:
            return range(min(wanted), min(wanted) + count), []
        first = self._stretch(wanted, count)
        moves: list[tuple[int, int]] = []
        stretch = range(first, first + count)
        outside = sorted(row for row in wanted if row not in stretch)
        for row in sorted(
            stretch, key=lambda row: self._tickets[row] is not None
        ):  # what is filled first frees the next
            if row in wanted:
                continue
            if self._tickets[row] is not None:
                empty = next(r for r in range(self.total) if self._tickets[r] is None and r not in stretch)
                self._move(row, empty, moves)
            self._move(outside.pop(), row, moves)
        return stretch, moves

    def _stretch(self, wanted: Collection[int], count: int) -> int:
        """The first row of the best stretch; see :meth:`gather`."""
        own = [row in wanted for row in range(self.total)]
        others = [ticket is not None and not mine for ticket, mine in zip(self._tickets, own, strict=True)]
        mine, theirs = sum(own[:count]), sum(others[:count])
        best = (-mine, theirs, 0)
        for first in range(1, self.total - count + 1):
            mine += own[first + count - 1] - own[first - 1]
            theirs += others[first + count - 1] - others[first - 1]
            best = min(best, (-mine, theirs, first))
        return best[2]

    def _move(self, old: int, new: int, moves: list[tuple[int, int]]) -> None:
        ticket = self._tickets[old]
        assert ticket is not None  # only rows that are taken are moved
        self._tickets[old] = None
        self._put(ticket, new)
        moves.append((old, new))

    def _put(self, ticket: int, row: int) -> None:
        self._tickets[row] = ticket
        self._row[ticket] = row
