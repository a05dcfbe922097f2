"""A state's rows: images of their own, which share calls and nothing else."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.runtime.pictures import GUIDANCE, Picture, planned
from tests.toy_bundle import Toy, build, make_plan, sampler
from tgate_engine.dtypes import storage
from tgate_engine.errors import EngineError, PlanError, RequestError
from tgate_engine.plan import Plan
from tgate_export.methods.base import Settings
from tgate_runtime.engines.ort import OrtCpu
from tgate_runtime.runner import StepDone, advance, run
from tgate_runtime.session import Session
from tgate_runtime.state import State, most_at_once, shape_for


@pytest.fixture(scope="module")
def plans(session: Session) -> dict[str, Plan]:
    """Plans that meet in every graph, at other positions, and with other writes there."""
    stored = session.manifest.plans
    return {
        "gated": stored["default"],
        "ungated": stored["ungated"],
        "stopped": stored["guidance_stopped"],
        "deep": stored["deep"],
        "early": planned(session, name="early", steps=7, gate=2, self_interval=2, warm_up=0),
        "noisy": planned(session, name="noisy", steps=6, gate=4, fidelity_interval=3, noise=0.3),
        "lead-in": planned(session, name="lead-in", steps=5, gate=3, self_interval=2, warm_up=0, lead_in=1),
    }


def walk(state: State) -> list[StepDone]:
    """Take every step that is left, in as few calls as neighbours allow."""
    taken = []
    while ranges := state.together():
        taken += [advance(state, rows) for rows in ranges]
    return taken


def contents(state: State) -> dict[str, NDArray[Any]]:
    """Every buffer of a state, as it is now."""
    return {name: buffer.read() for name, buffer in state._buffers.items()}


# --- images that share calls --------------------------------------------------------------------


def test_two_requests_of_one_plan_at_other_positions(session: Session, plans: dict[str, Plan]) -> None:
    """Both at ``full`` with other timesteps, then at ``reuse_cross`` three steps apart: bit for bit as alone."""
    first, second = Picture(plans["gated"], 1, 2.0), Picture(plans["gated"], 2, 7.5)
    state = State(session, plans["gated"], 2)
    first.begin(session, state, 0)
    for _ in range(2):
        advance(state, range(1))
    second.begin(session, state, 1)
    taken = walk(state)
    shared = [done for done in taken if len(done.rows) == 2]
    assert {done.step.graph for done in shared} == {"full", "reuse_cross"}
    assert all(done.steps[0].index == done.steps[1].index + 2 for done in shared)
    np.testing.assert_array_equal(state.latents(0), first.alone(session))
    np.testing.assert_array_equal(state.latents(1), second.alone(session))


def test_a_gated_and_an_ungated_request_share_full(session: Session, plans: dict[str, Plan]) -> None:
    """What one of them writes there, the other never reads."""
    for order in (("gated", "ungated"), ("ungated", "gated")):
        pictures = [Picture(plans[name], seed, 2.0 + seed) for seed, name in enumerate(order)]
        state = State(session, [plans["gated"], plans["ungated"]], 2)
        for row, picture in enumerate(pictures):
            picture.begin(session, state, row)
        taken = walk(state)
        shared = [done for done in taken if len(done.rows) == 2]
        assert len(shared) >= 3
        assert any(set(done.steps[0].writes) != set(done.steps[1].writes) for done in shared)
        for row, picture in enumerate(pictures):
            np.testing.assert_array_equal(state.latents(row), picture.alone(session))


def test_requests_of_other_plans_share_reuse_cross(session: Session, plans: dict[str, Plan]) -> None:
    """At other positions, and one of them keeping means that the other does not."""
    pictures = [Picture(plans["early"], 3), Picture(plans["deep"], 4, 5.0)]
    state = State(session, [plans["early"], plans["deep"]], 2)
    for row, picture in enumerate(pictures):
        picture.begin(session, state, row)
    while (step := state.step(0)) and step.graph != "reuse_cross":
        advance(state, range(1))
    while (step := state.step(1)) and step.graph != "reuse_cross":
        advance(state, range(1, 2))
    done = advance(state, range(2))
    assert [step.graph for step in done.steps] == ["reuse_cross"] * 2
    assert done.steps[0].index != done.steps[1].index
    assert not done.steps[0].writes
    assert done.steps[1].writes
    assert len([d for d in walk(state) if len(d.rows) == 2]) >= 1
    for row, picture in enumerate(pictures):
        np.testing.assert_array_equal(state.latents(row), picture.alone(session))


@functools.cache
def alone(session: Session, picture: Picture) -> bytes:
    return picture.alone(session).tobytes()


@pytest.mark.parametrize("seed", range(40))
def test_images_that_come_and_go_equal_those_that_were_alone(
    session: Session, plans: dict[str, Plan], seed: int
) -> None:
    """Any plans, seeds, scales and times of joining, in rows that are taken again, and any neighbours in a call."""
    rng = np.random.default_rng(seed)
    rows = int(rng.integers(2, 5))
    state = State(session, list(plans.values()), rows)
    running: dict[int, Picture] = {}
    waiting = [
        Picture(list(plans.values())[rng.integers(len(plans))], int(rng.integers(4)), float(rng.choice([1.5, 3, 7])))
        for _ in range(rng.integers(2, 8))
    ]
    while waiting or running:
        free = [row for row in range(rows) if row not in running]
        if waiting and free and (not running or rng.random() < 0.5):
            row = int(rng.choice(free))
            running[row] = waiting.pop()
            running[row].begin(session, state, row)
        ranges = state.together()
        neighbours = ranges[rng.integers(len(ranges))]
        first = int(rng.integers(neighbours.start, neighbours.stop))
        advance(state, range(first, int(rng.integers(first + 1, neighbours.stop + 1))))
        for row in [row for row in running if state.step(row) is None]:
            assert state.latents(row).tobytes() == alone(session, running.pop(row))


@pytest.mark.parametrize("seed", range(20))
def test_images_that_move_equal_those_that_stay(session: Session, plans: dict[str, Plan], seed: int) -> None:
    """To any empty row, before any step, out of rows whose every buffer is overwritten as soon as they have left."""
    rng = np.random.default_rng(seed)
    state = State(session, list(plans.values()), 4)
    names = list(plans)
    running = {row: Picture(plans[names[rng.integers(len(names))]], row, 2.0 + row) for row in range(3)}
    for row, picture in running.items():
        picture.begin(session, state, row)
    moved = 0
    while running:
        row = int(rng.choice(list(running)))
        (empty, *_) = (r for r in range(4) if r not in running)
        if rng.random() < 0.5:
            assert state.move(row, empty) > 0
            for buffer in state._view(row, 1).values():  # whoever went on reading here would be seen
                buffer.write(np.full((), 3, storage(buffer.dtype)))
            running[empty] = running.pop(row)
            row, moved = empty, moved + 1
        if state.step(row) is not None:
            advance(state, range(row, row + 1))
            continue
        assert state.latents(row).tobytes() == alone(session, running.pop(row))
        state.end(row)
    assert moved > 5


def test_a_move_copies_the_carries_that_are_still_read(session: Session, plans: dict[str, Plan]) -> None:
    """None before the first step, those of each step's future afterwards, none at the end."""
    plan = plans["gated"]
    state = State(session, plan, 2)
    Picture(plan, 1).begin(session, state, 0)
    sizes = {name: math.prod(buffer.shape[1:]) * buffer.read().itemsize for name, buffer in state.carries().items()}
    row, copied, wanted = 0, [], []
    for position in range(len(plan.steps) + 1):
        copied.append(state.move(row, 1 - row))
        row = 1 - row
        live: set[str] = set()
        for step in reversed(plan.steps[position:]):
            live = (live - set(step.writes)) | set(step.reads)
        wanted.append(sum(sizes[name] for name in live))
        if state.step(row) is not None:
            advance(state, range(row, row + 1))
    assert [each - copied[0] for each in copied] == wanted
    assert wanted[0] == wanted[-1] == 0 < max(wanted)


