"""Plans as values, in JSON and in files."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.contract.plans import changed, planned
from tests.hostile import Raw, bad_values, leaves, put
from tgate_engine.errors import PlanError, TgateError
from tgate_engine.graph import GraphSpec
from tgate_engine.plan import Plan, Step
from tgate_engine.sampler import MOST_CALLS, MOST_LEAD_IN, MOST_STEPS


def test_macs_are_the_sum_over_the_steps(graphs: Mapping[str, GraphSpec]) -> None:
    plan = planned(graphs, steps=6, gate=4, self_interval=3, warm_up=0)
    assert plan.macs(graphs) == (2 * 2000 + 2 * 1600 + 2 * 800, 2 * 2600 + 2 * 1700 + 2 * 1100)


def test_a_plan_keeps_what_it_was_made_from(graphs: Mapping[str, GraphSpec]) -> None:
    plan = planned(graphs, steps=6, gate=4, self_interval=3, warm_up=0)
    assert plan.settings == {"method": "tgate", "n": 6, "m": 4, "k": 3, "w": 0, "f": 1}
    named = replace(plan, baselines=("ungated", "other"))
    assert Plan.from_json(named.to_json()).baselines == ("ungated", "other")


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
