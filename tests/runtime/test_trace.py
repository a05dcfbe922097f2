"""A trace: what the engine did, what the host did in between, and no gap."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tgate_engine.plan import Plan
from tgate_runtime.runner import StepDone
from tgate_runtime.session import Session
from tgate_runtime.trace import write_trace


@pytest.fixture(scope="module")
def plan(session: Session) -> Plan:
    return session.manifest.plan("default")


def steps(plan: Plan) -> list[StepDone]:
    """Calls of 2 ms, each a millisecond after the one before."""
    return [
        StepDone(rows=range(1), steps=(step,), begin_s=100.001 + 0.003 * i, elapsed_ms=2.0)
        for i, step in enumerate(plan.steps)
    ]


def events(path: Path) -> list[dict[str, Any]]:
    data: dict[str, Any] = json.loads(path.read_text())
    return list(data["traceEvents"])


def test_a_trace_holds_every_step_and_what_lies_between(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    write_trace(path, "a title", 100.0, 100.025, steps(plan))
    spans = [event for event in events(path) if event["ph"] == "X"]
    calls = [event for event in spans if event["tid"] == 1]
    assert [event["name"] for event in calls] == [step.graph for step in plan.steps]
    assert [event["args"]["writes"] for event in calls] == [list(step.writes) for step in plan.steps]
    assert [event["args"]["reads"] for event in calls] == [list(step.reads) for step in plan.steps]
    assert [event["args"]["step"] for event in calls] == list(range(8))
    assert [event["ts"] for event in calls] == pytest.approx([1000 + 3000 * i for i in range(8)], abs=0.01)
    assert [event["dur"] for event in calls] == pytest.approx([2000] * 8, abs=0.01)
    host = [event for event in spans if event["tid"] == 2]
    assert [event["name"] for event in host] == ["before the step"] * 8 + ["after the last step"]
    assert [event["dur"] for event in host] == pytest.approx([1000] * 9, abs=0.01)
    assert spans[-1]["ts"] + spans[-1]["dur"] == pytest.approx(25_000, abs=0.01)
    ends = 0.0
    for event in spans:  # engine and host take turns
        assert event["ts"] == pytest.approx(ends, abs=0.01)
        ends = event["ts"] + event["dur"]


def test_it_names_the_process_and_its_rows(plan: Plan, tmp_path: Path) -> None:
    write_trace(tmp_path / "trace.json", "toy, plan default", 100.0, 100.025, steps(plan))
    names = [event["args"]["name"] for event in events(tmp_path / "trace.json") if event["ph"] == "M"]
    assert names == ["toy, plan default", "engine", "host"]