def test_an_image_moves_to_a_row_without_one(session: Session, plans: dict[str, Plan]) -> None:
    state = State(session, plans["gated"], 3)
    for row in range(2):
        Picture(plans["gated"], row).begin(session, state, row)
    for row, to in ((0, 1), (0, 0), (2, 0), (2, 2)):
        with pytest.raises(RequestError, match=f"row {row} has .*, row {to} "):
            state.move(row, to)
    with pytest.raises(RequestError, match="rows 0 to 2, got 3"):
        state.move(0, 3)
    state.end(1)
    assert state.step(1) is None
    state.move(0, 1)
    assert state.step(0) is None
    assert state.step(1) == plans["gated"].steps[0]


def test_the_shipped_models_images_share_calls(shipped_bundle: Path) -> None:
    """A real network: two requests of its gated plan two steps apart, beside an ungated one, bit for bit as alone."""
    with Session.open(shipped_bundle, threads=1, memory="fast", plans=["default", "ungated"]) as session:
        gated, ungated = session.manifest.plan("default"), session.manifest.plan("ungated")
        pictures = [Picture(gated, 1, 5.0), Picture(gated, 2, 3.0), Picture(ungated, 3, 7.5)]
        state = State(session, [gated, ungated], 3)
        pictures[0].begin(session, state, 0)
        for _ in range(2):
            advance(state, range(1))
        for row in (1, 2):
            pictures[row].begin(session, state, row)
        shared = [done for done in walk(state) if len(done.rows) > 1]
        assert {done.step.graph for done in shared} == {*gated.graphs()} >= {"full", "reuse_cross"}
        assert any(done.steps[0].index != done.steps[-1].index for done in shared)
        assert any(set(done.steps[0].writes) != set(done.steps[-1].writes) for done in shared)
        for row, picture in enumerate(pictures):
            np.testing.assert_array_equal(state.latents(row), picture.alone(session))


