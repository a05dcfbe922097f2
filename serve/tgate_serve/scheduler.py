"""Who runs next: at each tick one graph, for images whose next steps are of that graph at one size.

Pure: no thread, no clock, no engine. A plan is known before its first step, so all that has to be known of an image is
the names of the graphs that it still runs.

**Who goes first.** Images are ordered by age, a priority being a head start of so many places. A tick is the oldest's.
Whoever has steps in common with it comes along, those first that have the most. Who is a few steps behind takes those
while the oldest waits, if it then shares more than :data:`~tgate_serve.program.WORTH` times as many with it. Where a
call has places left, others at its graph take them.

Company makes a call longer for the oldest and shorter for all together. So how young it may be depends on how many are
there and on what it adds (:attr:`Room.added`): where that is nearly a call of its own, it is of the older half, and
where it is one, nobody comes along. An image that has the same to do as the oldest stays to the end, which saves more,
so it may be younger. While images wait for a row of that size, throughput counts: whoever fits comes along, and the
oldest image that can fill a call goes first. A free row goes to the oldest that waits for its size.

The oldest waits for others at most ``patience`` times as often as it has steps.

**What is promised.** An image that :meth:`Scheduler.submit` has taken is through after

    (a + 1) * n * (patience + 1)

ticks at most, whatever arrives later. n: steps of the longest plan. a: the images that had been taken before it and
were not through yet, and those of the next :data:`MOST_OVERTAKING` that have a priority above 0.

*Proof.* Call those a images and itself the elders. At every tick until it is through, the oldest in flight is an elder:
if it is in flight itself, whoever is older is an elder; if it waits, all rows of its size are taken, and by elders,
since rows are given by age; who is older than one of those is an elder again. A tick advances the oldest, or counts
among the n * patience that may pass over it; so it is the oldest for n * (patience + 1) ticks at most, and there are
a + 1 elders.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from tgate_engine.errors import RequestError, TgateError, shown
from tgate_serve.program import Left, Programs, meeting

PRIORITIES = range(10)
"""What a priority may be; 0 is nobody's favourite."""
HEAD_START = 16
"""How many images that came before it an image overtakes for each priority that it has more."""
MOST_OVERTAKING = HEAD_START * (len(PRIORITIES) - 1)
"""No image is overtaken by one that comes later than by so many."""
_STAYS = 4
"""Who stays to the end may be so much younger as if each image added this power of what it does."""

Order = tuple[int, int]
"""An image's place in the line, the oldest's being the least, and its ticket."""


class Busy(TgateError):
    """The queue has no room for a request; ``steps`` are to be taken, of one image each, until it may have, which takes
    ``after_s`` seconds where that is known."""

    def __init__(self, message: str, steps: int, after_s: float | None = None) -> None:
        super().__init__(message)
        self.steps = steps
        self.after_s = after_s


@dataclass(frozen=True, kw_only=True)
class Room:
    """What there is for one size. ``batches``: the ranges of images that a call may have, as (least, most), one image
    among them. ``rows``: how many images are in flight at most. ``added``: what each further image adds to the time of
    a call for one, as a share of that: 1 where an engine is as fast alone as in company, less where it is not."""

    batches: tuple[tuple[int, int], ...]
    rows: int
    added: float = 1.0

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise RequestError(f"a size needs at least 1 row, got {self.rows}")
        if not 0 < self.added < math.inf:
            raise RequestError(f"what an image adds to a call is a share above 0, got {shown(self.added)}")
        if not any(least == 1 for least, _ in self.batches):
            ranges = " or ".join(f"{least} to {most}" for least, most in self.batches)
            raise RequestError(
                f"the bundle takes {ranges or 'no'} images at once, and a server needs to run one image alone; export "
                "with --batch 1:4"
            )

    @property
    def most(self) -> int:
        """How many images a call has at most."""
        return min(self.rows, max(most for _, most in self.batches))


