"""What ``tgate bench`` measures, on the toy bundle; the times themselves are not tested."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.toy_bundle import Toy, build
from tgate_engine.bundle import Bundle
from tgate_engine.errors import BundleError, EngineError, RequestError
from tgate_engine.graph import GraphSpec
from tgate_export.methods.base import Settings
from tgate_runtime import benchmark
from tgate_runtime.benchmark import bench, cpu_model, sgemm_gmacs_per_s
from tgate_runtime.engines.ort import OrtCpu
from tgate_runtime.state import State

TOY = Toy(
    settings={
        "default": Settings(steps=8, gate=5, self_interval=2),
        "fast": Settings(steps=8, gate=2),
    },
)


@pytest.fixture(scope="module", autouse=True)
def quick() -> Any:
    """NumPy's rate has a test of its own, and every call would measure it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "sgemm_gmacs_per_s", lambda: 12.5)
        yield


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(build(tmp_path_factory.mktemp("bench") / "toy", TOY))


def test_times_of_numbers_that_are_none_are_not_told(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "noise", lambda _, shape: np.full(shape, 2.5e38, np.float32))
    with pytest.raises(EngineError, match=r"the latents after the last step of plan 'default': \d+ of 32 values"):
        bench(bundle, threads=1, repeats=1, warm_ups=0)


def test_a_plan_and_its_baselines_are_measured_in_turns(bundle: Bundle) -> None:
    seen: list[tuple[int, int, str]] = []
    data = json.loads(json.dumps(bench(bundle, threads=1, repeats=3, batch=2, on_run=lambda *args: seen.append(args))))
    order = ["default", "ungated", "guidance_stopped"] * 4
    assert seen == [(i + 1, 12, name) for i, name in enumerate(order)]
    assert set(data["graphs"]) == {"text", "decoder", "full", "reuse_self", "reuse_cross", "unguided"}
    assert all(graph["ms"] > 0 for graph in data["graphs"].values())
    assert list(data["plans"]) == ["default", "ungated", "guidance_stopped"]
    for plan in data["plans"].values():
        assert len(plan["runs_ms"]) == 3
        assert plan["ms"] == statistics.median(plan["runs_ms"])
        assert 0 < plan["outside_engine"] < 1
        assert plan["outside_engine_ms_per_step"] > 0
        assert plan["step_ms"]["p50"] <= plan["step_ms"]["p99"]
        around = 2 * (data["graphs"]["text"]["ms"] + data["graphs"]["decoder"]["ms"])
        assert plan["picture_ms"] == pytest.approx(plan["ms"] + around)
    settings = data["settings"]
    assert (settings["engine"], settings["threads"], settings["batch"], settings["repeats"]) == ("ort-cpu", 1, 2, 3)
    assert (settings["plan"], settings["size"], settings["memory"]) == ("default", "4x4", "fast")
    assert settings["plan_settings"] == {"method": "tgate", "n": 8, "m": 5, "k": 2, "w": 2, "f": 1}
    assert settings["cpu"] == cpu_model()
    assert data["sgemm_gmacs_per_s"] == 12.5


def test_each_compared_plan_has_its_ratios(bundle: Bundle) -> None:
    data = bench(bundle, threads=1, repeats=1, warm_ups=0)
    plans = data["plans"]
    own = 4 * 2600 + 1700 + 3 * 1100
    assert plans["default"]["macs"] == {"paper": 4 * 2000 + 1600 + 3 * 800, "all": own}
    assert "speedup" not in plans["default"]
    assert plans["ungated"]["mac_ratio"] == pytest.approx(8 * 2600 / own)
    assert plans["guidance_stopped"]["mac_ratio"] == pytest.approx((5 * 2600 + 3 * 1300) / own)
    for name in ("ungated", "guidance_stopped"):
        assert plans[name]["speedup"] == plans[name]["ms"] / plans["default"]["ms"]
    assert data["speedup"] == plans["ungated"]["speedup"]
    assert data["mac_ratio"] == plans["ungated"]["mac_ratio"]


def test_rates_count_the_images_of_a_call(bundle: Bundle) -> None:
    graphs = bench(bundle, threads=1, repeats=1, warm_ups=0, batch=3)["graphs"]
    for name, images, macs in (("full", 3, 2600), ("reuse_cross", 3, 1100), ("decoder", 1, 96)):
        assert graphs[name]["macs"]["all"] == macs
        assert graphs[name]["gmacs_per_s"] == pytest.approx(images * macs / graphs[name]["ms"] / 1e6)