def test_an_image_joins_in_a_free_row(session: Session, plans: dict[str, Plan]) -> None:
    """Where another one has ended, which leaves it nothing; its neighbour goes on."""
    plan = plans["gated"]
    last = Picture(plan, 5)
    state = State(session, plan, 2)
    neighbour = Picture(plan, 6)
    Picture(plan, 7).begin(session, state, 0)
    while state.step(0) is not None:
        advance(state, range(1))
        if state.step(0) is not None and state.step(0).index == 6:  # type: ignore[union-attr]
            neighbour.begin(session, state, 1)
    advance(state, range(1, 2))
    last.begin(session, state, 0)
    walk(state)
    np.testing.assert_array_equal(state.latents(0), last.alone(session))
    np.testing.assert_array_equal(state.latents(1), neighbour.alone(session))


def test_an_image_that_is_not_finite_leaves_nothing_behind(session: Session, plans: dict[str, Plan]) -> None:
    """To none that runs beside it, and to none that comes after it in its row: what has the coefficient 0 is read."""
    state = State(session, [plans["noisy"], plans["gated"]], 2)
    last, neighbour = Picture(plans["gated"], 1), Picture(plans["gated"], 2)
    nothing = np.full((2, 4, 4), 2e38, np.float32)  # finite when it comes in, and not for long
    broken = Picture(plans["noisy"], 3)
    state.begin(
        0, nothing, broken.conditioning(session), guidance_scale=3.0, plan=broken.plan, step_noise=lambda _: nothing
    )
    neighbour.begin(session, state, 1)
    walk(state)
    assert not np.isfinite(state.latents(0)).any()
    np.testing.assert_array_equal(state.latents(1), neighbour.alone(session))
    last.begin(session, state, 0)
    walk(state)
    np.testing.assert_array_equal(state.latents(0), last.alone(session))


