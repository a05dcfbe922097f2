"""Run time walks plans as the method says."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests import toy_model
from tests.runtime.pictures import GUIDANCE, Picture, planned
from tests.toy_bundle import Toy, build, random_conditioning
from tests.toy_model import LATENTS
from tgate_engine.errors import EngineError, RequestError
from tgate_engine.plan import Plan, Step
from tgate_runtime.engines.protocol import Call
from tgate_runtime.runner import StepDone, advance, run
from tgate_runtime.session import Session
from tgate_runtime.state import State


def noise(rows: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, *LATENTS)).astype(np.float32)


def finished(state: State, seed: int = 0) -> NDArray[np.float32]:
    """The final latents of one whole run."""
    guided = any(name.endswith(".negative") for name in state.conditioning())
    rows = random_conditioning(state.rows, guided=guided, seed=seed + 1)
    for _ in run(state, latents=noise(state.rows, seed), conditioning=rows, guidance_scale=GUIDANCE):
        pass
    return state.latents()


def relative(values: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.abs(values - expected).max() / np.abs(expected).max())


# --- the method ---------------------------------------------------------------------------------


def compare(session: Session, plan: Plan, *, rows: int = 2, tolerance: float = 2e-6, **rules: Any) -> None:
    """Run ``plan`` and compare the latents after every step with the reference's."""
    guided = session.manifest.guided
    start, conditioning = noise(rows), random_conditioning(rows, guided=guided)

    def drawn(step: int) -> NDArray[np.float32]:
        return noise(rows, 100 + step)

    expected = toy_model.trajectory(
        toy_model.weights(),
        plan.sampler,
        start,
        conditioning,
        GUIDANCE,
        guided=guided,
        step_noise=drawn,
        **rules,
    )
    state = State(session, plan, rows)
    seen = []
    for done in run(
        state,
        latents=start,
        conditioning=conditioning,
        guidance_scale=GUIDANCE,
        step_noise=lambda row, step: drawn(step)[row],
    ):
        assert relative(state.latents(), expected[done.index + 1]) < tolerance
        assert done.elapsed_ms > 0
        assert done.rows == range(rows)
        assert done.steps == (done.step,) * rows
        seen.append(done.index)
    assert seen == list(range(len(plan.steps)))


