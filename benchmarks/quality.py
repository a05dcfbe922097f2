"""What reuse costs in pictures: accuracy on captions that training never saw, drawn by the engine.

    python -m benchmarks.quality BUNDLE [BUNDLE ...] --output benchmarks/results/quality-mini-sdxl.json
    python -m benchmarks.quality BUNDLE --samplers euler,ddim,dpmpp_2m --captions 250 \\
        --output benchmarks/results/schedulers.json
    python -m benchmarks.quality BUNDLE --gates 3,5,10,15,20 --captions 250 \\
        --output benchmarks/results/gates-mini-pixart.json
    python -m benchmarks.quality BUNDLE --forecasts 2,3 --captions 250 \\
        --output benchmarks/results/forecast-mini-pixart.json
    python -m benchmarks.quality BUNDLE [BUNDLE ...] --nearness --captions 32 \\
        --output benchmarks/results/tome-mini-sdxl.json

Bundles are of one embedded model, with everything around the denoiser, each exported for another method. All plans draw
the same captions from the same noise, and one classifier judges them all (training/evaluate.py). The first command
compares the first bundle's baselines with every bundle's default plan, and where that reuses self-attention before the
gate (k above 1) with the same for k = 1; the second one the ungated and the gated way under each sampler, the third one
gates at several steps, nothing else reused; the fourth one forecasts, gated and ungated, beside as many network calls
spent on fewer steps, and how near the pictures are to the ungated ones. The last one is the first, with that nearness
too. What a file of the same settings holds already is not drawn again.
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

from tgate_engine.atomic import write_atomically
from tgate_engine.bundle import Bundle
from tgate_engine.plan import Plan
from tgate_export.methods import find_method
from tgate_export.methods.base import Settings, settings_of
from tgate_export.methods.late import Late
from tgate_export.plans import make_plans, sampler_of
from tgate_runtime.benchmark import cpu_model
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.tuning.quality import psnr
from training.evaluate import Pictures, evaluation_captions, score_pictures


def rows(bundle: Bundle, *, baselines: bool) -> dict[str, Plan]:
    """The default plan, with k = 1 as well where it has another, and its baselines, by what they are."""
    manifest = bundle.manifest
    default = manifest.plan("default")
    plans = [manifest.plan(name) for name in default.baselines] if baselines else []
    if int(default.settings.get("k") or 1) > 1:
        plans.append(_variation(bundle, default.sampler.name, self_interval=1))
    return {_label(plan): plan for plan in (*plans, default)}


def sampler_rows(bundle: Bundle, samplers: Sequence[str]) -> dict[str, Plan]:
    """The default plan's settings and guidance under other samplers, each ungated and gated."""
    plans: dict[str, Plan] = {}
    for sampler in samplers:
        gated = _variation(bundle, sampler)
        ungated = _plans(bundle, sampler, _settings(bundle))["other.ungated"]
        plans |= {f"{sampler}, {_label(plan)}": plan for plan in (ungated, gated)}
    return plans


def gate_rows(bundle: Bundle, gates: Sequence[int]) -> dict[str, Plan]:
    """The default plan's method with its gate at each of those steps, k = 1, and the ungated way."""
    sampler = bundle.manifest.plan("default").sampler.name
    plans = [_variation(bundle, sampler, gate=gate, self_interval=1) for gate in gates]
    return {_label(plan): plan for plan in (bundle.manifest.plan("ungated"), *plans)}


def forecast_rows(bundle: Bundle, intervals: Sequence[int]) -> dict[str, Plan]:
    """The ungated and the default plan; both with every r-th call after the gate, and both with so many fewer steps
    that they make as many calls, the gate moved in proportion."""
    sampler, own = bundle.manifest.plan("default").sampler.name, _settings(bundle)
    plans = [bundle.manifest.plan("ungated"), bundle.manifest.plan("default")]
    for interval in intervals:
        told = replace(own, forecast_interval=interval)
        calls = own.steps - len(told.left_out())
        gate = max(1, round(own.gate * calls / own.steps))
        fewer = replace(own, steps=calls, gate=gate, forecast_interval=1)
        plans += [_plans(bundle, sampler, told, method="forecast")["other"], _plans(bundle, sampler, told)["other"]]
        plans += [each for name, each in _plans(bundle, sampler, fewer).items() if name in ("other", "other.ungated")]
    return {f"{_label(plan)}, {len(plan.steps)} calls": plan for plan in plans}


def _settings(bundle: Bundle) -> Settings:
    return settings_of(bundle.manifest.plan("default").settings)


def _plans(bundle: Bundle, sampler: str, settings: Settings, *, method: str | None = None) -> dict[str, Plan]:
    manifest = bundle.manifest
    default = manifest.plan("default")
    return make_plans(
        "other",
        find_method(method or str(default.settings["method"])),
        settings,
        sampler=sampler_of(bundle, sampler, settings.steps),
        guidance_scale=default.guidance_scale,
        guided=manifest.guided,
        graphs=manifest.shapes[0].graphs,
        carries=manifest.carries,
        late=Late.of(default.settings, default.guidance_scale),
    )