def test_rows_outside_a_call_are_untouched(session: Session, plans: dict[str, Plan]) -> None:
    """Of every buffer there is, byte for byte."""
    state = State(session, [plans["gated"], plans["noisy"]], 4)
    for row in range(4):
        Picture(plans["noisy" if row % 2 else "gated"], row).begin(session, state, row)
    advance(state)  # all at ``full``
    changed = set()
    for rows in (range(1, 3), range(1), range(3, 4), range(2, 4)):
        before = contents(state)
        advance(state, rows)
        after = contents(state)
        outside = [row for row in range(4) if row not in rows]
        for name in before:
            np.testing.assert_array_equal(before[name][outside], after[name][outside], name)
            if not np.array_equal(before[name][list(rows)], after[name][list(rows)]):
                changed.add(name)
    assert {"latents", "latents.1", "latents.2", "latents.3", "output", "output.1", "noise", "step"} <= changed


def test_a_step_writes_its_carries_and_no_others(session: Session, plans: dict[str, Plan]) -> None:
    for plan in (plans["gated"], plans["deep"]):
        state = State(session, plan)
        Picture(plan, 1).begin(session, state, 0)
        before = {name: buffer.read() for name, buffer in state.carries().items()}
        for _ in plan.steps:
            done = advance(state)
            after = {name: buffer.read() for name, buffer in state.carries().items()}
            assert {name for name in after if not np.array_equal(before[name], after[name])} == set(done.step.writes)
            before = after


def test_noise_is_drawn_for_the_steps_that_add_it(session: Session, plans: dict[str, Plan]) -> None:
    """Once for each, by the image whose step it is."""
    plan, other = plans["noisy"], plans["ungated"]
    state = State(session, [plan, other], 2)
    drawn: list[tuple[int, int]] = []

    def drawing(row: int, picture: Picture) -> Any:
        def draw(step: int) -> NDArray[np.float32]:
            drawn.append((row, step))
            return picture.step_noise(session, step)

        return draw

    for row, picture in enumerate((Picture(plan, 1), Picture(other, 2))):
        state.begin(
            row,
            picture.start(session),
            picture.conditioning(session),
            guidance_scale=GUIDANCE,
            plan=picture.plan,
            step_noise=drawing(row, picture),
        )
    walk(state)
    assert drawn == [(0, index) for index, call in enumerate(plan.sampler.calls) if call.noise]
    assert 0 < len(drawn) < len(plan.steps)


# --- memory -------------------------------------------------------------------------------------


def test_nothing_moves_between_steps(session: Session, plans: dict[str, Plan]) -> None:
    """The engine is given the addresses of the state's own buffers, and they never change."""
    state = State(session, plans["deep"], 2)
    calls = state.calls()
    at = {name: buffer.address for name, buffer in state._buffers.items()}
    assert len(set(at.values())) == len(at), "two tensors share memory"
    graphs = session.shapes()[0].graphs
    for (graph, writes, first, count), call in calls.items():
        assert (first, count) == (0, 2)
        assert dict(call.addresses) == {name: at[name] for name in call.addresses}
        assert set(call.addresses) == {*graphs[graph].input_names(), "next_latents", "output", *writes}
    for row in range(2):
        Picture(plans["deep"], row).begin(session, state, row)
    for _ in plans["deep"].steps:
        advance(state)
        assert {name: buffer.address for name, buffer in state._buffers.items()} == at
        assert state.calls() == calls
        assert all(state.calls()[key] is call for key, call in calls.items())


def test_rows_are_bound_where_they_lie(session: Session, plans: dict[str, Plan]) -> None:
    """The call on rows 1 and 2 has the addresses of row 1 of the state's buffers, and their rows are contiguous."""
    state = State(session, plans["gated"], 4)
    for row in range(4):
        Picture(plans["gated"], row).begin(session, state, row)
    advance(state, range(1, 3))
    (call,) = [call for (_, _, first, count), call in state.calls().items() if (first, count) == (1, 2)]
    for name, address in call.addresses.items():
        buffer = state._buffers[name]
        assert address == buffer.address + buffer.read()[0].nbytes
    assert state._buffers["self.0"].shape == (4, 2, 32), "both halves lie inside an image's row"


