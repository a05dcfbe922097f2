"""Run time walks plans as the method says, over fixed memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests import toy_model
from tests.toy_bundle import Toy, build, make_plan, random_conditioning
from tests.toy_model import LATENTS
from tgate_engine.bundle import Bundle
from tgate_engine.errors import EngineError, RequestError
from tgate_engine.plan import Plan, Step
from tgate_engine.schedule import Schedule
from tgate_runtime.backends import Call
from tgate_runtime.binding import RING, Binding
from tgate_runtime.runner import StepDone, run
from tgate_runtime.session import Session

GRAPHS = ("full", "reuse_self", "reuse_cross", "reuse_both", "unguided")
GUIDANCE = 3.0


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    with Session.open(build(tmp_path_factory.mktemp("runner") / "toy"), threads=1, graphs=GRAPHS) as opened:
        yield opened


def planned(session: Session, **settings: Any) -> Plan:
    return make_plan("p", Schedule(**settings), Toy(guided=session.manifest.guided), session.manifest.graphs)


def noise(batch: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((batch, *LATENTS)).astype(np.float32)


def finished(binding: Binding, seed: int = 0, guidance: float = GUIDANCE) -> NDArray[np.float32]:
    """The final latents of one whole run."""
    guided = any(name.endswith(".negative") for name in binding.conditioning())
    rows = random_conditioning(binding.batch, guided=guided, seed=seed + 1)
    for _ in run(binding, latents=noise(binding.batch, seed), conditioning=rows, guidance_scale=guidance):
        pass
    return binding.latents()


def relative(got: NDArray[Any], want: NDArray[Any]) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


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


def compare(session: Session, plan: Plan, *, batch: int = 2, tolerance: float = 2e-6, **rules: Any) -> None:
    """Run ``plan`` and compare the latents after every step with the reference's."""
    start, rows = noise(batch), random_conditioning(batch, guided=session.manifest.guided)
    guided = session.manifest.guided
    want = toy_model.trajectory(toy_model.weights(), plan.sampler, start, rows, GUIDANCE, guided=guided, **rules)
    binding = Binding(session, plan, batch)
    seen = []
    for done in run(binding, latents=start, conditioning=rows, guidance_scale=GUIDANCE):
        assert relative(binding.latents(), want[done.index + 1]) < tolerance
        assert done.elapsed_ms > 0
        seen.append(done.index)
    assert seen == list(range(len(plan.steps)))


def test_guidance_stopped_and_ungated_equal_the_reference(session: Session) -> None:
    gated = planned(session, steps=7, gate=4)
    for schedule, rules in (
        (gated.schedule.ungated(), {"m": 7}),
        (gated.schedule.guidance_stopped(), {"m": 4, "reuse": False}),
    ):
        compare(session, make_plan("p", schedule, Toy(), session.manifest.graphs), **rules)


@pytest.mark.parametrize("m", [1, 3, 6])
def test_a_model_without_guidance_equals_the_reference(tmp_path: Path, m: int) -> None:
    toy = Toy(guided=False)
    with Session.open(build(tmp_path / "toy", toy), threads=1, graphs=GRAPHS[:4]) as session:
        plan = planned(session, steps=6, gate=m, self_interval=2, fidelity_interval=2, warm_up=0)
        compare(session, plan, m=m, k=2, f=2, warm_up=0)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-2), ("bfloat16", 8e-2)])
def test_carries_of_half_precision(tmp_path: Path, dtype: str, tolerance: float) -> None:
    with Session.open(build(tmp_path / "toy", Toy(carry_dtype=dtype)), threads=1, graphs=GRAPHS) as session:
        plan = planned(session, steps=6, gate=4, self_interval=2, fidelity_interval=2)
        compare(session, plan, tolerance=tolerance, m=4, k=2, f=2, warm_up=2)
        assert {b.dtype for b in Binding(session, plan, 1).carries().values()} == {dtype}


# --- memory -------------------------------------------------------------------------------------


