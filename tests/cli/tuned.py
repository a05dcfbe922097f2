"""What ``tgate tune`` may have found, for the tests of what is made of it."""

from __future__ import annotations

from typing import Any

import numpy as np

from tgate_engine.plan_report import Estimate, PlanReport
from tgate_runtime.tuning.measure import Pair

HOSTILE = '<script>document.title = "taken"</script>"><img src="https://example.org/x.png" onerror="alert(1)">'


def report(**changes: Any) -> dict[str, Any]:
    """A report of a plan that takes 200 of 320 ms."""
    facts: dict[str, Any] = {
        "bundle": "b" * 64,
        "program": "c" * 64,
        "settings": {"method": "tgate", "n": 4, "m": 2},
        "files": {"full.onnx": "d" * 64},
        "metric": "psnr",
        "quality": Estimate(mean=31.0, low=30.2, high=31.9),
        "unrelated": Estimate(mean=12.0, low=11.0, high=13.0),
        "images": 8,
        "prompts": 4,
        "prompts_sha256": "e" * 64,
        "seed": 7,
        "size": "24x16",
        "predicted_ms": 210.0,
        "measured_ms": 200.0,
        "ungated_ms": 320.0,
        "macs": 2_000_000,
        "ungated_macs": 3_000_000,
        "engine": "ort-cpu",
        "engine_version": "1.31.1",
        "precision": "f32",
        "threads": 2,
        "machine": "a processor",
        "version": "0.1.0",
    }
    return PlanReport(**{**facts, **changes}).to_json()


def data(**changes: Any) -> dict[str, Any]:
    """Three plans on the front, the second of which is chosen."""

    def point(name: str, ms: float, mean: float) -> dict[str, Any]:
        quality = {"mean": mean, "low": mean - 0.8, "high": mean + 0.9}
        return {"plan": name, "settings": {}, "predicted_ms": ms, "faster": 300 / ms, "quality": quality}

    def steps(*graphs: str) -> list[dict[str, Any]]:
        return [{"graph": graph, "ms": {"full": 70.0, "reuse_cross": 30.0}[graph]} for graph in graphs]

    found = {
        "model": "toy",
        "goal": {"metric": "psnr", "budget": 30.0},
        "chosen": "m=2",
        "plans": 20,
        "tried": 9,
        "front": [point("m=1", 150.0, 25.0), point("m=2", 210.0, 31.0), point("m=3", 260.0, 36.0)],
        "ungated_ms": 300.0,
        "prediction_error": {"plan": 0.05, "ungated": -0.06},
        "timeline": {
            "plan": steps("full", "full", "reuse_cross", "reuse_cross"),
            "ungated": steps("full", "full", "full", "full"),
        },
        "report": report(),
    }
    return {**found, **changes}


def pairs(prompt: str = "a green star", *, frames: int = 0) -> list[Pair]:
    """Two pictures of 24x16 pixels, red where the plan is ungated and blue where it is not; or videos."""
    shape = (frames, 16, 24, 3) if frames else (16, 24, 3)
    red, blue = np.zeros(shape, np.uint8), np.zeros(shape, np.uint8)
    red[..., 0], blue[..., 2] = 255, 255
    facts: dict[str, Any] = {"prompt": prompt, "ungated": red, "tuned": blue}
    return [Pair(image=i, seed=7 + i, value=value, **facts) for i, value in ((3, 24.1), (0, 28.75))]