def test_there_is_one_call_for_each_graph_and_what_it_writes(session: Session, plans: dict[str, Plan]) -> None:
    plan = plans["deep"]
    state = State(session, plan, 3)
    expected = {(step.graph, frozenset(step.writes), 0, 3) for step in plan.steps}
    assert set(state.calls()) == expected
    assert len(expected) > len(plan.graphs())
    for row in range(3):
        Picture(plan, row).begin(session, state, row)
    walk(state)
    assert set(state.calls()) == expected
    for row in range(3):
        Picture(plan, row).begin(session, state, row)
    advance(state, range(2))
    assert set(state.calls()) == {*expected, (plan.steps[0].graph, frozenset(plan.steps[0].writes), 0, 2)}


def test_a_buffer_is_allocated_for_what_plans_need(
    session: Session, plans: dict[str, Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[tuple[int, ...]] = []
    allocate = OrtCpu.allocate

    def counted(self: OrtCpu, shape: tuple[int, ...], dtype: str) -> Any:
        made.append(shape)
        return allocate(self, shape, dtype)

    monkeypatch.setattr(OrtCpu, "allocate", counted)
    lean = State(session, plans["ungated"], 2)
    assert lean.carries() == {}
    assert len(made) == len(contents(lean))
    assert all(shape[0] == 2 for shape in made)
    both = State(session, [plans["ungated"], plans["gated"]])
    assert set(both.carries()) == set(State(session, plans["gated"]).carries())


def test_history_moves_back_by_one_place_each_step(session: Session) -> None:
    plan = planned(session, steps=6, gate=6, warm_up=0)
    state = State(session, plan)
    Picture(plan, 1).begin(session, state, 0)
    latents, outputs = [state.latents(0)], list[NDArray[Any]]()
    for _ in plan.steps:
        advance(state)
        now = contents(state)
        latents.append(now["latents"][0])
        outputs.append(now["output"][0])
        np.testing.assert_array_equal(now["latents"], now["next_latents"])
        for lag in range(1, 4):
            zeros = np.zeros_like(latents[0])
            before = latents[-1 - lag] if lag < len(latents) else zeros
            np.testing.assert_array_equal(now[f"latents.{lag}"][0], before)
            np.testing.assert_array_equal(now[f"output.{lag}"][0], outputs[-lag] if lag <= len(outputs) else zeros)
        for lag, before in enumerate(state.history(0)[0]):
            np.testing.assert_array_equal(before, latents[-1 - lag] if lag < len(latents) else zeros)
        for lag, before in enumerate(state.history(0)[1]):
            np.testing.assert_array_equal(before, outputs[-1 - lag] if lag < len(outputs) else zeros)
    assert [len(each) for each in state.history(0)] == [4, 3]


def test_history_ends_where_the_sampler_does(session: Session, plans: dict[str, Plan]) -> None:
    """Of one that looks at nothing but what is there, the last output is kept, and no more is read."""
    own = sampler(3, lag=0)
    plan = make_plan("short", Settings(steps=3, gate=3), Toy(), session.shapes()[0].graphs, own_sampler=own)
    state = State(session, plan)
    assert not any(each.any() for each in state.history(0))
    Picture(plan, 1).begin(session, state, 0)
    for _ in plan.steps:
        advance(state)
    latents, outputs = state.history(0)
    np.testing.assert_array_equal(latents[0], state.latents(0))
    np.testing.assert_array_equal(outputs[0], contents(state)["output"][0])
    assert not latents[1:].any()
    assert not outputs[1:].any()


def test_latents_are_copies(session: Session, plans: dict[str, Plan]) -> None:
    state = State(session, plans["gated"], 2)
    Picture(plans["gated"], 1).begin(session, state, 0)
    for copied in (state.latents(0), state.latents()):
        kept = copied.copy()
        copied[:] = 0
        np.testing.assert_array_equal(state.latents(0), kept[0] if kept.ndim == 4 else kept)
    assert state.latents().shape == (2, 2, 4, 4)
    assert state.latents(1).shape == (2, 4, 4)


def test_latents_that_are_replaced_are_gone_on_from(session: Session, plans: dict[str, Plan]) -> None:
    """As if the step before had given them."""
    plan = planned(session, steps=2, gate=2, warm_up=0)
    first, second = Picture(plan, 1), Picture(plan, 2)
    state, other = State(session, plan), State(session, plan)
    first.begin(session, state, 0)
    replace(second, seed=1).begin(session, other, 0)
    state.replace_latents(0, second.start(session) * np.float32(1.25))
    other.replace_latents(0, np.zeros((2, 4, 4), np.float32))
    advance(state)
    advance(other)
    expected = State(session, plan)
    expected.begin(0, second.start(session), first.conditioning(session), guidance_scale=GUIDANCE)
    advance(expected)
    np.testing.assert_array_equal(state.latents(0), expected.latents(0))
    assert not np.array_equal(state.latents(0), other.latents(0))


# --- which rows go together ---------------------------------------------------------------------


def test_neighbours_of_one_graph_go_together(session: Session, plans: dict[str, Plan]) -> None:
    state = State(session, [plans["gated"], plans["stopped"]], 6)
    assert state.together() == []
    for row in (0, 1, 2, 4, 5):
        Picture(plans["gated"], row).begin(session, state, row)
    assert state.together() == [range(3), range(4, 6)]
    Picture(plans["stopped"], 3).begin(session, state, 3)
    assert state.together() == [range(4), range(4, 6)], "four at most"
    for _ in range(5):
        advance(state, range(1, 2))
    assert state.step(1) is not None
    assert state.together() == [range(1), range(1, 2), range(2, 6)]
    for _ in range(3):
        advance(state, range(1, 2))
    assert state.step(1) is None
    assert state.together() == [range(1), range(2, 6)]


@pytest.fixture(scope="module")
def ranged(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """Calls of 1, 3 or 4 images."""
    path = build(tmp_path_factory.mktemp("state") / "toy", Toy(batches=((1, 1), (3, 4))))
    with Session.open(path, threads=1) as opened:
        yield opened


@pytest.mark.parametrize(
    ("rows", "ranges"),
    [
        (1, [range(1)]),
        (2, [range(1), range(1, 2)]),
        (3, [range(3)]),
        (4, [range(4)]),
        (6, [range(4), range(4, 5), range(5, 6)]),
        (7, [range(4), range(4, 7)]),
    ],
)
def test_ranges_are_those_that_a_call_may_have(ranged: Session, rows: int, ranges: list[range]) -> None:
    plan = ranged.manifest.plan("default")
    state = State(ranged, plan, rows)
    assert state.batches() == ((1, 1), (3, 4))
    pictures = [Picture(plan, row) for row in range(rows)]
    for row, picture in enumerate(pictures):
        picture.begin(ranged, state, row)
    assert state.together() == ranges
    walk(state)
    for row, picture in enumerate(pictures):
        np.testing.assert_array_equal(state.latents(row), picture.alone(ranged))


def test_a_call_of_so_many_images_takes_their_graph(ranged: Session) -> None:
    files = {images: shape_for(ranged.shapes(), images).graphs["full"].file for images in (1, 3, 4)}
    assert files == {1: "full-batch-1-1.onnx", 3: "full-batch-3-4.onnx", 4: "full-batch-3-4.onnx"}
    with pytest.raises(RequestError, match="takes 1 or 3 to 4 images at once, got 2; export with --batch"):
        shape_for(ranged.shapes(), 2)


@pytest.mark.parametrize(
    ("batches", "images", "most"),
    [
        ([(1, 4)], 3, 3),
        ([(1, 4)], 9, 4),
        ([(2, 4)], 1, 0),
        ([(1, 1), (3, 4)], 2, 1),
        ([(1, 1), (3, 4)], 5, 4),
        ([], 5, 0),
    ],
)
def test_the_most_images_of_one_call(batches: list[tuple[int, int]], images: int, most: int) -> None:
    assert most_at_once(batches, images) == most


# --- what does not fit --------------------------------------------------------------------------


def begin(session: Session, state: State, row: int = 0, **change: Any) -> None:
    picture = Picture(state.plans[0], 1)
    arguments = {
        "noise": picture.start(session),
        "conditioning": picture.conditioning(session),
        "guidance_scale": GUIDANCE,
        **change,
    }
    state.begin(row, **arguments)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"noise": np.zeros((1, 2, 4, 4), np.float32)}, r"initial latents must have shape \[2, 4, 4\], got \[1, 2, 4"),
        ({"noise": np.zeros((2, 4, 4))}, "initial latents must be float32, got float64"),
        ({"conditioning": {}}, r"take conditioning text\.negative, text\.positive, .*; got nothing"),
        ({"row": 2}, r"the state has rows 0 to 1, got 2"),
        ({"row": -1}, r"the state has rows 0 to 1, got -1"),
    ],
)
def test_an_image_that_does_not_fit(
    session: Session, plans: dict[str, Plan], change: dict[str, Any], says: str
) -> None:
    state = State(session, plans["gated"], 2)
    with pytest.raises(RequestError, match=says):
        begin(session, state, **change)
    assert state.together() == [], "it has not begun"