def test_nothing_moves_between_steps(session: Session) -> None:
    """The engine is given the addresses of the binding's own buffers, and they never change."""
    plan = planned(session, steps=9, gate=6, self_interval=2, fidelity_interval=2)
    binding = Binding(session, plan, 2)
    calls, carries = binding.calls(), binding.carries()
    assert len({id(call) for call in calls.values()}) == len(calls)
    at = {name: buffer.address for name, buffer in carries.items()}
    given = {name: dict(call.addresses) for name, call in calls.items()}
    for (graph, writes, _), addresses in given.items():
        named = {name: address for name, address in addresses.items() if name in at}
        assert named == {name: at[name] for name in named}, "a carry lies in one place for every graph"
        assert set(writes) <= set(named)
        unwritten = {t.name for t in session.manifest.graphs[graph].outputs} - set(writes)
        assert not (unwritten - {"next_latents", "output"}) & set(addresses), "an unread output was bound"
    start, rows = noise(2), random_conditioning(2)
    for _ in run(binding, latents=start, conditioning=rows, guidance_scale=GUIDANCE):
        assert {name: buffer.address for name, buffer in binding.carries().items()} == at
        assert {name: dict(call.addresses) for name, call in binding.calls().items()} == given
        assert all(binding.calls()[key] is call for key, call in calls.items())


def test_history_turns_by_one_slot_each_step(session: Session) -> None:
    plan = planned(session, steps=8, gate=8, warm_up=0)
    binding = Binding(session, plan, 1)
    by_slot = {slot: call.addresses for (_, writes, slot), call in binding.calls().items() if not writes}
    assert set(by_slot) == set(range(RING))
    for slot, following in pairwise([*range(RING), 0]):
        here, there = by_slot[slot], by_slot[following]
        assert there["latents"] == here["next_latents"]
        assert [there["latents.1"], there["latents.2"], there["latents.3"]] == [
            here["latents"],
            here["latents.1"],
            here["latents.2"],
        ]
        assert [there["output.1"], there["output.2"], there["output.3"]] == [
            here["output"],
            here["output.1"],
            here["output.2"],
        ]
        assert len({*here.values()}) == len(here), "two tensors share memory"
    assert all(address % 64 == 0 for call in by_slot.values() for address in call.values())


def test_a_step_writes_its_carries_and_no_others(session: Session) -> None:
    plan = planned(session, steps=8, gate=5, self_interval=2, fidelity_interval=2)
    binding = Binding(session, plan, 1)
    before = {name: buffer.read() for name, buffer in binding.carries().items()}
    for done in run(binding, latents=noise(1), conditioning=random_conditioning(1), guidance_scale=GUIDANCE):
        after = {name: buffer.read() for name, buffer in binding.carries().items()}
        changed = {name for name in after if not np.array_equal(before[name], after[name])}
        assert changed == set(done.step.writes)
        before = after


def test_a_binding_serves_one_request_after_another(session: Session) -> None:
    """Nothing of an earlier request, finished or not, reaches a later one."""
    plan = planned(session, steps=7, gate=4, self_interval=2)
    fresh = finished(Binding(session, plan, 2), seed=5)
    used = Binding(session, plan, 2)
    finished(used, seed=1)
    stopped = run(used, latents=noise(2), conditioning=random_conditioning(2), guidance_scale=GUIDANCE)
    next(stopped)
    next(stopped)
    stopped.close()
    np.testing.assert_array_equal(finished(used, seed=5), fresh)


def test_latents_are_copies(session: Session) -> None:
    binding = Binding(session, planned(session, steps=3, gate=2), 1)
    first = finished(binding)
    kept = first.copy()
    first[:] = 0
    np.testing.assert_array_equal(binding.latents(), kept)


def test_an_image_does_not_depend_on_its_neighbours(session: Session) -> None:
    plan = planned(session, steps=5, gate=3)
    start, rows = noise(4), random_conditioning(4)
    together = Binding(session, plan, 4)
    for _ in run(together, latents=start, conditioning=rows, guidance_scale=GUIDANCE):
        pass
    alone = Binding(session, plan, 1)
    for j in range(4):
        mine = {name: values[j : j + 1] for name, values in rows.items()}
        for _ in run(alone, latents=start[j : j + 1], conditioning=mine, guidance_scale=GUIDANCE):
            pass
        assert relative(alone.latents()[0], together.latents()[j]) < 1e-6


# --- many at once, and stopping -----------------------------------------------------------------


