"""What gating costs in pictures: accuracy on captions that training never saw, drawn by the engine.

    python -m benchmarks.quality BUNDLE --output benchmarks/results/quality.json
    python -m benchmarks.quality BUNDLE --samplers euler,ddim,dpmpp_2m --captions 250 \\
        --output benchmarks/results/schedulers.json

The bundle is any embedded model's, with everything around the denoiser. All plans draw the same captions from the same
noise, and one classifier judges them all (training/evaluate.py). The first command compares the four ways of taking
the bundle's default plan; the second one the ungated and the gated way under each sampler.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from tgate_engine.bundle import Bundle, write_atomically
from tgate_engine.plan import Plan, build_plan
from tgate_engine.sampler import Sampler
from tgate_engine.schedule import Schedule
from tgate_export.sampling import compile_sampler
from tgate_runtime.benchmark import cpu_model
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
    return {name: _plan(bundle, name, schedule, default.sampler) for name, schedule in schedules.items()}


def sampler_rows(bundle: Bundle, samplers: Sequence[str]) -> dict[str, Plan]:
    """The default plan's n, m, k and guidance under other samplers, each ungated and gated."""
    s = bundle.manifest.plan("default").schedule
    plans: dict[str, Plan] = {}
    for sampler in samplers:
        compiled = compile_sampler(sampler, bundle.manifest.scheduler, s.steps)
        gated = replace(s, lead_in=compiled.lead_in)
        for way, schedule in (("ungated", gated.ungated()), (f"gated m={s.gate} k={s.self_interval}", gated)):
            name = f"{sampler}, {way}"
            plans[name] = _plan(bundle, name, schedule, compiled)
    return plans


def _plan(bundle: Bundle, name: str, schedule: Schedule, sampler: Sampler) -> Plan:
    manifest = bundle.manifest
    return build_plan(
        name,
        schedule=schedule,
        sampler=sampler,
        guidance_scale=manifest.plan("default").guidance_scale,
        graphs=manifest.graphs,
        carries=manifest.carries,
    )


def draw(pipe: Pipeline, plan: str, captions: list[str], seed: int, workers: int) -> Pictures:
    """One picture of each caption, uint8 [N, H, W, 3]; picture i starts from the noise of seed ``seed + i``."""

    def one(i: int) -> Pictures:
        return np.asarray(pipe(captions[i], seed=seed + i, negative_prompt="", plan=plan).images[0])

    with ThreadPoolExecutor(workers) as pool:
        return np.stack(list(pool.map(one, range(len(captions)))))


def measure(
    bundle: Bundle,
    plans: Mapping[str, Plan],
    *,
    count: int,
    seed: int,
    workers: int,
    engine: str,
    precision: str | None,
) -> dict[str, Any]:
    """Scores by row, with the settings that they hold for."""
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
            "samplers": list(dict.fromkeys(plan.sampler.name for plan in plans.values())),
            "guidance_scale": default.guidance_scale,
            "cpu": cpu_model(),
            "workers": workers,
            "threads": 1,
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("numpy", "torch", "diffusers")},
        },
        "rows": {},
    }
    with Session.open(
        bundle.with_plans(plans), engine=engine, precision=precision, plans=list(plans), threads=1
    ) as session:
        result["settings"]["engine"] = f"{session.backend.name} {session.backend.version}"
        result["settings"]["precision"] = session.backend.options.precision
        pipe = Pipeline(session)
        for name in plans:
            pictures = draw(pipe, name, captions, seed, workers)
            result["rows"][name] = asdict(score_pictures(captions, pictures))
            print(f"{name}: {result['rows'][name]['first_object']:.1%}", flush=True)
    return result


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--samplers", metavar="A,B", help="compare these, ungated and gated, in place of the four ways")
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--engine", default="ort-cpu")
    parser.add_argument("--precision", help="of the engine; its own choice if left out")
    args = parser.parse_args()
    bundle = Bundle.open(args.bundle)
    plans = rows(bundle) if args.samplers is None else sampler_rows(bundle, args.samplers.split(","))
    result = measure(
        bundle,
        plans,
        count=args.captions,
        seed=args.seed,
        workers=args.workers,
        engine=args.engine,
        precision=args.precision,
    )
    args.output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(args.output, (json.dumps(result, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