@pytest.mark.parametrize("n", [1, 2, 9])
@pytest.mark.parametrize("gate", ["1", "2", "middle", "n-1", "n"])
@pytest.mark.parametrize(("k", "f", "warm_up"), [(1, 1, 2), (2, 1, 0), (3, 2, 2), (2, 3, 20), (5, 2, 0)])
@pytest.mark.parametrize("lead_in", [0, 1])
def test_every_step_equals_the_reference(
    session: Session, n: int, gate: str, k: int, f: int, warm_up: int, lead_in: int
) -> None:
    m = min(max({"1": 1, "2": 2, "middle": n // 2, "n-1": n - 1, "n": n}[gate], 1), n)
    plan = planned(session, steps=n, gate=m, self_interval=k, fidelity_interval=f, warm_up=warm_up, lead_in=lead_in)
    compare(session, plan, m=m, k=k, f=f, warm_up=warm_up)


def test_guidance_stopped_and_ungated_equal_the_reference(session: Session) -> None:
    plans = session.manifest.plans
    compare(session, plans["ungated"], m=8)
    compare(session, plans["guidance_stopped"], m=5, reuse=False)


def test_a_stochastic_sampler_equals_the_reference(session: Session) -> None:
    """Each image adds noise of its own in each step."""
    compare(session, planned(session, steps=6, gate=4, noise=0.3), m=4)


@pytest.mark.parametrize("m", [1, 3, 6])
def test_a_model_without_guidance_equals_the_reference(tmp_path: Path, m: int) -> None:
    with Session.open(build(tmp_path / "toy", Toy(guided=False)), plans=[], threads=1) as empty:
        plan = planned(empty, steps=6, gate=m, self_interval=2, fidelity_interval=2, warm_up=0)
    with Session.open(empty.bundle, plans=[plan], threads=1) as session:
        compare(session, plan, m=m, k=2, f=2, warm_up=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-2), ("bfloat16", 8e-2)])
def test_carries_of_half_precision(tmp_path: Path, dtype: str, tolerance: float) -> None:
    with Session.open(build(tmp_path / "toy", Toy(carry_dtype=dtype)), plans=[], threads=1) as empty:
        plan = planned(empty, steps=6, gate=4, self_interval=2, fidelity_interval=2)
    with Session.open(empty.bundle, plans=[plan], threads=1) as session:
        compare(session, plan, tolerance=tolerance, m=4, k=2, f=2, warm_up=2)
        assert {buffer.dtype for buffer in State(session, plan).carries().values()} == {dtype}


# --- one request after another, and many at once ------------------------------------------------


def test_a_state_serves_one_request_after_another(session: Session) -> None:
    """Nothing of an earlier request, finished or not, reaches a later one."""
    plan = planned(session, steps=7, gate=4, self_interval=2)
    fresh = finished(State(session, plan, 2), seed=5)
    used = State(session, plan, 2)
    finished(used, seed=1)
    stopped = run(used, latents=noise(2), conditioning=random_conditioning(2), guidance_scale=GUIDANCE)
    next(stopped)
    next(stopped)
    stopped.close()
    np.testing.assert_array_equal(finished(used, seed=5), fresh)


def test_each_row_is_what_its_image_is_alone(session: Session) -> None:
    """Bit for bit, with a guidance scale for each."""
    plan = session.manifest.plan("deep")
    pictures = [Picture(plan, seed, 1.5 + seed) for seed in range(4)]
    rows = [picture.conditioning(session) for picture in pictures]
    state = State(session, plan, 4)
    for done in run(
        state,
        latents=np.stack([picture.start(session) for picture in pictures]),
        conditioning={name: np.stack([row[name] for row in rows]) for name in rows[0]},
        guidance_scale=[picture.guidance_scale for picture in pictures],
    ):
        assert len(done.rows) == 4
    for row, picture in enumerate(pictures):
        np.testing.assert_array_equal(state.latents(row), picture.alone(session))


def test_one_row_of_conditioning_is_for_all(session: Session) -> None:
    plan = session.manifest.plan("default")
    one = random_conditioning(1)
    all_alike = {name: np.repeat(values, 3, axis=0) for name, values in one.items()}
    alone, repeated = State(session, plan, 3), State(session, plan, 3)
    for state, conditioning in ((alone, one), (repeated, all_alike)):
        for _ in run(state, latents=noise(3), conditioning=conditioning, guidance_scale=GUIDANCE):
            pass
    np.testing.assert_array_equal(alone.latents(), repeated.latents())


def test_more_rows_than_a_call_takes_are_called_in_turns(session: Session) -> None:
    plan = session.manifest.plan("default")
    state = State(session, plan, 6)
    conditioning = random_conditioning(6)
    steps = run(state, latents=noise(6), conditioning=conditioning, guidance_scale=GUIDANCE)
    assert [done.rows for done in steps] == [range(4), range(4, 6)] * len(plan.steps)
    six = state.latents()
    for first, count in ((0, 4), (4, 2)):
        own = {name: values[first : first + count] for name, values in conditioning.items()}
        small = State(session, plan, count)
        for _ in run(small, latents=noise(6)[first : first + count], conditioning=own, guidance_scale=GUIDANCE):
            pass
        np.testing.assert_array_equal(small.latents(), six[first : first + count])


def test_eight_requests_at_once_equal_one_by_one(session: Session) -> None:
    plan = planned(session, steps=12, gate=7, self_interval=3)
    alone = [finished(State(session, plan, 2), seed) for seed in range(8)]
    assert len({latents.tobytes() for latents in alone}) == 8
    together = threading.Barrier(8)

    def request(seed: int) -> NDArray[np.float32]:
        state = State(session, plan, 2)
        together.wait()
        return finished(state, seed)

    with ThreadPoolExecutor(8) as pool:
        for latents, expected in zip(pool.map(request, range(8)), alone, strict=True):
            np.testing.assert_array_equal(latents, expected)


def test_closing_the_generator_stops_the_work(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    state = State(session, planned(session, steps=9, gate=5))
    taken: list[int] = []
    take = state.take

    def watched(rows: range) -> tuple[Call, tuple[Step, ...]]:
        call, steps = take(rows)
        taken.append(steps[0].index)
        return call, steps

    monkeypatch.setattr(state, "take", watched)
    steps = run(state, latents=noise(1), conditioning=random_conditioning(1), guidance_scale=GUIDANCE)
    assert taken == [], "nothing runs before the first step is asked for"
    assert [next(steps).index, next(steps).index] == [0, 1]
    steps.close()
    with pytest.raises(StopIteration):
        next(steps)
    assert taken == [0, 1]
    state.claim().release()


def test_two_runs_cannot_share_a_state(session: Session) -> None:
    state = State(session, planned(session, steps=4, gate=2))

    def start() -> Iterator[StepDone]:
        return run(state, latents=noise(1), conditioning=random_conditioning(1), guidance_scale=GUIDANCE)

    first = start()
    next(first)
    with pytest.raises(RequestError, match="in use by another run"):
        next(start())
    with pytest.raises(RequestError, match="in use by another run"):
        advance(state)
    assert len(list(first)) == 3
    assert len(list(start())) == 4


def test_an_engine_that_fails_leaves_the_step_to_be_taken(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = session.manifest.plan("default")
    picture = Picture(plan, 3)
    state = State(session, plan)
    picture.begin(session, state, 0)
    advance(state)

    def fail(_: object) -> None:
        raise EngineError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr("tgate_runtime.engines.ort._OrtCall.__call__", fail)
        with pytest.raises(EngineError, match="out of memory"):
            advance(state)
    assert state.step(0) == plan.steps[1]
    while state.together():
        advance(state)
    np.testing.assert_array_equal(state.latents(0), picture.alone(session))


# --- what does not fit --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"latents": noise(3)}, r"has 2 rows; got latents of shape \[3, 2, 4, 4\] and 2 guidance scales"),
        ({"latents": noise(2)[0]}, r"initial latents must have shape \[2, 4, 4\], got \[4, 4\]"),
        ({"latents": np.float32(3)}, r"has 2 rows; got latents of shape \[\]"),
        ({"latents": noise(2).astype(np.float64)}, "initial latents must be float32, got float64"),
        ({"guidance_scale": [3.0]}, "and 1 guidance scales"),
        ({"guidance_scale": [3.0] * 3}, "and 3 guidance scales"),
        ({"conditioning": {}}, r"take conditioning .*; got nothing"),
        (
            {"conditioning": {**random_conditioning(2), "text.positive": np.zeros((3, 8, 4), np.float32)}},
            r"conditioning text\.positive must have 2 rows or 1, got shape \[3, 8, 4\]",
        ),
        (
            {"conditioning": {**random_conditioning(2), "text.positive": np.float32(1)}},
            r"conditioning text\.positive must have 2 rows or 1, got shape \[\]",
        ),
        (
            {"conditioning": {**random_conditioning(2), "text.positive": np.zeros((2, 7, 4), np.float32)}},
            r"conditioning text\.positive must have shape \[8, 4\], got \[7, 4\]",
        ),
        ({"plan": "gated"}, "is none of the state's"),
    ],
)
def test_inputs_that_do_not_fit(session: Session, change: dict[str, Any], says: str) -> None:
    state = State(session, planned(session, steps=4, gate=2), 2)
    if "plan" in change:
        change = {"plan": session.manifest.plan("default")}
    arguments = {"latents": noise(2), "conditioning": random_conditioning(2), "guidance_scale": GUIDANCE, **change}
    with pytest.raises(RequestError, match=says):
        next(run(state, **arguments))
    state.claim().release()


def test_a_stochastic_sampler_needs_noise_for_its_steps(session: Session) -> None:
    state = State(session, planned(session, steps=4, gate=2, noise=0.5))
    with pytest.raises(RequestError, match="draws noise in its steps; give step_noise"):
        next(run(state, latents=noise(1), conditioning=random_conditioning(1), guidance_scale=GUIDANCE))
