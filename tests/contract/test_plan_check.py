"""The proof that a plan can run: what it refuses, that it asks the same of every shape, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.contract.plans import CARRIES, changed, planned
from tests.toy_bundle import sampler
from tgate_engine.errors import PlanError
from tgate_engine.graph import BATCH, DECODE, DENOISE, GraphSpec, Macs, TensorSpec
from tgate_engine.plan import Call, Plan, Step
from tgate_engine.plan_build import build_plan
from tgate_engine.plan_check import PlanCheck
from tgate_engine.sampler import MOST_STEPS

Graphs = Mapping[str, GraphSpec]
NAMES = "abc"
MOST_SHAPES = 64  # of a manifest


def graph(takes: Mapping[str, int], gives: Mapping[str, int]) -> GraphSpec:
    """A graph of carries of so many channels, beside something that is no carry."""

    def tensors(carries: Mapping[str, int]) -> tuple[TensorSpec, ...]:
        sizes = {"z": 1, **carries}
        return tuple(TensorSpec(name=n, dtype="float32", shape=(BATCH, size)) for n, size in sizes.items())

    macs = Macs(paper=0, all=0)
    return GraphSpec(
        file="g.onnx", role=DENOISE, batch=(1, 4), inputs=tensors(takes), outputs=tensors(gives), macs=macs
    )


def plan_of(program: Sequence[str], graphs: Graphs) -> Plan:
    return build_plan(
        "p",
        [Call("phase", name) for name in program],
        sampler=sampler(len(program)),
        guidance_scale=3.0,
        graphs=graphs,
        carries=NAMES,
        settings={},
    )


def outcome(plan: Plan, *shapes: Graphs) -> str:
    """What is wrong, or nothing."""
    try:
        PlanCheck(shapes, NAMES)(plan)
    except PlanError as error:
        return str(error)
    return ""


# --- on one shape -------------------------------------------------------------------------------


FAULTS: dict[str, tuple[Any, str]] = {
    "a carry that nobody wrote": (
        lambda p: changed(p, 3, writes=()),
        "step 4 reads cross.0, which no earlier step writes; the steps before it write self.0, self.1",
    ),
    "a graph that is not there": (
        lambda p: changed(p, 0, graph="nothing"),
        "step 0 runs graph 'nothing'; the bundle has full, reuse_self, reuse_cross, reuse_both, unguided.",
    ),
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
    "a carry written that nobody reads": (
        lambda p: changed(p, 3, writes=(*p.steps[3].writes, "self.0")),
        "step 3: a step writes the carries of its graph that a later step reads, no others; the plan differs in self.0",
    ),
    "a carry of an earlier step written again": (
        lambda p: changed(p, 5, writes=("self.0.mean",)),
        "step 5: a step writes the carries of its graph that a later step reads",
    ),
    "a step out of order": (lambda p: replace(p, steps=(*p.steps[1:], p.steps[0])), "expected index 0"),
    "a step too few": (lambda p: replace(p, steps=p.steps[:-1]), "has 5 steps and 6 sampler calls"),
    "no step": (lambda p: replace(p, steps=()), "has 0 steps and 6 sampler calls"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_plan_that_cannot_run(graphs: Graphs, fault: str) -> None:
    change, says = FAULTS[fault]
    check = PlanCheck([graphs], CARRIES)
    good = planned(graphs, steps=6, gate=4, self_interval=3, warm_up=0)
    check(good)
    with pytest.raises(PlanError) as error:
        check(change(good))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"shape": (BATCH, 7)}, {"dtype": "float16"}])
def test_a_carry_read_as_something_else(graphs: Graphs, change: dict[str, Any]) -> None:
    spec = graphs["reuse_cross"]
    odd = tuple(replace(t, **change) if t.name == "cross.0" else t for t in spec.inputs)
    plan = planned(graphs, steps=6, gate=4)
    with pytest.raises(PlanError, match=r"step 4 reads cross\.0 as .*, but it was written as"):
        PlanCheck([{**graphs, "reuse_cross": replace(spec, inputs=odd)}], CARRIES)(plan)


def test_a_role_is_what_makes_a_denoiser(graphs: Graphs) -> None:
    plan = planned(graphs, steps=3, gate=3)
    with pytest.raises(PlanError, match="step 0 runs graph 'full'; the bundle has reuse_self,"):
        PlanCheck([{**graphs, "full": replace(graphs["full"], role=DECODE)}], CARRIES)(plan)


# --- on several shapes --------------------------------------------------------------------------


FEW = st.dictionaries(st.sampled_from(NAMES), st.just(1), max_size=3)
GRAPHS = st.fixed_dictionaries({name: st.builds(graph, FEW, FEW) for name in ("first", "then")}).map(
    lambda graphs: {"start": graph({}, {"a": 1, "b": 1, "c": 1}), **graphs}
)


@st.composite
def cases(draw: st.DrawFn) -> tuple[Plan, list[Graphs]]:
    """A plan that runs on the first of some shapes, which are like it in all but a tensor or two."""
    graphs = draw(GRAPHS)
    program = ["start", *draw(st.lists(st.sampled_from([*graphs]), max_size=8))]
    shapes: list[Graphs] = [graphs]
    for _ in range(draw(st.integers(1, 3))):
        other = dict(graphs)
        name = draw(st.sampled_from([*graphs]))
        takes, gives = (
            {t.name: int(t.shape[1]) for t in side[1:]} for side in (other[name].inputs, other[name].outputs)
        )
        side, carry, size = draw(st.sampled_from([takes, gives])), draw(st.sampled_from(NAMES)), draw(st.integers(0, 2))
        side[carry] = size
        kept = [{n: s for n, s in carries.items() if s} for carries in (takes, gives)]
        other[name] = graph(*kept)
        shapes.append(other)
    try:
        return plan_of(program, graphs), shapes
    except PlanError:
        return plan_of(["start"], graphs), shapes


@given(cases())
def test_many_shapes_are_as_each_of_them(case: tuple[Plan, list[Graphs]]) -> None:
    plan, shapes = case
    each = [outcome(plan, shape) for shape in shapes]
    assert each[0] == ""
    assert outcome(plan, *shapes) == next(filter(None, each), "")


@given(cases())
def test_a_shape_that_one_plan_ran_on_is_asked_again_by_the_next(case: tuple[Plan, list[Graphs]]) -> None:
    plan, shapes = case
    check = PlanCheck(shapes, NAMES)
    for one in (plan_of(["start"], shapes[0]), plan, plan):
        try:
            check(one)
            said = ""
        except PlanError as error:
            said = str(error)
        assert said == outcome(one, *shapes)


PLAIN = {"start": graph({}, {"a": 1}), "then": graph({"a": 1}, {})}
ODD: dict[str, tuple[Graphs, str]] = {
    "no such graph": ({"start": PLAIN["start"]}, "step 1 runs graph 'then'; the bundle has start"),
    "a carry that is not taken": ({**PLAIN, "then": graph({}, {})}, "reads nothing, the plan differs in a"),
    "a carry more": ({**PLAIN, "then": graph({"a": 1, "b": 1}, {})}, "reads a, b, the plan differs in b"),
    "a carry that is not given": ({**PLAIN, "start": graph({}, {})}, "step 0 writes a, which graph 'start' does not"),
    "a carry that is overwritten": ({**PLAIN, "then": graph({"a": 1}, {"a": 1})}, "step 1: a step writes the carries"),
    "another form": ({**PLAIN, "then": graph({"a": 2}, {})}, "step 1 reads a as ('float32', ('batch', 2)), but it was"),
}


@pytest.mark.parametrize("what", ODD)
def test_the_last_shape_is_as_good_a_reason_as_the_first(what: str) -> None:
    odd, says = ODD[what]
    larger = {"start": graph({}, {"a": 5}), "then": graph({"a": 5}, {})}
    plan = plan_of(["start", "then", "then"], PLAIN)
    assert outcome(plan, PLAIN, larger) == ""
    assert says in outcome(plan, PLAIN, larger, odd)


def test_no_shape_is_no_reason() -> None:
    assert outcome(plan_of(["start"], PLAIN)) == ""


# --- what it costs ------------------------------------------------------------------------------


class Counted(dict[str, int]):
    """Carries that count how often anybody asks for one."""

    asked = 0

    def __contains__(self, name: object) -> bool:
        self.asked += 1
        return super().__contains__(name)


class Walked(tuple[Step, ...]):
    """Steps that count how often anybody begins to walk them."""

    times = 0

    def __iter__(self) -> Iterator[Step]:
        type(self).times += 1
        return super().__iter__()


def test_tensors_are_looked_at_once_for_all_plans() -> None:
    carries = Counted(dict.fromkeys(NAMES, 0))
    check = PlanCheck([PLAIN] * 10, carries)
    assert carries.asked == 10 * sum(len(g.inputs) + len(g.outputs) for g in PLAIN.values())
    before = carries.asked
    for _ in range(100):
        check(plan_of(["start", "then"], PLAIN))
    assert carries.asked == before


def test_a_plan_is_walked_once_for_all_shapes() -> None:
    plan = plan_of(["start", "then"], PLAIN)
    counts = []
    for shapes in (2, MOST_SHAPES):
        Walked.times = 0
        odd = [{**PLAIN, f"{i}": graph({}, {"a": i + 2})} for i in range(shapes)]
        PlanCheck(odd, NAMES)(replace(plan, steps=Walked(plan.steps)))
        counts.append(Walked.times)
    assert counts[0] == counts[1] < 10


def test_a_manifest_full_of_shapes_and_steps_takes_no_time() -> None:
    """Sixty of the longest plans, and as many shapes as there may be, no two of them alike: half a second."""
    loop = {"start": graph({}, {"a": 1}), "then": graph({"a": 1}, {"a": 1}), "end": graph({"a": 1}, {})}
    plan = plan_of(["start", *["then"] * (MOST_STEPS - 2), "end"], loop)
    shapes: list[dict[str, Any]] = [{**loop, f"{i}": graph({}, {"a": i + 2})} for i in range(MOST_SHAPES)]
    began = time.monotonic()
    check = PlanCheck(shapes, NAMES)
    for _ in range(60):
        check(plan)
    assert time.monotonic() - began < 20
