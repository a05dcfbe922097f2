"""Trajectories that begin from a picture, without torch: which steps are left, what they take, and what is no start."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.toy_bundle import SAMPLERS, Toy, build, make_plan, sampler, starts
from tgate_engine.bundle import Bundle
from tgate_engine.errors import BundleError, PlanError
from tgate_engine.plan import Plan
from tgate_engine.sampler import Sampler
from tgate_engine.sampler_tables import dump_tables, load_tables
from tgate_engine.starts import STARTS, Starts, begin_of, plan_from, start_rows
from tgate_engine.step import step_row
from tgate_export.methods.base import Settings

SETTINGS = {"default": Settings(steps=8, gate=5, self_interval=2, warm_up=0)}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(build(tmp_path_factory.mktemp("starts") / "toy", Toy(begins=True, settings=SETTINGS)))


@pytest.fixture(scope="module")
def found(bundle: Bundle) -> Starts:
    return Starts.load(bundle.file(bundle.manifest.samplers))


@pytest.fixture
def plan(bundle: Bundle) -> Plan:
    return bundle.manifest.plan("default")


def left(bundle: Bundle, found: Starts, plan: Plan, begin: int) -> Plan:
    manifest = bundle.manifest
    return plan_from(plan, found.find(plan, begin), manifest.shapes[0].graphs, manifest.carries)


@pytest.mark.parametrize(
    ("steps", "strength", "begin"),
    [(25, 1.0, 0), (25, 0.6, 10), (25, 0.59, 11), (50, 0.58, 22), (4, 0.25, 3), (3, 0.99, 1), (1, 1.0, 0)],
)
def test_steps_are_left_out_as_diffusers_counts_them(steps: int, strength: float, begin: int) -> None:
    """50 * 0.58 is below 29 in floating point, and 28 steps are taken, as diffusers takes them."""
    assert begin_of(steps, strength) == begin


def test_a_strength_that_leaves_no_step(bundle: Bundle) -> None:
    with pytest.raises(PlanError, match=r"strength 0\.1 leaves none of 8 steps; take 0\.13 or more"):
        begin_of(8, 0.1)


@pytest.mark.parametrize("begin", range(8))
def test_what_is_left_of_a_plan(bundle: Bundle, found: Starts, plan: Plan, begin: int) -> None:
    """The graphs of its first steps, at the timesteps of its last; what looks back has nothing to look at at first."""
    taken = left(bundle, found, plan, begin)
    assert [step.graph for step in taken.steps] == [step.graph for step in plan.steps][: 8 - begin]
    assert [step.call.timestep for step in taken.steps] == [step.call.timestep for step in plan.steps][begin:]
    assert [step.index for step in taken.steps] == [*range(8 - begin)]
    assert (taken.sampler.steps, taken.sampler.initial_scale) == (8 - begin, 1.0)
    assert all(step.call.lag <= step.index for step in taken.steps)
    for step, whole in zip(taken.steps[3:], plan.steps[begin + 3 :], strict=False):
        np.testing.assert_array_equal(step_row(step.call, 0.0), step_row(whole.call, 0.0))
    assert taken.settings == {**plan.settings, "begin": begin}


def test_what_nobody_reads_any_more_is_not_written(bundle: Bundle, found: Starts, plan: Plan) -> None:
    """A plan that ends before its gate stores nothing for after it."""
    assert any(name.startswith("cross") for step in plan.steps for name in step.writes)
    taken = left(bundle, found, plan, 4)
    assert {name.partition(".")[0] for step in taken.steps for name in step.writes} == {"self"}
    assert not left(bundle, found, plan, 7).carries()


def test_a_picture_is_noised_as_the_level_says(found: Starts, plan: Plan) -> None:
    start = found.find(plan, 6)
    picture, noise = np.full((2, 3), 2.0, np.float32), np.full((2, 3), 1.0, np.float32)
    for call, (own, added) in enumerate(start.levels):
        np.testing.assert_allclose(start.noised(picture, noise, call), 2 * own + added, rtol=1e-6)
    assert start.noised(picture, noise).dtype == np.float32
    assert len(start.levels) == 2


def test_tables_hold_what_they_were_made_of(bundle: Bundle, found: Starts) -> None:
    for steps in (1, 2, 4, 8):
        whole = sampler(steps)
        made = make_plan("x", Settings(steps=steps, gate=1), Toy(), bundle.manifest.shapes[0].graphs)
        for start in starts(whole):
            again = found.find(made, start.begin)
            assert (again.begin, again.free) == (start.begin, steps != 4)
            np.testing.assert_allclose(again.levels, start.levels, rtol=1e-6)
            mine, theirs = (np.stack([step_row(c, 0.0) for c in each.calls]) for each in (again, start))
            np.testing.assert_array_equal(mine, theirs)


def test_a_bundle_without_starts_is_told(bundle: Bundle, plan: Plan, tmp_path: Path) -> None:
    (tmp_path / "samplers").write_bytes(dump_tables([sampler(8)]))
    with pytest.raises(PlanError, match=r"has no start from a picture; make .* \(none: export the bundle again\)"):
        Starts.load(tmp_path / "samplers").find(plan, 2)
    assert load_tables(tmp_path / "samplers").keys() == {("toy", 8)}


def test_another_sampler_is_told(found: Starts, plan: Plan) -> None:
    other = replace(plan, sampler=replace(plan.sampler, name="euler"))
    with pytest.raises(PlanError, match=r"takes 8 steps of sampler 'euler', for which .* it has \(toy of 1, toy of 2"):
        found.find(other, 2)


def test_a_sampler_whose_calls_are_not_all_made_is_told(found: Starts, plan: Plan) -> None:
    """A forecast has other coefficients, and as many steps as some other sampler of the same name."""
    calls = (*plan.sampler.calls[:-1], replace(plan.sampler.calls[-1], input_scale=0.25))
    with pytest.raises(PlanError, match="does not make every network call of sampler toy as it is"):
        found.find(replace(plan, sampler=replace(plan.sampler, calls=calls)), 2)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda rows: rows[:-1],
        lambda rows: rows[:, :-1],
        lambda rows: rows[:, :2],
        lambda rows: rows.astype(np.float64),
        lambda rows: rows * np.float32(np.nan),
    ],
)
def test_damaged_tables(tmp_path: Path, spoil: Callable[[Any], Any]) -> None:
    whole: Sampler = sampler(5)
    path = tmp_path / SAMPLERS
    path.write_bytes(dump_tables([whole], {f"toy.5{STARTS}": np.ascontiguousarray(spoil(start_rows(starts(whole))))}))
    with pytest.raises(BundleError, match=r"holds no tables of starts .*; export the bundle again"):
        Starts.load(path)


@pytest.mark.parametrize("name", [f"toy.x{STARTS}", f"toy.6{STARTS}", STARTS])
def test_tables_of_nothing(tmp_path: Path, name: str) -> None:
    path = tmp_path / SAMPLERS
    path.write_bytes(dump_tables([sampler(5)], {name: start_rows(starts(sampler(5)))}))
    assert name in load_file(path)
    with pytest.raises(BundleError, match="holds no tables of starts"):
        Starts.load(path)
