"""What ``tgate bench`` measures, on the toy bundle; the times themselves are not tested."""

from __future__ import annotations

import io
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.toy_bundle import Toy, build
from tgate_cli import views
from tgate_engine.bundle import Bundle
from tgate_engine.errors import BundleError, RequestError
from tgate_runtime.backends.ort import OrtCpu
from tgate_runtime.benchmark import bench


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(build(tmp_path_factory.mktemp("bench") / "toy"))


def test_plans_are_measured_in_turns(bundle: Bundle) -> None:
    seen: list[str] = []
    data = json.loads(
        json.dumps(bench(bundle, threads=1, repeats=3, batch=2, on_run=lambda *args: seen.append(args[2])))
    )
    assert seen == ["gated", "guidance_stopped", "ungated"] * 4
    assert set(data["graphs"]) == {"text", "decoder", "full", "reuse_self", "reuse_cross", "unguided"}
    assert all(graph["ms"] > 0 for graph in data["graphs"].values())
    for plan in data["plans"].values():
        assert len(plan["runs_ms"]) == 3
        assert plan["ms"] == statistics.median(plan["runs_ms"])
        assert 0 < plan["outside_engine"] < 1
        assert plan["picture_ms"] > plan["ms"]
    plans = data["plans"]
    assert data["speedup"] == plans["ungated"]["ms"] / plans["gated"]["ms"]
    assert data["mac_ratio"] == pytest.approx(8 * 2600 / (4 * 2600 + 1700 + 3 * 1100))
    assert data["guidance_stopped_mac_ratio"] == pytest.approx(8 * 2600 / (5 * 2600 + 3 * 1300))
    settings = data["settings"]
    assert (settings["engine"], settings["threads"], settings["batch"], settings["repeats"]) == ("ort-cpu", 1, 2, 3)
    assert (settings["steps_n"], settings["gate_m"], settings["self_interval_k"]) == (8, 5, 2)
    assert settings["cpu"]


def test_without_guidance_there_is_none_to_stop(tmp_path: Path) -> None:
    data = bench(Bundle.open(build(tmp_path / "toy", Toy(guided=False))), threads=1, repeats=1, warm_ups=0)
    assert data["plans"]["guidance_stopped"] == {"ms": None}
    out = io.StringIO()
    views.benchmark(data, out)
    assert "guidance_stopped" in out.getvalue()


def test_the_view_for_people(bundle: Bundle) -> None:
    out = io.StringIO()
    views.benchmark(bench(bundle, threads=1, repeats=1), out)
    assert "1.35×" in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_settings_that_cannot_be(bundle: Bundle) -> None:
    with pytest.raises(RequestError, match="repeats must be at least 1"):
        bench(bundle, repeats=0)
    with pytest.raises(RequestError, match="takes 1 to 4 images at once, got 9"):
        bench(bundle, batch=9, repeats=1)
    with pytest.raises(BundleError, match="has no plan 'other'"):
        bench(bundle, plan="other")


def test_a_plan_that_is_left_out_is_not_loaded(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    class Watched(OrtCpu):
        def load(self, bundle: Bundle, graphs: Sequence[str], on_build: Any = None) -> Any:
            loaded.extend(graphs)
            return super().load(bundle, graphs, on_build)

    monkeypatch.setattr("tgate_runtime.backends.ort.OrtCpu", Watched)
    data = bench(bundle, threads=1, repeats=1, warm_ups=0, stopped=False)
    assert data["plans"]["guidance_stopped"] == {"ms": None}
    assert data["guidance_stopped_speedup"] is None
    assert set(data["graphs"]) == set(loaded) == {"text", "decoder", "full", "reuse_self", "reuse_cross"}


def test_a_trace_that_cannot_be_written_is_found_before_measuring(bundle: Bundle) -> None:
    measured: list[str] = []
    with pytest.raises(RequestError, match=r"^/proc/x\.json cannot be written \(.*\); name another place$"):
        bench(bundle, repeats=1, trace=Path("/proc/x.json"), on_run=lambda *args: measured.append(args[2]))
    assert measured == []


def test_a_trace_is_written_once(bundle: Bundle, tmp_path: Path) -> None:
    """When everything is measured, and of the last run: nothing writes while a plan is timed."""
    path = tmp_path / "trace.json"
    seen: list[list[str]] = []
    bench(
        bundle,
        threads=1,
        repeats=2,
        trace=path,
        on_run=lambda *_: seen.append([file.name for file in tmp_path.iterdir()]),
    )
    assert seen == [[]] * 9
    assert [file.name for file in tmp_path.iterdir()] == ["trace.json"]


def test_a_trace_holds_every_step_and_what_lies_between(bundle: Bundle, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    bench(bundle, threads=1, repeats=1, warm_ups=0, trace=path)
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    steps = bundle.manifest.plan("default").steps
    calls = [event for event in events if event["name"] in bundle.manifest.graphs]
    assert [event["name"] for event in calls] == [step.graph for step in steps]
    assert [event["args"]["writes"] for event in calls] == [list(step.writes) for step in steps]
    ends = 0.0
    for event in events:  # engine and host take turns, and leave no gap
        assert event["ts"] == pytest.approx(ends, abs=1.0)
        assert event["dur"] >= 0
        ends = event["ts"] + event["dur"]
