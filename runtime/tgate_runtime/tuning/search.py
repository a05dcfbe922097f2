"""Which plan to take, of many whose time is known and whose quality has to be drawn. Pure: it knows no engine.

Successive halving: all plans are measured on a few pictures, the better half on twice as many, and so on; at the end
those next to the best are tried as well, until none of them is better. Where a few pictures tell nothing, plans are put
in a line by another measure, which a few do tell, and the line is searched by halves.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from tgate_runtime.tuning.quality import interval

FIRST = 4
"""Pictures of each plan in the first round."""
FIRST_NEAR = 8
"""The same where plans next to the best are tried, which differ less."""
LEAST = 4
"""Plans that go on at least: so few are measured on all pictures at once."""

GUIDING = 8
"""Pictures of each plan by which :func:`guided` puts it in its line."""

BASES = 4
"""Points next to which others are tried: those of the front that are nearest to the goal."""

Measure = Callable[[str, int], Sequence[float]]
"""The quality of a plan, by its name, on the first so many pictures; the same numbers each time, more being better."""
OnPicture = Callable[[int, int, str], None]
"""Hears that pictures are done, of about how many, and the plan whose were the last."""


@dataclass(frozen=True)
class Point:
    """A plan: its time of one picture, and its quality on each of those it was measured on."""

    name: str
    ms: float
    values: tuple[float, ...]

    @cached_property
    def mean(self) -> float:
        """Of the qualities."""
        return math.fsum(self.values) / len(self.values)

    @cached_property
    def bounds(self) -> tuple[float, float]:
        """Of the mean, at 95 %."""
        return interval(self.values)


@dataclass(frozen=True, kw_only=True)
class Goal:
    """What is asked for, one of two: the fastest plan whose quality is ``least`` or better, by the lower bound of its
    mean; or the best quality, by its mean, of the plans that take ``most_ms`` at most."""

    least: float | None = None
    most_ms: float | None = None

    def chosen(self, points: Iterable[Point]) -> Point | None:
        """The one to take; None where no point will do."""
        if self.least is not None:
            least = self.least
            return min((p for p in points if p.bounds[0] >= least), key=lambda p: (p.ms, -p.mean, p.name), default=None)
        return max((p for p in points if self.allows(p.ms)), key=lambda p: (p.mean, -p.ms, p.name), default=None)

    def allows(self, ms: float) -> bool:
        """Whether a plan of that time can be the one."""
        return self.most_ms is None or ms <= self.most_ms

    def distance(self, point: Point, anchor: Point) -> float:
        """How far a point is from where the choice falls, to prefer one of several that are as good.

        ``anchor``: a point that was measured on all pictures. What is hard about a picture is hard for every plan: how
        much better a plan is on a few pictures than the anchor on the same tells more than those few alone would.
        """
        if self.least is None:
            return -point.mean
        same = anchor.values[: len(point.values)]
        return abs(anchor.bounds[0] + point.mean - math.fsum(same) / len(same) - self.least)


def front(points: Iterable[Point]) -> list[Point]:
    """Those that no other is both faster and better than, the fastest first: Pareto's front."""
    best: list[Point] = []
    for point in sorted(points, key=lambda p: (p.ms, -p.mean, p.name)):
        if not best or point.mean > best[-1].mean:
            best.append(point)
    return best


