"""Plans: built from a program by liveness, proved against graphs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.hostile import Raw, bad_values, leaves, put
from tests.toy_bundle import Toy, carries, make_plan, sampler
from tgate_engine.errors import PlanError, TgateError
from tgate_engine.graph import BATCH, DECODE, DENOISE, GraphSpec, Macs, TensorSpec
from tgate_engine.manifest import Manifest
from tgate_engine.plan import Call, Plan, Step, build_plan
from tgate_engine.sampler import MOST_CALLS, MOST_LEAD_IN, MOST_STEPS
from tgate_export.methods.base import Settings

CARRIES = carries(Toy())


@pytest.fixture(scope="module")
def graphs(manifest: Manifest) -> Mapping[str, GraphSpec]:
    return manifest.shapes[0].graphs


def planned(graphs: Mapping[str, GraphSpec], *, lead_in: int = 0, **settings: Any) -> Plan:
    return make_plan("p", Settings(**settings), Toy(), graphs, lead_in=lead_in)


def changed(plan: Plan, index: int, **changes: Any) -> Plan:
    steps = [replace(step, **changes) if step.index == index else step for step in plan.steps]
    return replace(plan, steps=tuple(steps))


def build(graphs: Mapping[str, GraphSpec], program: Sequence[str], **more: Any) -> Plan:
    """A plan over any graphs whose carries are one letter each."""
    return build_plan(
        "p",
        [Call("phase", graph) for graph in program],
        sampler=sampler(len(program)),
        guidance_scale=3.0,
        graphs=graphs,
        carries=[*"abcd"],
        settings={},
        **more,
    )


def graph(reads: str, writes: str, shape: tuple[int | str, ...] = (BATCH, 3)) -> GraphSpec:
    """A graph that takes and gives carries of one letter, beside something that is no carry."""

    def tensors(names: str) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name=name, dtype="float32", shape=shape) for name in ("z", *names))

    return GraphSpec(
        file="g.onnx",
        role=DENOISE,
        batch=(1, 4),
        inputs=tensors(reads),
        outputs=tensors(writes),
        macs=Macs(paper=0, all=0),
    )


# --- liveness -----------------------------------------------------------------------------------


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
    plan.check(LETTERS, "abcd")


@given(st.lists(st.sampled_from(list(LETTERS)), min_size=2, max_size=9).filter(readable), st.data())
def test_a_step_writes_no_more_and_no_less(program: list[str], data: st.DataObject) -> None:
    """So images at different steps of one graph can share a call: what is written beyond a step is read by nobody."""
    plan = build(LETTERS, program)
    step = data.draw(st.sampled_from(plan.steps))
    gives = set(LETTERS[step.graph].output_names()) - {"z"}
    other = data.draw(st.sets(st.sampled_from("abcd")))
    altered = changed(plan, step.index, writes=tuple(sorted(other)))
    if other == set(step.writes):
        altered.check(LETTERS, "abcd")
        return
    with pytest.raises(PlanError) as error:
        altered.check(LETTERS, "abcd")
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
    plan.check(graphs, CARRIES)
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    unread: set[str] = set()
    for step in plan.steps:  # every value written is read before it is written again
        unread -= set(step.reads)
        assert not unread & set(step.writes)
        unread |= set(step.writes)
    assert not unread


def test_macs_are_the_sum_over_the_steps(graphs: Mapping[str, GraphSpec]) -> None:
    plan = planned(graphs, steps=6, gate=4, self_interval=3, warm_up=0)
    assert plan.macs(graphs) == (2 * 2000 + 2 * 1600 + 2 * 800, 2 * 2600 + 2 * 1700 + 2 * 1100)


def test_a_plan_keeps_what_it_was_made_from(graphs: Mapping[str, GraphSpec]) -> None:
    plan = planned(graphs, steps=6, gate=4, self_interval=3, warm_up=0)
    assert plan.settings == {"method": "tgate", "n": 6, "m": 4, "k": 3, "w": 0, "f": 1}
    named = build(LETTERS, ["none"], baselines=["ungated", "other"])
    assert named.baselines == ("ungated", "other")
    assert Plan.from_json(named.to_json()).baselines == ("ungated", "other")


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
def test_a_plan_that_cannot_run(graphs: Mapping[str, GraphSpec], fault: str) -> None:
    change, says = FAULTS[fault]
    good = planned(graphs, steps=6, gate=4, self_interval=3, warm_up=0)
    good.check(graphs, CARRIES)
    with pytest.raises(PlanError) as error:
        change(good).check(graphs, CARRIES)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("change", [{"shape": (BATCH, 7)}, {"dtype": "float16"}])
def test_a_carry_read_as_something_else(graphs: Mapping[str, GraphSpec], change: dict[str, Any]) -> None:
    spec = graphs["reuse_cross"]
    odd = tuple(replace(t, **change) if t.name == "cross.0" else t for t in spec.inputs)
    plan = planned(graphs, steps=6, gate=4)
    with pytest.raises(PlanError, match=r"step 4 reads cross\.0 as .*, but it was written as"):
        plan.check({**graphs, "reuse_cross": replace(spec, inputs=odd)}, CARRIES)


def test_a_role_is_what_makes_a_denoiser(graphs: Mapping[str, GraphSpec]) -> None:
    plan = planned(graphs, steps=3, gate=3)
    with pytest.raises(PlanError, match="step 0 runs graph 'full'; the bundle has reuse_self,"):
        plan.check({**graphs, "full": replace(graphs["full"], role=DECODE)}, CARRIES)


# --- the same program ---------------------------------------------------------------------------


def test_plans_that_give_the_same_pictures(graphs: Mapping[str, GraphSpec]) -> None:
    plan = planned(graphs, steps=6, gate=4)
    renamed = replace(plan, name="other", settings={"n": 1}, baselines=("ungated",))
    assert renamed != plan
    assert plan.same_program(renamed)
    relabelled = replace(plan, steps=tuple(replace(step, phase="else") for step in plan.steps))
    assert plan.same_program(relabelled)
    assert plan.same_program(Plan.from_json(json.loads(json.dumps(plan.to_json()))))


@pytest.mark.parametrize(
    "change",
    [
        lambda p: replace(p, guidance_scale=4.0),
        lambda p: replace(p, sampler=replace(p.sampler, name="other")),
        lambda p: replace(p, sampler=replace(p.sampler, initial_scale=2.0)),
        lambda p: changed(p, 2, call=replace(p.steps[2].call, timestep=7.0)),
        lambda p: changed(p, 2, graph="unguided"),
        lambda p: changed(p, 0, writes=()),
        lambda p: changed(p, 5, reads=()),
        lambda p: replace(p, steps=p.steps[:-1]),
    ],
)
def test_plans_that_do_not(graphs: Mapping[str, GraphSpec], change: Any) -> None:
    plan = planned(graphs, steps=6, gate=4, self_interval=3, warm_up=0)
    assert not plan.same_program(change(plan))


# --- JSON ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "edit",
    [
        lambda d: d.pop("steps"),
        lambda d: d.pop("settings"),
        lambda d: d.pop("baselines"),
        lambda d: d.update(settings=3),
        lambda d: d["settings"].update(m=[3]),
        lambda d: d["settings"].update(m=float("inf")),
        lambda d: d.update(baselines=None),
        lambda d: d["steps"][0].pop("phase"),
        lambda d: d["steps"][0].pop("latents"),
        lambda d: d["steps"][0].update(latents=[1, 2]),
        lambda d: d["steps"][0].update(index="x"),
        lambda d: d["steps"][0].update(reads=None),
        lambda d: d["steps"][0].update(timestep=10**400),
        lambda d: d.update(name=3),
        lambda d: d.update(guidance_scale="a lot"),
        lambda d: d.update(guidance_scale=True),
        lambda d: d.update(guidance_scale=float("nan")),
        lambda d: d.update(guidance_scale=10**400),
        lambda d: d.update(sampler=3),
        lambda d: d["sampler"].update(steps=7),
        lambda d: d["sampler"].update(extra=7),
        lambda d: d.update(extra=7),
        lambda d: d["steps"][0].update(extra=7),
        lambda d: d.update(guidance_scale=-1),
        lambda d: d["steps"][0].update(index=-1),
        lambda d: d.update(steps=3),
        lambda d: d.update(steps=[3]),
    ],
)
def test_json_that_is_no_plan(graphs: Mapping[str, GraphSpec], tmp_path: Path, edit: Any) -> None:
    data = json.loads(json.dumps(planned(graphs, steps=6, gate=4).to_json()))
    edit(data)
    with pytest.raises(TgateError) as error:
        Plan.from_json(data)
    assert "\n" not in str(error.value)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    with pytest.raises(PlanError, match=r"plan\.json"):
        Plan.load(tmp_path / "plan.json")


def test_a_plan_file(graphs: Mapping[str, GraphSpec], tmp_path: Path) -> None:
    plan = planned(graphs, steps=6, gate=4)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    assert Plan.load(tmp_path / "plan.json") == Plan.load(str(tmp_path / "plan.json")) == plan


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[" * 100_000, b"3", b"[]", b'"plan"', b"null"])
def test_a_file_that_is_no_plan(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "plan.json").write_bytes(content)
    with pytest.raises(PlanError, match=r"plan\.json .*; write one with `tgate plan`$") as error:
        Plan.load(tmp_path / "plan.json")
    assert "\n" not in str(error.value)


def test_a_plan_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"plan\.json: there is no such plan file; write one with `tgate plan`"):
        Plan.load(tmp_path / "plan.json")
    with pytest.raises(PlanError, match="is not a plan file"):
        Plan.load(tmp_path)


def test_a_plan_file_that_is_no_plain_file(tmp_path: Path) -> None:
    """A pipe that nobody writes to, and what never ends, are refused at once."""
    os.mkfifo(tmp_path / "pipe.json")
    with (tmp_path / "long.json").open("wb") as file:
        file.truncate(2**40)
    for path in (tmp_path / "pipe.json", Path("/dev/zero"), tmp_path / "long.json"):
        with pytest.raises(PlanError, match="is not a plan file"):
            Plan.load(path)


def test_a_plan_file_by_a_link(graphs: Mapping[str, GraphSpec], tmp_path: Path) -> None:
    """Which the user made."""
    plan = planned(graphs, steps=2, gate=1)
    (tmp_path / "plan.json").write_text(json.dumps(plan.to_json()))
    (tmp_path / "link.json").symlink_to("plan.json")
    assert Plan.load(tmp_path / "link.json") == plan


def test_whatever_a_plan_file_holds_is_refused_in_a_line_or_is_a_plan(
    graphs: Mapping[str, GraphSpec], tmp_path: Path
) -> None:
    data = json.loads(json.dumps(planned(graphs, steps=2, gate=1).to_json()))
    refused: list[str] = []
    for number, (place, leaf) in enumerate(leaves(data)):
        for value in bad_values(leaf)[number % 4 :: 4]:
            text = json.dumps(put(data, place, "here" if isinstance(value, Raw) else value))
            text = text.replace('"here"', value) if isinstance(value, Raw) else text
            (tmp_path / "plan.json").write_text(text)
            try:
                plan = Plan.load(tmp_path / "plan.json")
                assert Plan.from_json(plan.to_json()) == plan
            except TgateError as error:
                refused.append(str(error))
    assert [text for text in refused if not text.isprintable() or len(text) > 500] == []
    assert len(refused) > 150


def test_absurd_numbers_of_steps_are_refused_at_once(graphs: Mapping[str, GraphSpec]) -> None:
    data = planned(graphs, steps=2, gate=1).to_json()
    with pytest.raises(PlanError, match=rf"plan\.steps: expected at most {MOST_CALLS} entries, got 200000"):
        Plan.from_json({**data, "steps": data["steps"] * 100_000})


def test_the_longest_plan_there_is_is_read_again(graphs: Mapping[str, GraphSpec]) -> None:
    """Of as many steps as anybody may ask for, and the calls that a sampler makes before."""
    longest = planned(graphs, steps=MOST_STEPS, gate=MOST_STEPS, lead_in=MOST_LEAD_IN)
    assert len(longest.steps) == MOST_CALLS
    assert Plan.from_json(longest.to_json()) == longest


def test_steps_are_values(graphs: Mapping[str, GraphSpec]) -> None:
    plan = planned(graphs, steps=3, gate=2)
    assert isinstance(plan.steps[0], Step)
    assert hash(plan.steps[0]) == hash(replace(plan.steps[0]))
    again = Plan.from_json(plan.to_json())
    assert hash(again) == hash(plan)
    assert again == plan
