"""Who runs next: at each tick one graph, for images whose next steps are of that graph at one size.

Pure: no thread, no clock, no engine. A plan is known before its first step, so all that has to be known of an image is
the names of the graphs that it still runs.

**Who goes first.** Images are ordered by age, a priority being a head start of so many places. A tick is the oldest's
of those that have a row or find one free, and :mod:`tgate_serve.line` says who comes along. An image is given a row
when it takes its first step, and keeps it. The last free row of a size is for the oldest, if it has none. The oldest
waits for others at most ``patience`` times as often as it has steps.

**What is promised.** An image that :meth:`Scheduler.submit` has taken is through after

    (a + 1) * n * (patience + 1)

ticks at most, whatever arrives later. n: steps of the longest plan. a: the images that had been taken before it and
were not through yet, and those of the next :data:`MOST_OVERTAKING` that have a priority above 0.

*Proof.* Call those a images and itself the elders. Whoever is before an elder in order came before it, or within the
next :data:`MOST_OVERTAKING` with a higher priority. Until the image is through, each tick is an elder's. If the image
has a row or there is one, the tick is its own or that of one before it: an elder's. If all rows of its size are taken,
look at the tick that took the last one: it was the oldest's of then, A, which took that row or had one already, and A
is still in flight, for rows have been taken ever since. A came before the image, or the image waited while there was a
row, and A was before it in order. So the tick is A's, or that of one before A. Where that one is before the image too,
or came before it, it is an elder; if not, A came before the image, and it came within the next :data:`MOST_OVERTAKING`
after A with a priority above 0: an elder again. A tick advances the oldest, or counts among the n * patience that may
pass over it; so an elder is the oldest for n * (patience + 1) ticks at most, and there are a + 1 elders.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from tgate_engine.errors import RequestError, TgateError, shown
from tgate_serve.line import Line, Order, remove
from tgate_serve.program import Programs

PRIORITIES = range(10)
"""What a priority may be; 0 is nobody's favourite."""
HEAD_START = 16
"""How many images that came before it an image overtakes for each priority that it has more."""
MOST_OVERTAKING = HEAD_START * (len(PRIORITIES) - 1)
"""No image is overtaken by one that comes later than by so many."""


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
    passed: int = 0  # how many ticks it was the oldest of and had no step in


class Scheduler:
    """The images of all requests, from :meth:`submit` until they are through, cancelled or expired.

    Between two ticks any of them may come or go; that changes no other's place. Not thread-safe.
    """

    def __init__(self, rooms: Mapping[str, Room], *, queue: int = 64, patience: int = 8) -> None:
        """``rooms``: what there is of each size. ``queue``: how many images may wait beside those that there are rows
        for. ``patience``: how often the oldest image may wait for others, for each of its steps; 0 is strictly by age.
        Raises :class:`RequestError`."""
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
        self._all: list[Order] = []
        self._lines = {size: _line(room) for size, room in rooms.items()}
        self._deadlines: list[tuple[float, int]] = []
        self._waiting = 0
        self._next = 0

    # --- what is served -------------------------------------------------------------------------

    def open(self, size: str, room: Room) -> None:
        """Serve one more size: rows and calls of its own, whatever it is called."""
        self.rooms[size], self.added[size], self._lines[size] = room, room.added, _line(room)

    def close(self, size: str) -> bool:
        """Serve a size no more; False, and nothing has changed, where images of it are there."""
        if any(entry.job.size == size for entry in self._entries.values()):
            return False
        for held in (self.rooms, self.added, self._lines):
            held.pop(size, None)
        return True

    # --- coming and going -----------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Images in flight."""
        return len(self._all) - self._waiting

    @property
    def waiting(self) -> int:
        """Images that have no row yet."""
        return self._waiting

    def submit(self, jobs: Sequence[Job]) -> tuple[int, ...]:
        """Take the images of one request, all of them or none; a ticket for each, in their order.

        Images that there are free rows for need no place in the queue. Raises :class:`Busy` where there is no room,
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
        entry = _Entry(job, (ticket - HEAD_START * job.priority, ticket))
        left = self._programs.left(job.graphs)
        assert left is not None  # it has been checked
        self._entries[ticket] = entry
        insort(self._all, entry.order)
        self._lines[job.size].come(entry.order, left)
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
        self._waiting -= line.waits(entry.order)
        self.steps_left -= line.left[entry.order].steps
        line.go(entry.order)
        remove(self._all, entry.order)
        if entry.job.deadline is not None:
            remove(self._deadlines, (entry.job.deadline, ticket))
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
        line = self._lines[entry.job.size] if entry else None
        if entry is None or line is None or not line.waits(entry.order):
            return 0
        return bisect_left(line.waiting, entry.order)

    # --- ticks ----------------------------------------------------------------------------------

    def tick(self) -> Tick | None:
        """Choose the next call, and give a row to those of its images that have none; None where nobody is there.

        :meth:`advance` has to follow for the images whose step was taken, :meth:`cancel` for others.
        """
        oldest = next((entry for _, ticket in self._all if self._may_run(entry := self._entries[ticket])), None)
        if oldest is None:
            return None
        size, line = oldest.job.size, self._lines[oldest.job.size]
        added = self.added[size]
        may_wait = added < 1 and oldest.passed < self.patience * len(oldest.job.graphs)
        graph, call = line.call(oldest.order, self._all, added=added, may_wait=may_wait)
        oldest.passed += oldest.order not in call
        joined = tuple(order[1] for order in call if line.start(order))
        self._waiting -= len(joined)
        self.ticks += 1
        return Tick(size=size, graph=graph, tickets=tuple(ticket for _, ticket in sorted(call)), joined=joined)

    def _may_run(self, entry: _Entry) -> bool:
        """Whether an image has a row or finds one free."""
        line = self._lines[entry.job.size]
        return line.free > 0 or not line.waits(entry.order)

    def advance(self, tickets: Iterable[int]) -> tuple[int, ...]:
        """The steps of those images are taken. Those that are through by it, which have left."""
        through = []
        for ticket in tickets:
            entry = self._entries[ticket]
            self.steps_left -= 1
            if self._lines[entry.job.size].step(entry.order):
                continue
            through.append(ticket)
            del self._entries[ticket]
            remove(self._all, entry.order)
            if entry.job.deadline is not None:
                remove(self._deadlines, (entry.job.deadline, ticket))
        return tuple(through)


def _line(room: Room) -> Line:
    counts = range(1, room.most + 1)
    takes = (0, *(max(min(most, count) for least, most in room.batches if least <= count) for count in counts))
    return Line(most=takes[-1], takes=takes, free=room.rows)