def _variation(bundle: Bundle, sampler: str, **changes: int) -> Plan:
    return _plans(bundle, sampler, replace(_settings(bundle), **changes))["other"]


def _label(plan: Plan) -> str:
    """``tgate m=10 k=5``: the method and what it was told."""
    facts = plan.settings
    names = ("m", "k", "c", "r", "ratio")
    numbers = [f"{name}={facts[name]}" for name in names if name in facts and (name, facts[name]) != ("k", 1)]
    return " ".join([str(facts["method"]), *numbers])


def draw(pipe: Pipeline, plan: Plan, captions: list[str], seed: int, workers: int) -> Pictures:
    """One picture of each caption, uint8 [N, H, W, 3]; picture i starts from the noise of seed ``seed + i``."""

    def one(i: int) -> Pictures:
        return np.asarray(pipe(captions[i], seed=seed + i, negative_prompt="", plan=plan).images[0])

    with ThreadPoolExecutor(workers) as pool:
        return np.stack(list(pool.map(one, range(len(captions)))))


def conditions(pipe: Pipeline, plans: Mapping[str, Plan], count: int, seed: int, workers: int) -> dict[str, Any]:
    """What a measurement holds for."""
    session = pipe.session
    manifest = session.manifest
    default = manifest.plan("default")
    return {
        "model": manifest.model,
        "weights_sha256": manifest.files[manifest.weights].sha256,
        "dtype": manifest.dtype,
        "captions": count,
        "seed": seed,
        "steps": default.sampler.steps,
        "samplers": list(dict.fromkeys(plan.sampler.name for plan in plans.values())),
        "guidance_scale": default.guidance_scale,
        "cpu": cpu_model(),
        "workers": workers,
        "threads": 1,
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("numpy", "torch", "diffusers")},
        "engine": f"{session.engine.name} {session.engine.version}",
        "precision": session.engine.options.precision,
    }


def measure(
    bundle: Bundle,
    plans: Mapping[str, Plan],
    output: Path,
    *,
    count: int,
    seed: int,
    workers: int,
    engine: str,
    precision: str | None,
    nearness: bool = False,
    first: Pictures | None = None,
) -> Pictures | None:
    """Add the scores and all multiply-accumulates of those plans to ``output``, row by row, with the settings that they
    hold for.

    ``nearness``: how near their pictures are to ``first``, too (mean PSNR, dB), which are the first plan's if left out;
    they are given back.
    """
    captions, graphs = evaluation_captions(count), bundle.manifest.shapes[0].graphs
    with Pipeline.open(bundle, engine=engine, precision=precision, plans=[*plans.values()], threads=1) as pipe:
        settings = conditions(pipe, plans, count, seed, workers)
        before = json.loads(output.read_text()) if output.is_file() else {}
        result = before if before.get("settings") == settings else {"settings": settings, "rows": {}}
        drawn: dict[str, Pictures] = {}
        if nearness and first is None and plans.keys() - result["rows"].keys():
            name, plan = next(iter(plans.items()))
            first = drawn[name] = draw(pipe, plan, captions, seed, workers)
        for name, plan in plans.items():
            if name not in result["rows"]:
                pictures = drawn[name] if name in drawn else draw(pipe, plan, captions, seed, workers)
                row = asdict(score_pictures(captions, pictures)) | {"macs": plan.macs(graphs)[1]}
                if first is not None:
                    row["psnr"] = float(np.mean(list(map(psnr, pictures, first))))
                result["rows"][name] = row
                write_atomically(output, (json.dumps(result, indent=1) + "\n").encode())
            print(f"{name}: {result['rows'][name]['first_object']:.1%}", flush=True)
    return first


def main() -> None:
    """Measure and save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, nargs="+")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--samplers", metavar="A,B", help="compare these, ungated and gated, in place of methods")
    parser.add_argument("--gates", metavar="M,M", help="compare gates at these steps in place of methods")
    parser.add_argument("--forecasts", metavar="R,R", help="compare forecasts at these intervals in place of methods")
    parser.add_argument("--nearness", action="store_true", help="say how near pictures are to the first plan's, too")
    parser.add_argument("--captions", type=int, default=500)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--engine", default="ort-cpu")
    parser.add_argument("--precision", help="of the engine; its own choice if left out")
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    first: Pictures | None = None
    for place, path in enumerate(args.bundle):
        bundle = Bundle.open(path)
        if args.gates is not None:
            own = gate_rows(bundle, [int(gate) for gate in args.gates.split(",")])
        elif args.forecasts is not None:
            own = forecast_rows(bundle, [int(interval) for interval in args.forecasts.split(",")])
        elif args.samplers is not None:
            own = sampler_rows(bundle, args.samplers.split(","))
        else:
            own = rows(bundle, baselines=place == 0)
        first = measure(
            bundle,
            own,
            args.output,
            count=args.captions,
            seed=args.seed,
            workers=args.workers,
            engine=args.engine,
            precision=args.precision,
            nearness=args.nearness or args.forecasts is not None,
            first=first,
        )


if __name__ == "__main__":
    main()
