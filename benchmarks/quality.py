"""What gating costs in pictures: accuracy on 500 captions that training never saw, drawn by the engine.

    python -m benchmarks.quality BUNDLE --output benchmarks/results/quality.json

The four plans draw the same captions from the same noise, and one classifier judges them all (training/evaluate.py).
"""

from __future__ import annotations

import argparse
import json
import platform
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from tgate_engine.bundle import Bundle, write_atomically
from tgate_engine.plan import Plan, build_plan
from tgate_engine.schedule import Schedule
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.session import Session
from training.evaluate import Pictures, evaluation_captions, score_pictures


def rows(bundle: Bundle) -> dict[str, Plan]:
    """The default plan's trajectory in the four ways that are compared; n, m, sampler and guidance are its own."""
    manifest = bundle.manifest
    default = manifest.plan("default")
    s = default.schedule
    schedules = {
        "ungated": s.ungated(),
        f"gated m={s.gate}": Schedule(steps=s.steps, gate=s.gate, warm_up=s.warm_up, lead_in=s.lead_in),
        f"gated m={s.gate} k={s.self_interval}": s,
        f"guidance stopped at {s.gate}": s.guidance_stopped(),
    }
    return {
        name: build_plan(
            name,
            schedule=schedule,
            sampler=default.sampler,
            guidance_scale=default.guidance_scale,
            graphs=manifest.graphs,
            carries=manifest.carries,
        )
        for name, schedule in schedules.items()
    }


def draw(pipe: Pipeline, plan: str, captions: list[str], seed: int, workers: int) -> Pictures:
    """One picture of each caption, uint8 [N, H, W, 3]; picture i starts from the noise of seed ``seed + i``."""

    def one(i: int) -> Pictures:
        return np.asarray(pipe(captions[i], seed=seed + i, negative_prompt="", plan=plan).images[0])

    with ThreadPoolExecutor(workers) as pool:
        return np.stack(list(pool.map(one, range(len(captions)))))


def measure(path: Path, *, count: int, seed: int, workers: int) -> dict[str, Any]:
    """Scores by row, with the settings that they hold for."""
    bundle = Bundle.open(path)
    plans = rows(bundle)
    captions = evaluation_captions(count)
    default = bundle.manifest.plan("default")
    result: dict[str, Any] = {
        "settings": {
            "model": bundle.manifest.model,
            "weights_sha256": bundle.manifest.files[bundle.manifest.weights].sha256,
            "dtype": bundle.manifest.dtype,
            "captions": count,
            "seed": seed,
            "steps": default.schedule.steps,
            "sampler": default.sampler.name,
            "guidance_scale": default.guidance_scale,
            "python": platform.python_version(),
        },
        "rows": {},
    }
    with Session.open(bundle.with_plans(plans), plans=list(plans), threads=1) as session:
        result["settings"]["engine"] = f"{session.backend.name} {session.backend.version}"
        pipe = Pipeline(session)
        for name in plans:
            pictures = draw(pipe, name, captions, seed, workers)
            result["rows"][name] = asdict(score_pictures(captions, pictures))
            print(f"{name}: {result['rows'][name]['first_object']:.1%}", flush=True)
    return result


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    result = measure(args.bundle, count=args.captions, seed=args.seed, workers=args.workers)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
