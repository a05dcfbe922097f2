"""What ``tgate tune`` found, as JSON values: what is printed, and what its page and its Markdown are made from."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tgate_cli.views import facts
from tgate_engine.bundle import Bundle
from tgate_engine.plan_report import Estimate, told

if TYPE_CHECKING:
    from tgate_engine.plan import Plan
    from tgate_export.candidates import Candidates
    from tgate_runtime.tuning.measure import Times
    from tgate_runtime.tuning.run import Tuned
    from tgate_runtime.tuning.search import Point

PAIRS = 16
"""Pictures of the chosen plan that its page shows beside the ungated ones."""
_DIGESTS = {"bundle": "bundle", "program": "program", "prompts": "prompts_sha256", "judge": "judge"}
"""Of a report, by what they are of."""


def data_of(args: argparse.Namespace, bundle: Bundle, tuned: Tuned, choices: Candidates) -> dict[str, Any]:
    """All of it but the pictures. ``quality`` is in the metric's unit, times are milliseconds of one picture, and of
    one step under ``timeline``, each step's graph and what it takes."""
    # A plan that is faster and better in the mean may be known less surely, and not be the one.
    shown = sorted({*tuned.front, tuned.point}, key=lambda point: (point.ms, point.name))
    goal = {"budget": args.budget[1]} if args.budget is not None else {"speedup": args.speedup}
    return {
        "model": bundle.manifest.model,
        "goal": {"metric": args.metric, **goal},
        "chosen": tuned.chosen,
        "plans": len(choices.plans),
        "tried": tuned.tried,
        "front": [_point(point, tuned, choices) for point in shown],
        "ungated_ms": tuned.ungated_ms,
        "prediction_error": {"plan": tuned.prediction_error, "ungated": tuned.ungated_error},
        "timeline": {
            "plan": _timeline(choices.plans[tuned.chosen], tuned.times),
            "ungated": _timeline(choices.ungated, tuned.times),
        },
        "report": tuned.report.to_json(),
    }


def _point(point: Point, tuned: Tuned, choices: Candidates) -> dict[str, Any]:
    return {
        "plan": point.name,
        "settings": dict(choices.plans[point.name].settings),
        "predicted_ms": point.ms,
        "faster": tuned.ungated_ms / point.ms,
        "quality": {"mean": point.mean, "low": point.bounds[0], "high": point.bounds[1]},
    }


def _timeline(plan: Plan, times: Times) -> Sequence[dict[str, Any]]:
    return [{"graph": step.graph, "ms": times.graphs[step.graph] + times.host} for step in plan.steps]


def verdict(data: Mapping[str, Any]) -> str:
    """What was chosen and why, in a sentence."""
    report, goal = data["report"], data["goal"]
    metric, speed = report["metric"], report["ungated_ms"] / report["measured_ms"]
    why = (
        f"the fastest plan found that keeps {metric} at {told(metric, goal['budget'])} or better, by its lower bound"
        if "budget" in goal
        else f"the best by {metric} of the plans that are {goal['speedup']:g} times as fast as ungated"
    )
    return (
        f"{data['chosen']} is {why}: {speed:.2f} times as fast as ungated, {metric} "
        f"{Estimate(**report['quality']).told(metric)}."
    )


def facts_of(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a report holds for, by a word for each; its SHA-256 last."""
    metric = report["metric"]
    measured = [
        (f"{metric}, other seeds", Estimate(**report["unrelated"]).told(metric)),
        *((f"{metric}, {engine}", Estimate(**each).told(metric)) for engine, each in report["elsewhere"].items()),
        *((name.replace("_", " "), Estimate(**each).told(name)) for name, each in report["beside"].items()),
    ]
    return [
        ("settings", facts(report["settings"])),
        (metric, Estimate(**report["quality"]).told(metric)),
        *measured,
        ("pictures", f"{report['images']} of {report['prompts']} prompts, from seed {report['seed']} on"),
        ("size", report["size"]),
        (
            "time of a picture",
            f"{report['measured_ms']:.1f} ms, predicted {report['predicted_ms']:.1f} ms; ungated "
            f"{report['ungated_ms']:.1f} ms",
        ),
        (
            "multiply-accumulates",
            f"{report['macs']:.4g}; ungated {report['ungated_macs']:.4g}, "
            f"{report['ungated_macs'] / report['macs']:.2f} times as many",
        ),
        ("engine", " ".join(filter(None, (report["engine"], report["engine_version"], report["precision"])))),
        ("threads", str(report["threads"] or "the engine's choice")),
        ("processor", report["machine"]),
        ("tgate-engine", report["version"]),
        *((f"SHA-256, {name}", report[key]) for name, key in _DIGESTS.items() if report[key]),
        *((f"SHA-256, {name}", digest) for name, digest in report["files"].items()),
    ]