def test_eight_requests_at_once_equal_one_by_one(session: Session) -> None:
    plan = planned(session, steps=12, gate=7, self_interval=3)
    alone = [finished(Binding(session, plan, 2), seed) for seed in range(8)]
    assert len({latents.tobytes() for latents in alone}) == 8
    together = threading.Barrier(8)

    def request(seed: int) -> NDArray[np.float32]:
        binding = Binding(session, plan, 2)
        together.wait()
        return finished(binding, seed)

    with ThreadPoolExecutor(8) as pool:
        for got, want in zip(pool.map(request, range(8)), alone, strict=True):
            np.testing.assert_array_equal(got, want)


def test_closing_the_generator_stops_the_work(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    binding = Binding(session, planned(session, steps=9, gate=5), 1)
    taken: list[int] = []
    set_step = binding.set_step

    def watched(step: Step, guidance_scale: float, drawn: NDArray[np.float32] | None) -> Call:
        taken.append(step.index)
        return set_step(step, guidance_scale, drawn)

    monkeypatch.setattr(binding, "set_step", watched)
    steps = run(binding, latents=noise(1), conditioning=random_conditioning(1), guidance_scale=GUIDANCE)
    assert taken == [], "nothing runs before the first step is asked for"
    assert [next(steps).index, next(steps).index] == [0, 1]
    steps.close()
    with pytest.raises(StopIteration):
        next(steps)
    assert taken == [0, 1]
    binding.claim().release()


def test_two_runs_cannot_share_a_binding(session: Session) -> None:
    binding = Binding(session, planned(session, steps=4, gate=2), 1)

    def start() -> Iterator[StepDone]:
        return run(binding, latents=noise(1), conditioning=random_conditioning(1), guidance_scale=GUIDANCE)

    first = start()
    next(first)
    with pytest.raises(RequestError, match="in use by another run"):
        next(start())
    assert len(list(first)) == 3
    assert len(list(start())) == 4


# --- what does not fit --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"latents": noise(3)}, r"initial latents must have shape \[2, 2, 4, 4\], got \[3, 2, 4, 4\]"),
        ({"latents": noise(2).astype(np.float64)}, "initial latents must be float32, got float64"),
        ({"conditioning": {}}, r"take conditioning .*; got none"),
        (
            {"conditioning": {**random_conditioning(2), "text.positive": np.zeros((2, 7, 4), np.float32)}},
            r"conditioning text\.positive must have shape \[2, 8, 4\], got \[2, 7, 4\]",
        ),
        (
            {"conditioning": {**random_conditioning(2), "text.positive": np.zeros((2, 8, 4), np.int64)}},
            r"conditioning text\.positive must be float32, got int64",
        ),
    ],
)
def test_inputs_that_do_not_fit(session: Session, change: dict[str, Any], says: str) -> None:
    binding = Binding(session, planned(session, steps=4, gate=2), 2)
    arguments = {"latents": noise(2), "conditioning": random_conditioning(2), "guidance_scale": GUIDANCE, **change}
    with pytest.raises(RequestError, match=says):
        next(run(binding, **arguments))
    binding.claim().release()


@pytest.mark.parametrize("batch", [0, 5])
def test_a_batch_that_the_bundle_does_not_take(session: Session, batch: int) -> None:
    with pytest.raises(RequestError, match=f"takes 1 to 4 images at once, got {batch}"):
        Binding(session, planned(session, steps=4, gate=2), batch)


def test_a_session_loads_what_its_plans_need(session: Session) -> None:
    bundle = Bundle.open(session.bundle.path)
    short = planned(session, steps=3, gate=3)
    with Session.open(bundle, plans=[short]) as small:
        Binding(small, short, 1)
        with pytest.raises(EngineError, match=r"'reuse_cross' is not loaded \(loaded: text, decoder, full\)"):
            Binding(small, planned(session, steps=4, gate=2), 1)
    with pytest.raises(EngineError, match="is closed"):
        Binding(small, short, 1)


def test_a_stochastic_sampler_needs_noise_for_its_steps(session: Session) -> None:
    plan = planned(session, steps=4, gate=2)
    calls = tuple(replace(call, noise=0.5) for call in plan.sampler.calls)
    steps = tuple(replace(step, call=call) for step, call in zip(plan.steps, calls, strict=True))
    noisy = replace(plan, sampler=replace(plan.sampler, calls=calls), steps=steps)
    binding = Binding(session, noisy, 1)
    with pytest.raises(RequestError, match="draws noise in its steps; give step_noise"):
        next(run(binding, latents=noise(1), conditioning=random_conditioning(1), guidance_scale=GUIDANCE))
