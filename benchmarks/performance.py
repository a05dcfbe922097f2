"""How fast gated plans are on each engine of this machine, against the same engine ungated and against its peers.

    python -m benchmarks.performance --case sd15 --work /tmp/performance --output benchmarks/results/performance.json

A case is exported on the spot. Each engine then runs three plans in turns in a process of its own (`tgate bench`):
gated, guidance stopped at m, and ungated; its memory is read after each graph has run. The peers take turns with the
fastest engine in one process: diffusers eager, diffusers with torch.compile, and the `tgate` package, all in float32.
Every part is saved as it ends, so that a run can be cut and taken up again with ``--parts``. `python -m
benchmarks.performance_page` makes docs/performance.md of what is saved. Random weights take as long as trained ones.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.memory import proportional_bytes
from tgate_engine.bundle import Bundle, write_atomically
from tgate_engine.inspect import ungated
from tgate_engine.manifest import resolve
from tgate_runtime.benchmark import cpu_model


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is exported, how often its loops are run, and whether eager PyTorch is run beside it."""

    export: tuple[str, ...]
    repeats: int
    warm_ups: int
    peers: bool


CASES: Mapping[str, Case] = {
    "mini-sdxl": Case(
        export=("--model", "mini-sdxl", "--steps", "25", "--m", "10", "--k", "5"), repeats=7, warm_ups=1, peers=False
    ),
    "mini-pixart": Case(
        export=("--model", "mini-pixart", "--steps", "25", "--m", "10", "--k", "1"), repeats=7, warm_ups=1, peers=False
    ),
    "sd15": Case(
        export=(
            *("--model", "sd15", "--weights", "random", "--components", "denoiser", "--no-verify"),
            *("--height", "256", "--width", "256", "--steps", "25", "--m", "10", "--k", "1"),
        ),
        repeats=3,
        warm_ups=0,
        peers=True,
    ),
    "sdxl": Case(
        export=(
            *("--model", "sdxl", "--weights", "random", "--components", "denoiser", "--no-verify"),
            *("--height", "256", "--width", "256", "--steps", "25", "--m", "10", "--k", "5"),
        ),
        repeats=1,
        warm_ups=0,
        peers=False,
    ),
}
ENGINES: Mapping[str, tuple[str, ...]] = {
    "ort-cpu fast": ("--engine", "ort-cpu", "--memory", "fast"),
    "ort-cpu shared": ("--engine", "ort-cpu", "--memory", "shared"),
    "openvino f32": ("--engine", "openvino", "--precision", "f32"),
    "openvino bf16": ("--engine", "openvino", "--precision", "bf16"),
    "aoti f32": ("--engine", "aoti", "--precision", "f32"),
    "aoti bf16": ("--engine", "aoti", "--precision", "bf16"),
}


