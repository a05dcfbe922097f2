"""The search finds what trying everything finds, for a fraction of the pictures."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest

from tgate_runtime.tuning.search import GUIDING, LEAST, Goal, Point, front, guided, kept, pictures, search, sizes

M, K = range(1, 26), (1, 2, 3, 5)
IMAGES = 32


class Model:
    """Plans of which everything is known: time and quality grow with m, and fall with k, by amounts of their own.

    What a picture adds is nearly the same for each plan, as hard prompts are hard for all.
    """

    def __init__(self, seed: int, own: float = 0.2) -> None:
        """``own``: the deviation of what a picture does to one plan alone."""
        rng = np.random.default_rng(seed)
        self.places = {f"m={m} k={k}": (m, a) for m, (a, k) in itertools.product(M, enumerate(K))}
        gain, loss, saved = rng.uniform(0.5, 1.0), rng.uniform(0.3, 1.5), rng.uniform(0.1, 0.3)
        picture = rng.normal(0, 2, IMAGES)
        self.times: dict[str, float] = {}
        self.quality: dict[str, list[float]] = {}
        for name, (m, a) in self.places.items():
            self.times[name] = 100 + 10 * m - saved * a * 10 * m / 3
            mean = 15 + gain * m - loss * a * m / 25
            self.quality[name] = list(mean + picture + rng.normal(0, own, IMAGES))
        self.drawn: dict[str, int] = {}

    def measure(self, name: str, count: int) -> list[float]:
        self.drawn[name] = max(count, self.drawn.get(name, 0))
        return self.quality[name][:count]

    def near(self, name: str) -> list[str]:
        m, a = self.places[name]
        return [o for o, (x, y) in self.places.items() if o != name and abs(x - m) <= 1 and abs(y - a) <= 1]

    def search(self, goal: Goal) -> list[Point]:
        start = [name for name, (m, _) in self.places.items() if m % 3 == 1]
        return search(self.times, self.measure, goal, images=IMAGES, start=start, near=self.near)

    def every(self) -> list[Point]:
        return [Point(name, ms, tuple(self.quality[name])) for name, ms in self.times.items()]


class Verdicts(Model):
    """The same plans where a judge finds a picture as right as the ungated one, or not, by chance: the better a plan
    is, the seldomer not; and ``nearness`` to go by."""

    IMAGES = 400

    def __init__(self, seed: int) -> None:
        super().__init__(seed, own=0.0)
        self.nearness, rng = self.quality, np.random.default_rng(seed)
        lots = rng.uniform(0, 1, self.IMAGES)
        means = {name: float(np.mean(values)) for name, values in self.nearness.items()}
        best = max(means.values())
        self.quality = {n: [-100.0 * (lot < (best - m) / 100) for lot in lots] for n, m in means.items()}

    def guided(self, goal: Goal, kinds: Mapping[str, str] | None = None) -> list[Point]:
        start = [name for name, (m, _) in self.places.items() if m % 3 == 1]

        def guide(name: str, count: int) -> list[float]:
            return self.nearness[name][:count]

        kind = (kinds or dict.fromkeys(self.places, "")).__getitem__
        of = self.IMAGES
        return guided(self.times, guide, self.measure, goal, images=of, start=start, near=self.near, kind=kind)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("least", [-3.0, -6.0, -10.0])
def test_verdicts_are_looked_for_along_the_line_of_what_is_near(seed: int, least: float) -> None:
    model, goal = Verdicts(seed), Goal(least=least)
    points = model.guided(goal)
    found, best = goal.chosen(points), goal.chosen(model.every())
    assert found is not None
    assert best is not None
    assert found.bounds[0] >= least
    assert best.ms <= found.ms <= 1.1 * best.ms
    assert {len(point.values) for point in points} == {model.IMAGES}
    assert len(points) <= 12  # of a hundred


def test_kinds_that_change_pictures_in_different_ways_are_not_told_apart_by_nearness() -> None:
    """Half of the plans move pictures far away and lose half as many: the fastest of them is found, which in one line
    with the others would not be looked at."""
    model, goal = Verdicts(2), Goal(least=-3.0)
    kinds = {name: "far" if k % 2 else "near" for name, (_, k) in model.places.items()}
    for name in (name for name, kind in kinds.items() if kind == "far"):
        model.nearness[name] = [value - 40 for value in model.nearness[name]]
        model.quality[name] = [value * (i % 2) for i, value in enumerate(model.quality[name])]
    of_one = goal.chosen(model.guided(goal))
    found, best = goal.chosen(model.guided(goal, kinds)), goal.chosen(model.every())
    assert found is not None
    assert best is not None
    assert of_one is not None
    assert kinds[of_one.name] == "near"
    assert kinds[found.name] == "far"
    assert best.ms <= found.ms <= 1.05 * best.ms < of_one.ms


def test_no_verdict_that_will_do_is_none_and_the_nearest_was_tried() -> None:
    model, goal = Verdicts(0), Goal(least=5.0)
    points = model.guided(goal)
    assert goal.chosen(points) is None
    nearest = max((n for n, (m, _) in model.places.items() if m % 3 == 1), key=lambda n: sum(model.nearness[n]))
    assert nearest in {point.name for point in points}


def test_of_the_plans_that_are_fast_enough_those_that_are_near_are_judged() -> None:
    model, goal = Verdicts(1), Goal(most_ms=220.0)
    points = model.guided(goal)
    assert len(points) == LEAST
    assert all(point.ms <= 220 for point in points)
    near = front(Point(n, model.times[n], tuple(v[:GUIDING])) for n, v in model.nearness.items() if n in model.drawn)
    assert {point.name for point in points} <= {point.name for point in near}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("least", [17.0, 20.0, 23.0, 26.0])
def test_the_fastest_plan_within_a_budget_is_found(seed: int, least: float) -> None:
    model, goal = Model(seed, own=0.0), Goal(least=least)
    found, best = goal.chosen(model.search(goal)), goal.chosen(model.every())
    assert (found and found.name) == (best and best.name)
    assert found is None or found.bounds[0] >= least
    assert sum(model.drawn.values()) < IMAGES * len(model.times) / 4


@pytest.mark.parametrize("seed", range(8))
def test_where_plans_fare_differently_with_each_picture_what_is_found_is_hardly_slower(seed: int) -> None:
    model, goal = Model(seed), Goal(least=20.0)
    found, best = goal.chosen(model.search(goal)), goal.chosen(model.every())
    assert found is not None
    assert best is not None
    assert found.bounds[0] >= 20.0
    assert best.ms <= found.ms <= 1.02 * best.ms


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("most_ms", [150.0, 220.0, 290.0])
def test_the_best_plan_of_those_that_are_fast_enough_is_found(seed: int, most_ms: float) -> None:
    model, goal = Model(seed), Goal(most_ms=most_ms)
    found, best = goal.chosen(model.search(goal)), goal.chosen(model.every())
    assert found is not None
    assert best is not None
    assert found.name == best.name
    assert found.ms <= most_ms
    assert all(model.times[name] <= most_ms for name in model.drawn)  # what cannot be taken is not drawn


def test_what_cannot_be_met_is_none() -> None:
    goal = Goal(least=99.0)
    points = Model(0).search(goal)
    assert goal.chosen(points) is None
    assert max(points, key=lambda p: p.mean).name.startswith("m=25")  # and the best there is was among them


def test_each_point_holds_all_pictures_and_progress_ends_at_its_total() -> None:
    model, told = Model(1), list[tuple[int, int]]()
    points = search(
        model.times,
        model.measure,
        Goal(least=20.0),
        images=IMAGES,
        start=list(model.times),
        near=model.near,
        on_picture=lambda done, total, _: told.append((done, total)),
    )
    assert {len(point.values) for point in points} == {IMAGES}
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1] >= sum(model.drawn.values())  # those measured twice are counted twice


def test_a_choice_goes_by_the_lower_bound_and_not_by_the_mean() -> None:
    sure, unsure = Point("sure", 2.0, (30.0,) * 8), Point("unsure", 1.0, (20.0, 41.0) * 4)
    assert unsure.mean > 30
    chosen = Goal(least=29.0).chosen([unsure, sure])
    assert chosen is sure


def test_the_front_is_what_nothing_is_faster_and_better_than() -> None:
    values: Mapping[str, tuple[float, float]] = {"a": (1, 5), "b": (2, 4), "c": (2, 7), "d": (3, 7), "e": (4, 9)}
    points = [Point(name, ms, (q, q)) for name, (ms, q) in values.items()]
    assert [point.name for point in front(points)] == ["a", "c", "e"]
    assert [point.name for point in kept(points, 4, Goal(least=7.0), points[0])] == ["c", "a", "e", "d"]
    assert [point.name for point in kept(points, 2, Goal(least=9.0), points[0])] == ["e", "c"]


def test_a_point_on_few_pictures_is_placed_by_its_distance_from_one_on_all() -> None:
    anchor = Point("anchor", 2.0, (20.0, 20.0, 40.0, 40.0, 40.0, 40.0, 40.0, 40.0))
    point = Point("point", 1.0, (21.0, 21.0))  # one better than the anchor on the two hardest
    assert Goal(least=30.0).distance(point, anchor) == pytest.approx(abs(anchor.bounds[0] + 1 - 30))


def test_rounds_halve_plans_and_double_pictures() -> None:
    assert sizes(74, 32, 4) == [(74, 4), (37, 8), (19, 16), (10, 32)]
    assert sizes(100, 10, 4) == [(100, 4), (50, 8), (25, 10)]
    assert sizes(LEAST, 100, 4) == [(LEAST, 100)]
    assert sizes(50, 4, 8) == [(50, 4)]
    assert sizes(20, 32, 8) == [(20, 8), (10, 16), (5, 32)]
    assert pictures(20, 32, 8) == 20 * 8 + 10 * 8 + 5 * 16