@pytest.mark.parametrize(
    ("values", "says"),
    [
        (np.zeros((7, 4), np.float32), r"conditioning text\.positive must have shape \[8, 4\], got \[7, 4\]"),
        (np.zeros((8, 4), np.int64), r"conditioning text\.positive must be float32, got int64"),
        (np.zeros((1, 8, 4), np.float32), r"must have shape \[8, 4\], got \[1, 8, 4\]"),
    ],
)
def test_conditioning_that_does_not_fit(
    session: Session, plans: dict[str, Plan], values: NDArray[Any], says: str
) -> None:
    state = State(session, plans["gated"])
    rows = Picture(plans["gated"], 1).conditioning(session)
    with pytest.raises(RequestError, match=says):
        begin(session, state, conditioning={**rows, "text.positive": values})


def test_conditioning_that_no_plan_takes_is_ignored(session: Session, plans: dict[str, Plan]) -> None:
    state = State(session, plans["gated"])
    rows = Picture(plans["gated"], 1).conditioning(session)
    begin(session, state, conditioning={**rows, "other.positive": np.zeros(3)})
    assert set(state.conditioning()) == set(rows)


def test_an_image_follows_one_of_the_states_plans(session: Session, plans: dict[str, Plan]) -> None:
    state = State(session, [plans["gated"], plans["ungated"]])
    with pytest.raises(RequestError, match="has 2 plans; name the image's"):
        begin(session, state)
    begin(session, state, plan=replace(plans["ungated"]))
    assert state.step(0) == plans["ungated"].steps[0]
    plain = State(session, plans["ungated"])
    with pytest.raises(RequestError, match="plan 'early' is none of the state's: ungated"):
        begin(session, plain, plan=plans["early"])