@pytest.mark.parametrize(
    ("plan", "against", "order"),
    [
        ("fast", None, ["fast", "ungated", "fast.guidance_stopped"]),
        ("fast", ["default", "ungated"], ["fast", "default", "ungated"]),
        ("fast", ["fast"], ["fast"]),
        ("default", [], ["default"]),
        ("ungated", None, ["ungated"]),
    ],
)
def test_what_a_plan_is_compared_with(
    bundle: Bundle, plan: str, against: Sequence[str] | None, order: list[str]
) -> None:
    """Its own baselines, or what is named; a baseline that another plan has already is that plan."""
    data = bench(bundle, threads=1, repeats=1, warm_ups=0, plan=plan, against=against)
    assert list(data["plans"]) == order
    if len(order) == 1:
        assert (data["speedup"], data["mac_ratio"]) == (None, None)


def test_without_guidance_there_is_none_to_stop(tmp_path: Path) -> None:
    data = bench(Bundle.open(build(tmp_path / "toy", Toy(guided=False))), threads=1, repeats=1, warm_ups=0)
    assert list(data["plans"]) == ["default", "ungated"]


def test_a_size_and_the_range_of_its_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.open(build(tmp_path / "toy", Toy(sizes=((4, 4), (8, 2)), batches=((1, 1), (3, 4)))))
    made: list[tuple[str, int]] = []

    def making(session: Any, plan: Any, rows: int) -> State:
        made.append((session.sizes[0], rows))
        return State(session, plan, rows)

    monkeypatch.setattr(benchmark, "State", making)
    wide = bench(bundle, threads=1, repeats=1, warm_ups=0, size="8x2", against=[])
    assert (wide["settings"]["size"], wide["settings"]["batch"]) == ("8x2", 1)
    many = bench(bundle, threads=1, repeats=1, warm_ups=0, batch=4, against=[])
    assert (many["settings"]["size"], many["settings"]["batch"]) == ("4x4", 4)
    assert made == [("8x2", 1), ("4x4", 4)]
    for batch in (2, 5):
        with pytest.raises(RequestError, match=f"takes 1 or 3 to 4 images at once, got {batch}; export with --batch"):
            bench(bundle, batch=batch, repeats=1)


def test_settings_that_cannot_be(bundle: Bundle) -> None:
    with pytest.raises(RequestError, match="repeats must be at least 1"):
        bench(bundle, repeats=0)
    with pytest.raises(RequestError, match="warm-ups at least 0, got 1 and -1"):
        bench(bundle, repeats=1, warm_ups=-1)
    with pytest.raises(RequestError, match="takes 1 to 4 images at once, got 9"):
        bench(bundle, batch=9, repeats=1)
    with pytest.raises(BundleError, match="has no plan 'other'"):
        bench(bundle, plan="other")
    with pytest.raises(BundleError, match="has no plan 'other'"):
        bench(bundle, against=["other"])
    with pytest.raises(BundleError, match="has no size 9x9"):
        bench(bundle, size="9x9")


def test_a_plan_that_is_left_out_is_not_loaded(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []
    load = OrtCpu.load

    def watched(self: OrtCpu, bundle: Bundle, graphs: Sequence[GraphSpec], on_build: Any = None) -> Any:
        loaded.extend(spec.file for spec in graphs)
        return load(self, bundle, graphs, on_build)

    monkeypatch.setattr(OrtCpu, "load", watched)
    data = bench(bundle, threads=1, repeats=1, warm_ups=0, against=["ungated"])
    assert set(data["graphs"]) == {"text", "decoder", "full", "reuse_self", "reuse_cross"}
    assert {f"{name}.onnx" for name in data["graphs"]} == set(loaded)


# --- traces -------------------------------------------------------------------------------------


def test_a_trace_that_cannot_be_written_is_told_before_measuring(bundle: Bundle) -> None:
    measured: list[str] = []
    with pytest.raises(RequestError, match=r"^/proc/x\.json cannot be written \(.*\); name another place$"):
        bench(bundle, repeats=1, trace=Path("/proc/x.json"), on_run=lambda *args: measured.append(args[2]))
    assert measured == []


def test_a_trace_is_written_once(bundle: Bundle, tmp_path: Path) -> None:
    """When everything is measured, and of the plan's last run: nothing writes while a plan is timed."""
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
    events = [event for event in json.loads(path.read_text())["traceEvents"] if event["ph"] == "X"]
    steps = bundle.manifest.plan("default").steps
    calls = [event for event in events if event["name"] in bundle.manifest.shapes[0].graphs]
    assert [event["name"] for event in calls] == [step.graph for step in steps]
    ends = 0.0
    for event in events:  # engine and host take turns, and leave no gap
        assert event["ts"] == pytest.approx(ends, abs=1.0)
        assert event["dur"] >= 0
        ends = event["ts"] + event["dur"]


def test_numpys_rate_is_a_rate() -> None:
    assert 0.01 < sgemm_gmacs_per_s(size=64, repeats=2) < 1e6
