"""Plans built from a program by liveness, and the programs that there is no plan for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.contract.plans import CARRIES, build, changed, graph, planned
from tests.toy_bundle import Toy, make_plan, sampler
from tgate_engine.errors import PlanError, TgateError
from tgate_engine.graph import GraphSpec
from tgate_engine.plan import Call, Plan
from tgate_engine.plan_build import build_plan
from tgate_engine.plan_check import PlanCheck
from tgate_export.methods.base import Settings


def test_a_small_plan_step_by_step(graphs: Mapping[str, GraphSpec]) -> None:
    plan = planned(graphs, steps=6, gate=4, self_interval=3, warm_up=0, fidelity_interval=2)
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


LETTERS = {
    "none": graph("", ""),
    "gives a": graph("", "a"),
    "gives ab": graph("", "ab"),
    "a to b": graph("a", "b"),
    "a to a": graph("a", "a"),
    "reads ab": graph("ab", ""),
    "ab to abc": graph("ab", "abc"),
    "reads c": graph("c", "d"),
}
PROOF = PlanCheck([LETTERS], "abcd")


def proper_writes(program: Sequence[str], index: int) -> set[str]:
    """The rule, carry by carry and forwards: of what a step's graph gives, what the next step that has to do with it
    reads. A step that takes and gives a carry reads it first."""
    kept = set()
    for name in LETTERS[program[index]].output_names():
        for later in program[index + 1 :]:
            if name in LETTERS[later].input_names():
                kept.add(name)
                break
            if name in LETTERS[later].output_names():
                break
    return kept & set("abcd")


def readable(program: Sequence[str]) -> bool:
    written: set[str] = set()
    for name in program:
        if not set(LETTERS[name].input_names()) <= written | {"z"}:
            return False
        written |= set(LETTERS[name].output_names())
    return True


@given(st.lists(st.sampled_from(list(LETTERS)), min_size=1, max_size=12))
def test_a_step_writes_what_a_later_step_reads(program: list[str]) -> None:
    if not readable(program):
        with pytest.raises(PlanError, match="which no earlier step writes"):
            build(LETTERS, program)
        return
    plan = build(LETTERS, program)
    for index, step in enumerate(plan.steps):
        assert set(step.reads) == set(LETTERS[program[index]].input_names()) - {"z"}
        assert set(step.writes) == proper_writes(program, index)
    PROOF(plan)


@given(st.lists(st.sampled_from(list(LETTERS)), min_size=2, max_size=9).filter(readable), st.data())
def test_a_step_writes_no_more_and_no_less(program: list[str], data: st.DataObject) -> None:
    """So images at different steps of one graph can share a call: what is written beyond a step is read by nobody."""
    plan = build(LETTERS, program)
    step = data.draw(st.sampled_from(plan.steps))
    gives = set(LETTERS[step.graph].output_names()) - {"z"}
    other = data.draw(st.sets(st.sampled_from("abcd")))
    altered = changed(plan, step.index, writes=tuple(sorted(other)))
    if other == set(step.writes):
        PROOF(altered)
        return
    with pytest.raises(PlanError) as error:
        PROOF(altered)
    if other <= gives and set(step.writes) < other:
        assert "a step writes the carries of its graph that a later step reads, no others" in str(error.value)


@given(st.data())
def test_every_setting_makes_a_plan_that_proves_itself(graphs: Mapping[str, GraphSpec], data: st.DataObject) -> None:
    steps = data.draw(st.integers(1, 20))
    plan = planned(
        graphs,
        lead_in=data.draw(st.integers(0, 1)),
        steps=steps,
        gate=data.draw(st.integers(1, steps)),
        self_interval=data.draw(st.integers(1, 6)),
        warm_up=data.draw(st.integers(0, 22)),
        fidelity_interval=data.draw(st.integers(1, 4)),
    )
    PlanCheck([graphs], CARRIES)(plan)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    unread: set[str] = set()
    for step in plan.steps:  # every value written is read before it is written again
        unread -= set(step.reads)
        assert not unread & set(step.writes)
        unread |= set(step.writes)
    assert not unread


# --- what is refused ----------------------------------------------------------------------------


def test_a_program_without_its_graph_says_what_to_do(graphs: Mapping[str, GraphSpec]) -> None:
    fewer = {name: spec for name, spec in graphs.items() if name != "reuse_both"}
    says = r"step 5 needs graph 'reuse_both', which the bundle does not hold \(it has full, reuse_self, reuse_cross, "
    with pytest.raises(PlanError, match=says + r"unguided\). Export again"):
        make_plan("p", Settings(steps=6, gate=4, fidelity_interval=2), Toy(), fewer)


def test_a_program_runs_denoising_graphs(graphs: Mapping[str, GraphSpec]) -> None:
    with pytest.raises(PlanError, match="step 1 needs graph 'decoder'"):
        build(graphs, ["full", "decoder"])


def test_a_sampler_of_another_length(graphs: Mapping[str, GraphSpec]) -> None:
    with pytest.raises(PlanError, match="makes 7 network calls, the program 6"):
        make_plan("p", Settings(steps=6, gate=4), Toy(), graphs, own_sampler=sampler(7))


def test_settings_are_facts(graphs: Mapping[str, GraphSpec]) -> None:
    with pytest.raises(TgateError, match="fact m must be a text, a number"):
        build_plan(
            "p",
            [Call("phase", "full")],
            sampler=sampler(1),
            guidance_scale=3.0,
            graphs=graphs,
            carries=CARRIES,
            settings={"m": [1]},  # type: ignore[dict-item]
        )