def test_or_one_that_there_are_buffers_for_already(session: Session, plans: dict[str, Plan]) -> None:
    """What is left of a plan from a picture on takes the same graphs and carries; it is proved before it runs."""
    state = State(session, [plans["gated"], plans["ungated"]])
    begin(session, state, plan=plans["early"])
    assert state.step(0) == plans["early"].steps[0]
    wrong = replace(plans["early"], steps=plans["early"].steps[1:])
    with pytest.raises(PlanError):
        begin(session, state, plan=wrong)


def test_latents_are_mended_after_each_step(session: Session, plans: dict[str, Plan]) -> None:
    """What somebody puts in their place is what the next step, and the history, goes on from."""
    state, seen = State(session, plans["gated"]), list[tuple[int, NDArray[np.float32]]]()

    def mend(index: int, latents: NDArray[np.float32]) -> NDArray[np.float32]:
        seen.append((index, latents))
        return np.full_like(latents, index)

    begin(session, state, mend=mend)
    for index in range(2):
        advance(state)
        assert (state.latents(0) == index).all()
    assert (state.history(0)[0][1] == 0).all()
    assert [index for index, _ in seen] == [0, 1]
    assert not (seen[1][1] == 1).all()


def test_a_stochastic_sampler_needs_noise_for_its_steps(session: Session, plans: dict[str, Plan]) -> None:
    state = State(session, plans["noisy"])
    with pytest.raises(RequestError, match="sampler 'toy' draws noise in its steps; give step_noise"):
        begin(session, state)
    begin(session, state, step_noise=lambda step: np.zeros((2, 4), np.float32))
    with pytest.raises(RequestError, match=r"the noise of step 0 must have shape \[2, 4, 4\], got \[2, 4\]"):
        advance(state)
    assert state.step(0) == plans["noisy"].steps[0], "no step was taken"