@dataclass(frozen=True, kw_only=True)
class Job:
    """One image. ``graphs``: what its steps run, in order. ``priority``: one of :data:`PRIORITIES`. ``deadline``: when
    nobody wants it any more, by whichever clock :meth:`Scheduler.expired` is asked with; None is never."""

    size: str
    graphs: tuple[str, ...]
    priority: int = 0
    deadline: float | None = None


@dataclass(frozen=True, kw_only=True)
class Tick:
    """One call: ``graph`` at ``size`` for the images of ``tickets``, oldest first. ``joined``: the images that are in
    flight from this tick on."""

    size: str
    graph: str
    tickets: tuple[int, ...]
    joined: tuple[int, ...]


@dataclass(slots=True)
class _Entry:
    job: Job
    order: Order
    left: Left
    in_flight: bool = False
    passed: int = 0  # how many ticks it was the oldest of and had no step in


@dataclass(slots=True)
class _Line:
    """The images of one size: those that wait, and those in flight by what is left to them; oldest first."""

    most: int
    takes: tuple[int, ...]  # how many of so many images a call has
    free: int
    waiting: list[Order] = field(default_factory=list)
    groups: dict[Left, list[Order]] = field(default_factory=dict)

    def add(self, left: Left, order: Order) -> None:
        insort(self.groups.setdefault(left, []), order)

    def remove(self, left: Left, order: Order) -> None:
        group = self.groups[left]
        _remove(group, order)
        if not group:
            del self.groups[left]

    def fills(self, lead: Left) -> bool:
        """Whether an image that has this to do and its company may fill a call."""
        count = 0
        for left, group in self.groups.items():
            if meeting(lead, left) is not None and (count := count + len(group)) >= self.most:
                return True
        return False


