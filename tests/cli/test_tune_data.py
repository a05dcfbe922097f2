"""What was found, told: the sentence, the facts, and that the numbers are those of plans and times."""

from __future__ import annotations

import argparse
import json
from types import SimpleNamespace
from typing import Any

import pytest

from tests.cli.running import Run
from tests.cli.tuned import data, report
from tgate_cli.tune_data import data_of, facts_of, verdict
from tgate_engine.plan_report import Estimate
from tgate_runtime.tuning.search import Point


def test_the_verdict_of_a_budget_and_of_a_speed() -> None:
    assert verdict(data()) == (
        "m=2 is the fastest plan found that keeps psnr at 30.00 dB or better, by its lower bound: 1.60 times as fast "
        "as ungated, psnr 31.00 dB (30.20 to 31.90)."
    )
    fast = verdict(data(goal={"metric": "psnr", "speedup": 1.5}))
    assert fast.startswith("m=2 is the best by psnr of the plans that are 1.5 times as fast as ungated: 1.60 times")


def test_the_chosen_plan_is_shown_where_another_is_faster_and_better_but_less_surely() -> None:
    unsure, sure = Point("unsure", 100.0, (20.0, 60.0)), Point("sure", 200.0, (31.0, 31.0))
    plan = SimpleNamespace(settings={}, steps=[])
    tuned: Any = SimpleNamespace(
        chosen="sure",
        point=sure,
        front=[unsure],
        tried=2,
        ungated_ms=300.0,
        prediction_error=0.0,
        ungated_error=0.0,
        times=None,
        report=SimpleNamespace(to_json=report),
    )
    choices: Any = SimpleNamespace(plans={"sure": plan, "unsure": plan}, ungated=plan)
    args = argparse.Namespace(budget=("psnr", 30.0), metric="psnr")
    bundle: Any = SimpleNamespace(manifest=SimpleNamespace(model="toy"))
    shown = data_of(args, bundle, tuned, choices)["front"]
    assert [(point["plan"], point["faster"]) for point in shown] == [("unsure", 3.0), ("sure", 1.5)]


def test_facts_name_whatever_the_report_holds_for() -> None:
    change = Estimate(mean=-1.0, low=-2.0, high=0.0)
    told = report(beside={"first_object": change}, judge="f" * 64, elsewhere={"openvino 2026": change})
    facts = dict(facts_of(told))
    assert facts["first object"] == "-1.0 points (-2.0 to +0.0)"
    assert facts["psnr, openvino 2026"] == "-1.00 dB (-2.00 to 0.00)"
    assert facts["pictures"] == "8 of 4 prompts, from seed 7 on"
    assert facts["time of a picture"] == "200.0 ms, predicted 210.0 ms; ungated 320.0 ms"
    assert facts["multiply-accumulates"] == "2e+06; ungated 3e+06, 1.50 times as many"
    assert facts["engine"] == "ort-cpu 1.31.1 f32"
    assert facts["SHA-256, full.onnx"] == "d" * 64
    for name in ("bundle", "program", "prompts_sha256", "judge"):
        assert told[name] in facts.values()
    assert "SHA-256, judge" not in dict(facts_of(report()))


def test_the_timeline_is_the_plans_steps_and_what_their_graphs_take(run: Run, toy: object, tmp_path: object) -> None:
    asked = ("--budget", "psnr=22", "--images", 4, "--threads", 1, "--quiet", "--json", "--prompts")
    prompts = f"{tmp_path}/prompts.txt"
    with open(prompts, "w") as file:
        file.write("a large red circle\n")
    status, out, _ = run("tune", toy, *asked, prompts)
    assert status == 0
    told = json.loads(out)
    shown = json.loads(run("inspect", toy, "--json")[1])["plans"]
    assert [step["graph"] for step in told["timeline"]["plan"]] == [s["graph"] for s in shown["tuned"]["steps"]]
    (each,) = {(step["graph"], step["ms"]) for step in told["timeline"]["ungated"]}
    assert each[0] == "full"
    # A picture is its steps, and the text and decoder call around them, which are the same for both.
    point = next(point for point in told["front"] if point["plan"] == told["chosen"])
    around = [
        whole - sum(step["ms"] for step in told["timeline"][name])
        for name, whole in (("plan", point["predicted_ms"]), ("ungated", told["ungated_ms"]))
    ]
    assert around[0] == pytest.approx(around[1])
