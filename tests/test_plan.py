"""Plans: built from a schedule, proved against a manifest."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.toy_bundle import Toy, build, make_plan, sampler
from tgate_engine.bundle import Bundle
from tgate_engine.errors import PlanError, TgateError
from tgate_engine.manifest import Manifest
from tgate_engine.plan import Plan, Step, build_plan
from tgate_engine.schedule import Schedule


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return Bundle.open(build(tmp_path_factory.mktemp("plan") / "toy")).manifest


def planned(manifest: Manifest, **settings: Any) -> Plan:
    return make_plan("p", Schedule(**settings), Toy(), manifest.graphs)


def changed(plan: Plan, index: int, **changes: Any) -> Plan:
    steps = [replace(step, **changes) if step.index == index else step for step in plan.steps]
    return replace(plan, steps=tuple(steps))


@given(st.data())
def test_every_schedule_makes_a_plan_that_proves_itself(manifest: Manifest, data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, 20))
    plan = planned(
        manifest,
        steps=steps,
        gate=data.draw(st.integers(1, steps)),
        self_interval=data.draw(st.integers(1, 6)),
        warm_up=data.draw(st.integers(0, 22)),
        fidelity_interval=data.draw(st.integers(1, 4)),
        lead_in=data.draw(st.integers(0, 1)),
    )
    plan.check(manifest)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert no_write_is_dead(plan)


def no_write_is_dead(plan: Plan) -> bool:
    """Whether every value written is read before it is written again."""
    unread: set[str] = set()
    for step in plan.steps:
        unread -= set(step.reads)
        if unread & set(step.writes):
            return False
        unread |= set(step.writes)
    return not unread


def test_a_small_plan_step_by_step(manifest: Manifest) -> None:
    plan = planned(manifest, steps=6, gate=4, self_interval=3, warm_up=0, fidelity_interval=2)
    self_, means = ("self.0", "self.1"), ("self.0.mean", "self.1.mean")
    cross = ("cross.0", "cross.1")
    assert [(s.graph, s.reads, set(s.writes)) for s in plan.steps] == [
        ("full", (), set(self_)),
        ("reuse_self", self_, set()),
        ("reuse_self", self_, set()),
        ("full", (), set(cross)),
        ("reuse_cross", cross, set(means)),
        ("reuse_both", tuple(plan.steps[5].reads), set()),
    ]
    assert set(plan.steps[5].reads) == {*means, *cross}
    assert plan.graphs() == ("full", "reuse_self", "reuse_cross", "reuse_both")
    assert set(plan.carries()) == {*self_, *means, *cross}


def test_macs_are_the_sum_over_the_steps(manifest: Manifest) -> None:
    plan = planned(manifest, steps=6, gate=4, self_interval=3, warm_up=0)
    assert plan.macs(manifest.graphs) == (2 * 2000 + 2 * 1600 + 2 * 800, 2 * 2600 + 2 * 1700 + 2 * 1100)


def test_a_schedule_without_its_graph_says_what_to_do(manifest: Manifest) -> None:
    graphs = {name: spec for name, spec in manifest.graphs.items() if name != "reuse_both"}
    with pytest.raises(PlanError, match=r"step 5 needs graph 'reuse_both'.*--fidelity-interval"):
        make_plan("p", Schedule(steps=6, gate=4, fidelity_interval=2), Toy(), graphs)


def test_a_sampler_of_another_length(manifest: Manifest) -> None:
    with pytest.raises(PlanError, match="makes 7 network calls, the schedule 6"):
        build_plan(
            "p",
            schedule=Schedule(steps=6, gate=4),
            sampler=sampler(7),
            guidance_scale=3.0,
            graphs=manifest.graphs,
            carries=manifest.carries,
        )


FAULTS: dict[str, tuple[Any, str]] = {
    "a carry that nobody wrote": (
        lambda p: changed(p, 3, writes=()),
        "step 4 reads cross.0, which no earlier step writes; the steps before it write self.0, self.1",
    ),
    "a graph that is not there": (lambda p: changed(p, 0, graph="nothing"), "step 0 runs graph 'nothing'"),
    "a graph that is no denoiser": (lambda p: changed(p, 0, graph="decoder"), "step 0 runs graph 'decoder'"),
    "a carry read that its graph does not take": (
        lambda p: changed(p, 3, reads=("self.0",)),
        "the plan differs in self.0",
    ),
    "a carry read too few": (lambda p: changed(p, 4, reads=("cross.0",)), "the plan differs in cross.1"),
    "a carry written that its graph does not give": (
        lambda p: changed(p, 1, writes=("self.0",)),
        "step 1 writes self.0, which graph 'reuse_self' does not give",
    ),
    "a step out of order": (lambda p: replace(p, steps=(*p.steps[1:], p.steps[0])), "expected index 0"),
    "a step too few": (lambda p: replace(p, steps=p.steps[:-1]), "has 5 steps"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_plan_that_cannot_run(manifest: Manifest, fault: str) -> None:
    change, says = FAULTS[fault]
    good = planned(manifest, steps=6, gate=4, self_interval=3, warm_up=0)
    good.check(manifest)
    with pytest.raises(PlanError) as error:
        change(good).check(manifest)
    assert says in str(error.value)


def test_a_carry_read_in_another_shape(manifest: Manifest) -> None:
    spec = manifest.graphs["reuse_cross"]
    odd = tuple(replace(t, shape=("batch", 7)) if t.name == "cross.0" else t for t in spec.inputs)
    other = replace(manifest, graphs={**manifest.graphs, "reuse_cross": replace(spec, inputs=odd)})
    plan = planned(manifest, steps=6, gate=4)
    with pytest.raises(PlanError, match=r"step 4 reads cross\.0 as .*7.*, but it was written as"):
        plan.check(other)


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d.pop("steps"),
        lambda d: d.pop("schedule"),
        lambda d: d["schedule"].update(m=3),
        lambda d: d["schedule"].update(gate=99),
        lambda d: d["steps"][0].update(phase="nonsense"),
        lambda d: d["steps"][0].pop("latents"),
        lambda d: d["steps"][0].update(latents=[1, 2]),
        lambda d: d["steps"][0].update(index="x"),
        lambda d: d.update(guidance_scale="a lot"),
        lambda d: d.update(guidance_scale=float("nan")),
        lambda d: d.update(sampler=3),
        lambda d: d.update(steps=3),
    ],
)
def test_json_that_is_no_plan(manifest: Manifest, edit: Any) -> None:
    data = json.loads(json.dumps(planned(manifest, steps=6, gate=4).to_json()))
    edit(data)
    with pytest.raises(TgateError):
        Plan.from_json(data)


def test_steps_are_values(manifest: Manifest) -> None:
    plan = planned(manifest, steps=3, gate=2)
    assert isinstance(plan.steps[0], Step)
    assert hash(plan.steps[0]) == hash(replace(plan.steps[0]))