def main() -> None:
    """Export, measure, save."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--work", type=Path, required=True, help="where the bundle goes; one that is there is used")
    parser.add_argument("--output", type=Path, help="JSON to add to")
    parser.add_argument("--parts", default=",".join([*ENGINES, "peers"]), help="engines, and peers")
    parser.add_argument("--turns", type=int, default=2, help="of the peers")
    parser.add_argument("--role", choices=("memory", "peers"), help=argparse.SUPPRESS)
    parser.add_argument("--engine", choices=ENGINES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    bundle = args.work / args.case
    if args.role == "memory":
        print(json.dumps(memory(bundle, args.engine)))
        return
    if args.role == "peers":
        print(json.dumps(peers(bundle, args.turns)))
        return
    case = CASES[args.case]
    if not (bundle / "manifest.json").exists():
        _run("tgate_engine.cli", "export_main", *case.export, "--output", str(bundle), "--quiet")
    found = json.loads(args.output.read_text()) if args.output.exists() else {}
    parts = found.setdefault(args.case, {})
    parts["export"] = " ".join(case.export)
    for part in args.parts.split(","):
        if part in ENGINES:
            timing = ("--repeats", str(case.repeats), "--warm-ups", str(case.warm_ups))
            data = _run("tgate_engine.cli", "main", "bench", str(bundle), *ENGINES[part], *timing, "--json", "--quiet")
            data["memory"] = _role(args, "memory", "--engine", part)
        elif case.peers:
            data = _role(args, "peers", "--turns", str(args.turns))
        else:
            continue
        parts[part] = {**data, "taken_on": {"cpu": cpu_model(), "cores": os.cpu_count(), "load": os.getloadavg()[0]}}
        write_atomically(args.output, (json.dumps(found, indent=1) + "\n").encode())
        print(f"{args.case}, {part}: saved", flush=True)


def memory(bundle_path: Path, engine_name: str) -> dict[str, Any]:
    """The proportional set size of this process, in bytes, before a graph is open and after each has run once."""
    from tgate_runtime.backends import backend

    bundle = Bundle.open(bundle_path, check_digests=False)
    options = dict(zip(ENGINES[engine_name][::2], ENGINES[engine_name][1::2], strict=True))
    engine = backend(options["--engine"], precision=options.get("--precision"), memory=options.get("--memory"))
    held = {"before": proportional_bytes()}
    kept = []
    for name in ("full", "reuse_self", "reuse_cross"):
        executable = engine.load(bundle, [name])[name]
        spec = bundle.manifest.graphs[name]
        inputs = {t.name: engine.allocate(resolve(t.shape, 1), t.dtype) for t in spec.inputs}
        outputs = {t.name: engine.allocate(resolve(t.shape, 1), t.dtype) for t in spec.outputs}
        call = executable.bind(inputs, outputs)
        call()
        kept.append((executable, call))
        held[name] = proportional_bytes()
    return held


def peers(bundle_path: Path, turns: int) -> dict[str, Any]:
    """Whole loops of every peer, in turns; seconds of each turn, and the medians."""
    import torch
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
    from tgate import TgateSDLoader

    from tgate_export.job import ExportSettings, prepare
    from tgate_export.modules import real_module
    from tgate_runtime.binding import Binding
    from tgate_runtime.runner import run
    from tgate_runtime.session import Session

    bundle = Bundle.open(bundle_path, check_digests=False)
    manifest, plan = bundle.manifest, bundle.manifest.plan("default")
    rng = np.random.default_rng(0)
    job = prepare(
        ExportSettings(
            model=manifest.model,
            weights="random",
            components=("denoiser",),
            height=manifest.height,
            width=manifest.width,
        )
    )
    rows = {
        name: rng.standard_normal(resolve(spec.shape, 1)).astype(np.float32)
        for graph in manifest.graphs.values()
        for spec in graph.inputs
        if (name := spec.name).endswith((".negative", ".positive"))
    }
    start = rng.standard_normal((1, *manifest.latents)).astype(np.float32)
    plans = {"gated": plan, "ungated": ungated(plan, manifest)}
    loops: dict[str, Callable[[], object]] = {}
    session = Session.open(bundle, engine="openvino", precision="bf16", plans=[*plans.values()])
    for name, chosen in plans.items():
        binding = Binding(session, chosen, 1)
        loops[f"openvino bf16 {name}"] = lambda b=binding: list(  # type: ignore[misc]
            run(b, latents=start, conditioning=rows, guidance_scale=plan.guidance_scale)
        )

    def pipeline(unet: Any) -> Any:
        pipe = StableDiffusionPipeline(
            vae=None,
            text_encoder=None,
            tokenizer=None,
            unet=unet,
            scheduler=DPMSolverMultistepScheduler(),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    embeds = {name: torch.from_numpy(row) for name, row in rows.items() if name.startswith("prompt_embeds")}
    request = {
        "prompt_embeds": embeds["prompt_embeds.positive"],
        "negative_prompt_embeds": embeds["prompt_embeds.negative"],
        "latents": torch.from_numpy(start),
        "num_inference_steps": len(plan.steps),
        "guidance_scale": plan.guidance_scale,
        "height": manifest.height,
        "width": manifest.width,
        "output_type": "latent",
    }
    unet = real_module(job.family, job.checkpoint, job.family.denoiser)
    plain = pipeline(unet)
    loops["diffusers eager f32"] = lambda: plain(**request)
    compiled = pipeline(torch.compile(unet))
    loops["torch.compile f32"] = lambda: compiled(**request)
    patched = real_module(job.family, job.checkpoint, job.family.denoiser)  # the package changes its modules
    theirs = TgateSDLoader(pipeline(patched), gate_step=plan.schedule.gate, sp_interval=1, fi_interval=1, warm_up=2)
    loops["tgate eager f32"] = lambda: theirs.tgate(**request)
    taken: dict[str, list[float]] = {name: [] for name in loops}
    begin = time.perf_counter()
    compiled(**{**request, "num_inference_steps": 1})
    compile_s = time.perf_counter() - begin
    for _ in range(turns):
        for name, loop in loops.items():
            begin = time.perf_counter()
            loop()
            taken[name].append(time.perf_counter() - begin)
    return {
        "loop_s": taken,
        "median_s": {name: statistics.median(values) for name, values in taken.items()},
        "compile_s": compile_s,
        "settings": {
            **{"n": len(plan.steps), "m": plan.schedule.gate, "k": plan.schedule.self_interval, "turns": turns},
            **{"torch": torch.__version__, "threads": torch.get_num_threads(), "height": manifest.height},
            "openvino": session.backend.version,
        },
    }


def _role(args: argparse.Namespace, role: str, *more: str) -> Any:
    """One role in a process of its own: the last line that it prints."""
    command = [sys.executable, "-m", "benchmarks.performance", "--case", args.case, "--work", str(args.work)]
    done = subprocess.run([*command, "--role", role, *more], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _run(module: str, function: str, *arguments: str) -> Any:
    """A command line of this project in a process of its own; its JSON, if it prints any."""
    code = f"import sys; from {module} import {function}; sys.exit({function}(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout) if "--json" in arguments else None


if __name__ == "__main__":
    main()