class Scheduler:
    """The images of all requests, from :meth:`submit` until they are through, cancelled or expired.

    Between two ticks any of them may come or go; that changes no other's place. Not thread-safe.
    """

    def __init__(self, rooms: Mapping[str, Room], *, queue: int = 64, patience: int = 8) -> None:
        """``rooms``: what there is of each size. ``queue``: how many images may wait. ``patience``: how often the
        oldest image may wait for others, for each of its steps; 0 is strictly by age. Raises :class:`RequestError`."""
        if not rooms or queue < 1 or patience < 0:
            raise RequestError(
                f"a scheduler needs a size, a queue of at least 1 and a patience of at least 0; got {len(rooms)} "
                f"sizes, a queue of {queue} and a patience of {patience}"
            )
        self.rooms = dict(rooms)
        self.added = {size: room.added for size, room in rooms.items()}
        """:attr:`Room.added` of each size; who learns better may change it between two ticks."""
        self.queue = queue
        self.patience = patience
        self.ticks = 0
        """How many there have been."""
        self.steps_left = 0
        """Steps that all images together have still to take."""
        self._programs = Programs()
        self._entries: dict[int, _Entry] = {}
        self._flight: list[Order] = []
        self._lines = {size: _line(room) for size, room in rooms.items()}
        self._deadlines: list[tuple[float, int]] = []
        self._waiting = 0
        self._next = 0

    # --- coming and going -----------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Images in flight."""
        return len(self._flight)

    @property
    def waiting(self) -> int:
        """Images that have no row yet."""
        return self._waiting

    def submit(self, jobs: Sequence[Job]) -> tuple[int, ...]:
        """Take the images of one request, all of them or none; a ticket for each, in their order.

        Images that find a row at the next tick need no place in the queue. Raises :class:`Busy` where there is no room,
        and :class:`RequestError` for a size that is not there, an image without a step, or a request that is larger
        than queue and rows together.
        """
        for job in jobs:
            if job.size not in self._lines:
                raise RequestError(f"size '{shown(job.size)}' is not served; there is {', '.join(self._lines)}")
            if not job.graphs or job.priority not in PRIORITIES:
                raise RequestError(
                    f"an image has at least 1 step and a priority from 0 to {PRIORITIES[-1]}; got {len(job.graphs)} "
                    f"steps and priority {shown(job.priority)}"
                )
        self._check_most(len(jobs), {job.size for job in jobs})
        if (over := self._beyond(Counter(job.size for job in jobs)) - self.queue) > 0:
            raise self._busy(over)
        return tuple(self._take(job) for job in jobs)

    def check_room(self, size: str, images: int, *, entering: int = 0) -> None:
        """Raises as :meth:`submit` does where so many images of one request would find neither a row nor a place in
        the queue, if ``entering`` of others, which are still on their way here, come first."""
        self._check_most(images, {size})
        if (over := self._beyond(Counter({size: entering + images})) - self.queue) > 0:
            raise self._busy(over)

    def _check_most(self, images: int, sizes: Iterable[str]) -> None:
        if images > (most := self.queue + min((self.rooms[size].rows for size in sizes), default=0)):
            raise RequestError(f"a request may have {most} images here, got {images}; ask for fewer at a time")

    def _busy(self, over: int) -> Busy:
        each = self.steps_left / max(1, len(self._entries))
        return Busy(
            f"the queue has {self.queue} places, and {over} more are wanted; ask again later", round(over * each)
        )

    def _beyond(self, more: Mapping[str, int]) -> int:
        """How many images wait once so many more of each size are there and all free rows are given."""
        return sum(max(0, len(line.waiting) + more.get(size, 0) - line.free) for size, line in self._lines.items())

    def _take(self, job: Job) -> int:
        ticket = self._next
        self._next += 1
        left = self._programs.left(job.graphs)
        assert left is not None  # it has been checked
        entry = _Entry(job, (ticket - HEAD_START * job.priority, ticket), left)
        self._entries[ticket] = entry
        insort(self._lines[job.size].waiting, entry.order)
        self._waiting += 1
        self.steps_left += len(job.graphs)
        if job.deadline is not None:
            insort(self._deadlines, (job.deadline, ticket))
        return ticket

    def cancel(self, ticket: int) -> bool:
        """Let an image go; its row is free at the next tick. False where it has gone already."""
        entry = self._entries.pop(ticket, None)
        if entry is None:
            return False
        line = self._lines[entry.job.size]
        if entry.in_flight:
            _remove(self._flight, entry.order)
            line.remove(entry.left, entry.order)
            line.free += 1
        else:
            _remove(line.waiting, entry.order)
            self._waiting -= 1
        self.steps_left -= entry.left.steps
        if entry.job.deadline is not None:
            _remove(self._deadlines, (entry.job.deadline, ticket))
        return True

    def expired(self, now: float) -> tuple[int, ...]:
        """The images whose deadlines are before ``now``, let go."""
        late = tuple(ticket for _, ticket in self._deadlines[: bisect_left(self._deadlines, (now, -1))])
        for ticket in late:
            self.cancel(ticket)
        return late

    def ahead(self, ticket: int) -> int:
        """How many images wait for the size of one and are older; 0 where it is in flight, or gone."""
        entry = self._entries.get(ticket)
        if entry is None or entry.in_flight:
            return 0
        return bisect_left(self._lines[entry.job.size].waiting, entry.order)

    # --- ticks ----------------------------------------------------------------------------------

    def tick(self) -> Tick | None:
        """Give free rows to those that wait, and choose the next call; None where nobody is there.

        :meth:`advance` has to follow for the images whose step was taken, :meth:`cancel` for others.
        """
        joined = self._join() if self._waiting else ()
        if not self._flight:
            return None
        oldest = self._entries[self._flight[0][1]]
        line = self._lines[oldest.job.size]
        saves = self.added[oldest.job.size] < 1
        may_wait = saves and oldest.passed < self.patience * len(oldest.job.graphs)
        lead = self._lead(line, oldest) if line.waiting and may_wait else oldest
        company = self._company(line, lead)
        call, graph = [lead.order, *(order for order, _, behind in company if not behind)], lead.left.graph
        if may_wait and (late := [(-behind, order, left) for order, left, behind in company if behind]):
            graph = min(late, key=lambda one: one[0])[2].graph
            call = [order for _, order, left in late if left.graph == graph]
        if len(call) < line.most:
            apart = {lead.order, *(order for order, _, _ in company)}
            call += [order for order in self._others(line, graph, lead.job.size) if order not in apart]
        call = call[: line.takes[min(len(call), line.most)]]
        oldest.passed += oldest.order not in call
        self.ticks += 1
        return Tick(size=oldest.job.size, graph=graph, tickets=tuple(t for _, t in sorted(call)), joined=joined)

    def advance(self, tickets: Iterable[int]) -> tuple[int, ...]:
        """The steps of those images are taken. Those that are through by it, which have left."""
        through = []
        for ticket in tickets:
            entry = self._entries[ticket]
            line = self._lines[entry.job.size]
            line.remove(entry.left, entry.order)
            self.steps_left -= 1
            if entry.left.then is not None:
                entry.left = entry.left.then
                line.add(entry.left, entry.order)
                continue
            through.append(ticket)
            del self._entries[ticket]
            _remove(self._flight, entry.order)
            line.free += 1
            if entry.job.deadline is not None:
                _remove(self._deadlines, (entry.job.deadline, ticket))
        return tuple(through)

    def _lead(self, line: _Line, oldest: _Entry) -> _Entry:
        """The oldest image of its size that can fill a call; the oldest of all where none can."""
        if line.fills(oldest.left):
            return oldest
        full = [group[0] for left, group in line.groups.items() if line.fills(left)]
        return self._entries[min(full)[1]] if full else oldest

    def _company(self, line: _Line, lead: _Entry) -> list[tuple[Order, Left, int]]:
        """Who is to share calls with an image, the best first: what is left to each, and how far behind it is."""
        found = []
        added = self.added[lead.job.size]
        youngest = self._youngest(line, added)
        stays = self._youngest(line, min(added, 1.0) ** _STAYS)
        for left, group in line.groups.items():
            met = meeting(lead.left, left)
            if met is None:
                continue
            count = min(line.most, bisect_right(group, stays if left is lead.left else youngest))
            found += [(-met.gain, order, left, met.behind) for order in group[:count] if order != lead.order]
        found.sort(key=lambda one: one[:2])
        return [(order, left, behind) for _, order, left, behind in found[: line.most - 1]]

    def _others(self, line: _Line, graph: str, size: str) -> list[Order]:
        """Whoever is at a graph and may come along, oldest first."""
        youngest = self._youngest(line, self.added[size])
        return sorted(o for left, group in line.groups.items() if left.graph == graph for o in group if o <= youngest)

    def _youngest(self, line: _Line, added: float) -> Order:
        """The youngest in flight that may come along. Those that came before it are held up by ``added``, those that
        came after it are spared the rest of a call; where that is little, half of all weigh as much as the other half,
        and where it is more, so many more may come. Where it is nothing, the oldest goes alone."""
        if added >= 1:
            return self._flight[0]
        weight = len(self._entries) + 1
        if line.waiting or 2 * added * len(self._flight) <= weight:
            return self._flight[-1]
        return self._flight[max(1, int(weight / (2 * added))) - 1]

    def _join(self) -> tuple[int, ...]:
        joined = []
        for line in self._lines.values():
            count = min(line.free, len(line.waiting))
            for order in line.waiting[:count]:
                entry = self._entries[order[1]]
                entry.in_flight = True
                insort(self._flight, order)
                line.add(entry.left, entry.order)
                joined.append(order[1])
            del line.waiting[:count]
            line.free -= count
            self._waiting -= count
        return tuple(joined)


def _line(room: Room) -> _Line:
    counts = range(1, room.most + 1)
    takes = (0, *(max(min(most, count) for least, most in room.batches if least <= count) for count in counts))
    return _Line(most=takes[-1], takes=takes, free=room.rows)


def _remove(orders: list[tuple[int, int]] | list[tuple[float, int]], order: tuple[float, int]) -> None:
    """Take an order out of a sorted list that holds it."""
    del orders[bisect_left(orders, order)]