def test_rows_that_cannot_share_a_call(session: Session, plans: dict[str, Plan]) -> None:
    state = State(session, plans["gated"], 3)
    for row in range(2):
        Picture(plans["gated"], row).begin(session, state, row)
    for _ in range(5):
        advance(state, range(1))
    with pytest.raises(RequestError, match="images that share a call run one graph; got reuse_cross, full"):
        advance(state, range(2))
    with pytest.raises(RequestError, match="rows 1 to 2 do not all have a step to take"):
        advance(state, range(1, 3))
    for rows in (range(2, 4), range(-1, 1), range(0, 3, 2), range(2, 1)):
        with pytest.raises(RequestError, match="the state has rows 0 to 2, got range"):
            advance(state, rows)
    for _ in range(3):
        advance(state, range(1))
    with pytest.raises(RequestError, match="rows 0 to 0 do not all have a step to take"):
        advance(state, range(1))


def test_more_images_than_a_call_takes(session: Session, plans: dict[str, Plan]) -> None:
    state = State(session, plans["gated"], 5)
    for row in range(5):
        Picture(plans["gated"], row).begin(session, state, row)
    with pytest.raises(RequestError, match="takes 1 to 4 images at once, got 5; export with --batch"):
        advance(state)
    advance(state, range(4))


def test_a_state_that_cannot_be(session: Session, plans: dict[str, Plan], toy_path: Path) -> None:
    with pytest.raises(RequestError, match="at least 1 row, got 0"):
        State(session, plans["gated"], 0)
    with pytest.raises(RequestError, match="size '9x9' is not loaded"):
        State(session, plans["gated"], size="9x9")
    broken = replace(plans["gated"], steps=tuple(replace(s, writes=()) for s in plans["gated"].steps))
    with pytest.raises(PlanError, match="which no earlier step writes"):
        State(session, broken)
    with Session.open(toy_path, plans=["ungated"], threads=1) as small:
        State(small, plans["ungated"])
        with pytest.raises(EngineError, match=r"graph reuse_self\.onnx is not loaded \(loaded: full\.onnx,"):
            State(small, plans["gated"])


def test_a_state_outlives_its_session(toy_path: Path, plans: dict[str, Plan]) -> None:
    with Session.open(toy_path, threads=1, memory="fast") as own:
        picture = Picture(plans["gated"], 1)
        expected = picture.alone(own)
        state = State(own, plans["gated"])
        picture.begin(own, state, 0)
    walk(state)
    np.testing.assert_array_equal(state.latents(0), expected)


def test_one_run_at_a_time(session: Session, plans: dict[str, Plan]) -> None:
    state = State(session, plans["gated"])
    Picture(plans["gated"], 1).begin(session, state, 0)
    lock = state.claim()
    with pytest.raises(RequestError, match="in use by another run"):
        advance(state)
    lock.release()
    advance(state)
    assert state.claim().locked()


def test_a_run_is_its_images(session: Session, plans: dict[str, Plan]) -> None:
    """Whatever was in the rows before."""
    state = State(session, [plans["noisy"], plans["gated"]], 2)
    for row in range(2):
        Picture(plans["noisy"], row).begin(session, state, row)
    advance(state)
    advance(state, range(1))
    pictures = [Picture(plans["gated"], 8, 2.0), Picture(plans["gated"], 9, 6.0)]
    rows = [picture.conditioning(session) for picture in pictures]
    for _ in run(
        state,
        latents=np.stack([picture.start(session) for picture in pictures]),
        conditioning={name: np.stack([row[name] for row in rows]) for name in rows[0]},
        guidance_scale=[2.0, 6.0],
        plan=plans["gated"],
    ):
        pass
    for row, picture in enumerate(pictures):
        np.testing.assert_array_equal(state.latents(row), picture.alone(session))