def search(
    times: Mapping[str, float],
    measure: Measure,
    goal: Goal,
    *,
    images: int,
    start: Collection[str],
    near: Callable[[str], Iterable[str]],
    on_picture: OnPicture | None = None,
) -> list[Point]:
    """The points that were measured on all ``images`` pictures, the fastest first; :meth:`Goal.chosen` is among them
    if any plan that was tried will do.

    ``times``: milliseconds of a picture, of every plan by its name. ``start``: where to begin. ``near(name)``: plans
    that differ little from one. The same measurements always give the same points, in whatever run they were made.
    """
    rounds = _Rounds(times, measure, goal, images, on_picture)
    first = sorted((name for name in start if goal.allows(times[name])), key=lambda name: (times[name], name))
    if not first:
        return []
    rounds.total = images + pictures(len(first), images, FIRST)
    anchor = rounds.whole(first[len(first) // 2])
    found = rounds.halved(first, anchor, FIRST)
    best, left_behind = goal.chosen(found), set[str]()
    while True:
        bases = sorted(front(found), key=lambda p: (goal.distance(p, anchor), p.name))[:BASES]
        around = {name for base in bases for name in near(base.name)} - {point.name for point in found}
        fresh = [name for name in around - left_behind if goal.allows(times[name])]
        if best is not None and goal.least is not None:
            fresh = [name for name in fresh if times[name] < best.ms]
        if not fresh:
            return sorted(found, key=lambda p: (p.ms, p.name))
        rounds.total += pictures(len(fresh), images, FIRST_NEAR)
        found += rounds.halved(fresh, bases[0], FIRST_NEAR)
        before, best = best, goal.chosen(found)
        # Who was left behind beside another one may be who comes next: each has a chance beside the best there is.
        left_behind = left_behind.union(fresh) if best == before else set()


def guided(
    times: Mapping[str, float],
    guide: Measure,
    measure: Measure,
    goal: Goal,
    *,
    images: int,
    start: Collection[str],
    near: Callable[[str], Iterable[str]],
    kind: Callable[[str], Hashable] = lambda name: None,
    on_picture: OnPicture | None = None,
) -> list[Point]:
    """As :func:`search`, for a quality of which few pictures tell little, such as a share of them that is right.

    Plans of one ``kind`` stand in a line, Pareto's front by ``guide`` on :data:`GUIDING` pictures: the farther along,
    the slower and the better. What ``guide`` tells of plans that change pictures in different ways says nothing of
    which is right, so each kind has a line of its own, the largest first. Where the goal is a quality, the middle of
    the line is measured, then that of the faster or the slower half, and so on, and of the next line what would be
    faster than the best so far; then the same again next to the best of each, until nothing is faster. Where it is a
    time, the :data:`LEAST` best of each front are measured.
    """
    few, done, total = min(GUIDING, images), 0, 0
    seen, found = set[str](), dict[Hashable, list[Point]]()

    def measured(name: str, by: Measure, count: int) -> Point:
        nonlocal done
        point = Point(name, times[name], tuple(by(name, count)))
        done += count
        if on_picture is not None:
            on_picture(done, max(done, total), name)
        return point

    def lines(names: Collection[str]) -> dict[Hashable, list[Point]]:
        nonlocal total
        seen.update(names)
        of_kind: dict[Hashable, list[str]] = {}
        for name in sorted(names, key=lambda name: (times[name], name)):
            of_kind.setdefault(kind(name), []).append(name)
        wholes = sum(LEAST if goal.least is None else len(own).bit_length() for own in of_kind.values())
        total = done + few * len(names) + images * wholes
        largest = sorted(of_kind.items(), key=lambda item: -len(item[1]))
        return {of: front([measured(name, guide, few) for name in own]) for of, own in largest}

    def fastest() -> Point | None:
        return goal.chosen(itertools.chain(*found.values()))

    def everything() -> list[Point]:
        return sorted(itertools.chain(*found.values()), key=lambda p: (p.ms, p.name))

    stands = lines([name for name in start if goal.allows(times[name])])
    if goal.least is None:
        for of, stand in stands.items():
            found[of] = [measured(point.name, measure, images) for point in stand[-LEAST:]]
        return everything()
    while True:
        before = fastest()
        for of, stand in stands.items():
            own, best = found.setdefault(of, []), fastest()
            faster = [point for point in stand if best is None or point.ms < best.ms]
            low, high = 0, len(faster)
            while low < high:
                middle = (low + high) // 2
                total = max(total, done + images * (high - low).bit_length())
                own.append(measured(faster[middle].name, measure, images))
                low, high = (low, middle) if goal.chosen(own[-1:]) else (middle + 1, high)
        best = fastest()
        if best is None or best == before:
            return everything()
        bests = filter(None, map(goal.chosen, found.values()))
        fresh = {name for own in bests for name in near(own.name) if times[name] < best.ms} - seen
        if not fresh:
            return everything()
        stands = lines(fresh)


def sizes(plans: int, images: int, first: int) -> list[tuple[int, int]]:
    """How many plans each round measures, and on how many pictures, those of the rounds before it included; ``first``
    in the first one."""
    count, rounds = min(first, images), list[tuple[int, int]]()
    while True:
        count = images if plans <= LEAST else count
        rounds.append((plans, count))
        if count == images:
            return rounds
        plans, count = min(plans, max(LEAST, math.ceil(plans / 2))), min(2 * count, images)


def pictures(plans: int, images: int, first: int) -> int:
    """How many pictures all rounds draw together."""
    rounds = sizes(plans, images, first)
    return sum(more * (count - had) for (more, count), (_, had) in zip(rounds, [(0, 0), *rounds], strict=False))


def kept(points: Sequence[Point], number: int, goal: Goal, anchor: Point) -> list[Point]:
    """The better ``number`` of points: the front, then the front of the others, and so on; of the last, those that are
    nearest to the goal."""
    better: list[Point] = []
    left = list(points)
    while left and len(better) < number:
        best = front(left)
        better += sorted(best, key=lambda p: (goal.distance(p, anchor), p.name))[: number - len(better)]
        left = [point for point in left if point not in best]
    return better


class _Rounds:
    """Halving, and what it tells of."""

    def __init__(
        self, times: Mapping[str, float], measure: Measure, goal: Goal, images: int, on_picture: OnPicture | None
    ) -> None:
        self._times, self._measure, self._goal, self._images = times, measure, goal, images
        self._on_picture = on_picture
        self._done = self.total = 0

    def whole(self, name: str) -> Point:
        """A plan on all pictures."""
        return self.halved([name], Point(name, 0.0, ()), FIRST)[0]

    def halved(self, names: Iterable[str], anchor: Point, first: int) -> list[Point]:
        """The points that are left when all pictures are measured."""
        pool = sorted(names, key=lambda name: (self._times[name], name))
        rounds = sizes(len(pool), self._images, first) if pool else []
        before = [0, *(count for _, count in rounds)]
        points: list[Point] = []
        for (plans, count), had in zip(rounds, before, strict=False):
            if points:
                pool = [point.name for point in kept(points, plans, self._goal, anchor)]
            points = [self._point(name, count, count - had) for name in pool]
        return points

    def _point(self, name: str, count: int, new: int) -> Point:
        point = Point(name, self._times[name], tuple(self._measure(name, count)))
        self._done += new
        if self._on_picture is not None:
            self._on_picture(self._done, self.total, name)
        return point
