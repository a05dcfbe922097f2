"""The images of one size, and who of them share a call.

A call is the oldest's. Whoever has the same to do comes along, and stays to the end. So do others that have steps in
common with it, those first that have the most; who is a few steps behind takes those while the oldest waits, if they
then share more than :data:`~tgate_serve.program.WORTH` times as many. Nobody is taken from a call that is full without
it: of those that have the same to do, only who is left over when they go in full calls joins others, and all of these
or none. Where company is cheap (:data:`DEAR`), places that are left in a call are filled with whoever is at its graph.

Company makes a call longer for the oldest and shorter for all together. So how young it may be, if it does not have the
same to do, depends on how many are there and on what it adds: where that is nearly a call of its own, it is of the
older half, and where it is one, nobody comes along. While more images wait than there are rows, throughput counts, and
whoever fits stays for as long as it can; calls are full without those that come for one step.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tgate_serve.program import Left, meeting

DEAR = 2 / 3
"""From this share of a call on, an image that comes along for one step costs more than it saves, since it leaves those
behind that it could have stayed with."""
Order = tuple[int, int]
"""An image's place among all, the oldest's being the least, and its ticket."""


@dataclass(slots=True, kw_only=True)
class Line:
    """``most``: the images of a call at most. ``takes``: how many of so many images a call has. ``free``: rows that
    nobody has. ``waiting``: the images without a row. ``left``: what each image has still to do; ``groups``: the same,
    the other way round. Oldest first, everywhere."""

    most: int
    takes: tuple[int, ...]
    free: int
    waiting: list[Order] = field(default_factory=list)
    left: dict[Order, Left] = field(default_factory=dict)
    groups: dict[Left, list[Order]] = field(default_factory=dict)

    @property
    def full(self) -> bool:
        """Whether more images wait than there are rows for."""
        return len(self.waiting) > self.free

    # --- coming and going -----------------------------------------------------------------------

    def come(self, order: Order, left: Left) -> None:
        """An image is there, and waits for a row."""
        insort(self.waiting, order)
        self._set(order, left)

    def waits(self, order: Order) -> bool:
        """Whether an image has no row."""
        at = bisect_left(self.waiting, order)
        return at < len(self.waiting) and self.waiting[at] == order

    def start(self, order: Order) -> bool:
        """Give an image a row; False where it has one."""
        if not self.waits(order):
            return False
        remove(self.waiting, order)
        self.free -= 1
        return True

    def step(self, order: Order) -> bool:
        """An image has taken a step; False where it was the last, and the image has gone."""
        then = self.left[order].then
        if then is None:
            self.go(order)
            return False
        self._unset(order)
        self._set(order, then)
        return True

    def go(self, order: Order) -> None:
        """An image is no longer there, and its row is free."""
        self._unset(order)
        if self.waits(order):
            remove(self.waiting, order)
        else:
            self.free += 1

    def _set(self, order: Order, left: Left) -> None:
        self.left[order] = left
        insort(self.groups.setdefault(left, []), order)

    def _unset(self, order: Order) -> None:
        left = self.left.pop(order)
        remove(self.groups[left], order)
        if not self.groups[left]:
            del self.groups[left]

    # --- who shares a call ----------------------------------------------------------------------

    def call(
        self, oldest: Order, everyone: Sequence[Order], *, added: float, may_wait: bool
    ) -> tuple[str, list[Order]]:
        """The graph of the next call, and its images.

        ``oldest``: on whose account it is made; it has a row, or there is one for it, which nobody else is given.
        ``everyone``: the images of all sizes, oldest first. ``added``: see :class:`~tgate_serve.scheduler.Room`.
        ``may_wait``: whether the oldest may be left out of the call.
        """
        rows = self.free - self.waits(oldest)
        company = self._company(oldest, everyone, added, rows)
        graph, call = self.left[oldest].graph, [oldest, *(order for order, behind in company if not behind)]
        if may_wait and (late := [(-behind, order) for order, behind in company if behind]):
            graph = self.left[min(late)[1]].graph
            call = [order for _, order in late if self.left[order].graph == graph]
        if added < DEAR and not self.full and len(call) < self.most:
            rows -= sum(self.waits(order) for order, _ in company)
            others = self._at(graph, self._youngest(everyone, added), {oldest, *(order for order, _ in company)})
            call += self._with_rows(others, rows, self.most - len(call))
        return graph, call[: self.takes[min(len(call), self.most)]]

    def _company(self, oldest: Order, everyone: Sequence[Order], added: float, rows: int) -> list[tuple[Order, int]]:
        """Who is to share calls with the oldest, the best first, and how far behind it each is."""
        if added >= 1:
            return []
        alike = self.groups[self.left[oldest]]
        stays = self._with_rows((order for order in alike if order != oldest), rows, self.most - 1)
        company = [(order, 0) for order in stays]
        rows -= sum(self.waits(order) for order, _ in company)
        youngest = self._youngest(everyone, added)
        others = []
        for left, group in self.groups.items():
            over = group[len(group) - len(group) % self.most :]
            if group is not alike and over and over[-1] <= youngest and (met := meeting(self.left[oldest], left)):
                others.append((-met.gain, over, met.behind))
        for _, over, behind in sorted(others):
            wait = sum(map(self.waits, over))
            if len(company) + len(over) < self.most and wait <= rows:
                company += [(order, behind) for order in over]
                rows -= wait
        return company

    def _at(self, graph: str, youngest: Order, but: set[Order]) -> list[Order]:
        """Whoever else is at a graph and may come along."""
        return sorted(
            order
            for left, group in self.groups.items()
            if left.graph == graph
            for order in group
            if order <= youngest and order not in but
        )

    def _with_rows(self, orders: Iterable[Order], rows: int, most: int) -> list[Order]:
        """The first of those that have a row, or are among the first so many that have none."""
        found: list[Order] = []
        for order in orders:
            if len(found) == most:
                break
            if not self.waits(order):
                found.append(order)
            elif rows > 0:
                rows -= 1
                found.append(order)
        return found

    def _youngest(self, everyone: Sequence[Order], added: float) -> Order:
        """The youngest that may come along. Those that came before it are held up by ``added``, those that came after
        it are spared the rest of a call; where that is little, half of all weigh as much as the other half, and where
        it is more, so many more may come."""
        if self.full or 2 * added <= 1:
            return everyone[-1]
        return everyone[max(1, int((len(everyone) + 1) / (2 * added))) - 1]


def remove(orders: list[tuple[int, int]] | list[tuple[float, int]], order: tuple[float, int]) -> None:
    """Take an order out of a sorted list that holds it."""
    del orders[bisect_left(orders, order)]
