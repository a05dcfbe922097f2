"""Architectures of real size, with random weights, on the engines for CPUs.

    python -m benchmarks.full_size --work /tmp/full-size --output benchmarks/results/full_size.json

SD 1.5, PixArt-alpha and Sana 1.6B walk a short plan at 512 x 512 in float32, Wan 2.1 1.3B one of a video of 832 x 480
and 17 frames, and eager PyTorch walks the same one with the same weights: the latents are compared after every step.
SDXL takes one step of each graph at 1024 x 1024 from float16 weights, with the graphs open together or one after
another. Every part runs in a process of its own, which is stopped before the machine runs out of memory. Wants 7 GB of
disk and some 20 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.frugality import GIB, machine, product, watched
from benchmarks.memory import proportional_bytes
from tgate_engine.atomic import write_atomically
from tgate_engine.bundle import Bundle
from tgate_engine.footprint import carry_bytes
from tgate_engine.plan import Plan
from tgate_engine.plan_build import build_plan
from tgate_engine.step import LATENTS, STEP, step_row
from tgate_export.methods import find_method
from tgate_export.methods.base import FULL, Settings
from tgate_export.methods.tgate import REUSE_CROSS, REUSE_SELF
from tgate_runtime.engines.protocol import Options

SEED = 2404
FOUR = Settings(steps=4, gate=3, self_interval=2, warm_up=0)
"""full, reuse_self, full (the gate step), reuse_cross: the shortest that runs all three graphs."""
TWO = Settings(steps=2, gate=1, self_interval=1, warm_up=0)
"""full, reuse_cross: the same for networks of which a step takes minutes."""

GRAPHS = (FULL, REUSE_SELF, REUSE_CROSS)
MOST_ANONYMOUS_BYTES = 20 * GIB


@dataclass(frozen=True, kw_only=True)
class Case:
    """One model, and what ``tgate-export`` is told. ``frames``: of a video. ``compared``: with eager PyTorch; otherwise
    one step a graph. ``engine``: what is compared, and the options that it is opened with."""

    width: int
    height: int
    dtype: str
    compared: bool
    frames: int | None = None
    schedule: Settings = FOUR
    sampler: str = "dpmpp_2m"
    weights: str = "random"
    engine: tuple[str, Options] = ("ort-cpu", {})

    def options(self, model: str) -> list[str]:
        """The options of its export."""
        own = self.schedule
        method = ["--m", str(own.gate), "--k", str(own.self_interval), "--steps", str(own.steps), "--warm-up", "0"]
        size = ["--height", str(self.height), "--width", str(self.width)]
        size += [] if self.frames is None else ["--frames", str(self.frames)]
        what = ["--weights", self.weights, "--components", "denoiser", "--dtype", self.dtype]
        return ["--model", model, *method, *size, *what]


CASES: Mapping[str, Case] = {
    "sd15": Case(width=512, height=512, dtype="fp32", compared=True),
    "pixart-alpha": Case(width=512, height=512, dtype="fp32", compared=True),
    "sdxl": Case(width=1024, height=1024, dtype="fp16", compared=False),
    "sana-1.6b-512": Case(width=512, height=512, dtype="fp32", compared=True, schedule=TWO),
    "wan21-t2v-1.3b": Case(
        width=832,
        height=480,
        frames=17,
        dtype="fp32",
        compared=True,
        schedule=TWO,
        sampler="unipc",
        # 7800 by 7800 weights of attention for 24 heads are 6 GB; the network's own are not to be there twice beside.
        engine=("ort-cpu", {"memory": "shared"}),
    ),
}

WAYS: Mapping[str, str] = {
    "shared": "all graphs open together; --memory shared",
    "in-turn": "one graph open at a time; --memory fast",
    "together": "all graphs open together; --memory fast",
}
"""How SDXL's graphs are opened."""


def main() -> None:
    """Run the parts, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, help="where the bundles go until they are measured")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--models", default=",".join(CASES), help="some of them, with commas between")
    parser.add_argument("--ways", default=",".join(WAYS), help="likewise, of opening SDXL's graphs")
    parser.add_argument("--role", choices=ROLES, help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role is not None:
        ROLES[args.role](args.models, args.work, args.result, args.ways)
        return
    if args.output is None:
        parser.error("--output is wanted")
    args.work.mkdir(parents=True, exist_ok=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = json.loads(args.output.read_text()) if args.output.exists() else {"models": {}}
    for model in args.models.split(","):
        settings = {**machine(), "seed": SEED}
        parts = found["models"][model] = {"settings": {**settings, **asdict(CASES[model])}}

        def keep(name: str, part: dict[str, Any], parts: dict[str, Any] = parts, model: str = model) -> None:
            parts[name] = part
            print(f"{model}, {name}: {json.dumps(part)}", flush=True)
            write_atomically(args.output, (json.dumps(found, indent=1) + "\n").encode())

        measure(model, args.work, args.ways.split(","), keep)


def measure(model: str, work: Path, ways: list[str], keep: Callable[[str, dict[str, Any]], None]) -> None:
    """Every part of one model; ``keep`` is given each as it ends. The bundle is removed."""
    bundle = work / model
    shutil.rmtree(bundle, ignore_errors=True)
    options = CASES[model].options(model)
    try:
        log = work / f"{model}-export.log"
        usage = watched(product("export_main", *options, "--output", str(bundle), "--quiet"), log)
        keep("export", {"command": f"tgate-export {' '.join(options)}", **_told(asdict(usage), log)})
        if usage.status:
            return
        _part(model, work, "request")
        if CASES[model].compared:
            keep("eager", _part(model, work, "eager"))
            keep("engine", _part(model, work, "engine"))
        else:
            for way in ways:
                keep(way, {"setting": WAYS[way], **_part(model, work, "graphs", way)})
    finally:
        shutil.rmtree(bundle, ignore_errors=True)
        for file in work.glob(f"{model}-*.npz"):
            file.unlink()


def _part(model: str, work: Path, role: str, way: str = "") -> dict[str, Any]:
    """One role in a process of its own: what it found, and what it took."""
    result, log = work / f"{model}-{role}{way}.json", work / f"{model}-{role}{way}.log"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-m", "benchmarks.full_size", "--work", str(work), "--models", model]
    command += ["--role", role, "--ways", way, "--result", str(result)]
    usage = watched(command, log, most_anonymous_bytes=MOST_ANONYMOUS_BYTES)
    found = json.loads(result.read_text()) if result.exists() else {}
    return {**found, **_told(asdict(usage), log)}


def _told(usage: dict[str, Any], log: Path) -> dict[str, Any]:
    """``usage``, with the end of the log where the process failed."""
    return {**usage, "error": log.read_text("utf-8", "replace").strip()[-500:]} if usage["status"] else usage


# --- roles: what runs in the child processes ----------------------------------------------------


def request(model: str, work: Path, result: Path, way: str) -> None:
    """Draws the request that eager PyTorch and the engine are both given, and makes the plan."""
    import torch

    from tgate_export.goldens import both_halves
    from tgate_export.sampling import compile_sampler

    job, manifest = _job(model), Bundle.open(work / model, check_digests=False).manifest
    case = CASES[model]
    generator = torch.Generator().manual_seed(SEED)
    positive, negative = (
        {
            c.conditioning.name: torch.ones(1, *c.shape) if c.mask else torch.randn((1, *c.shape), generator=generator)
            for c in job.conditioning
        }
        for _ in range(2)
    )
    rows = both_halves(job, positive, negative)
    noise = torch.randn((1, *job.latents), generator=generator)
    plan = build_plan(
        "short",
        find_method("tgate").program(case.schedule),
        sampler=compile_sampler(case.sampler, manifest.scheduler, case.schedule.steps),
        guidance_scale=job.guidance_scale,
        graphs=manifest.shapes[0].graphs,
        carries=manifest.carries,
        settings=find_method("tgate").facts(case.schedule),
    )
    np.savez(work / f"{model}-request.npz", noise=noise.numpy(), **{name: row.numpy() for name, row in rows.items()})
    (work / f"{model}-plan.json").write_text(json.dumps(plan.to_json()))


def eager(model: str, work: Path, result: Path, way: str) -> None:
    """PyTorch's latents after every step, in float32. The seconds are the network's; ``cpu_s`` is of all cores."""
    import torch

    from tgate_export.goldens import walk
    from tgate_export.modules import real_module

    job = _job(model)
    plan, noise, rows = _request(model, work)
    begin = time.perf_counter()
    denoiser = real_module(job.family, job.checkpoint, job.family.denoiser)
    load_s = time.perf_counter() - begin
    marks: list[tuple[float, float]] = []
    denoiser.register_forward_pre_hook(lambda *_: marks.append((time.perf_counter(), time.process_time())))
    denoiser.register_forward_hook(lambda *_: marks.append((time.perf_counter(), time.process_time())))
    latents = walk(
        job,
        plan,
        denoiser,
        {variant.name: variant for variant in job.variants},
        torch.from_numpy(noise),
        {name: torch.from_numpy(row) for name, row in rows.items()},
    )
    np.savez(work / f"{model}-eager.npz", **{str(i): x.numpy() for i, x in enumerate(latents) if i})
    taken = zip(marks[::2], marks[1::2], strict=True)
    steps = [{"s": round(end[0] - start[0], 3), "cpu_s": round(end[1] - start[1], 3)} for start, end in taken]
    _write(result, {"threads": torch.get_num_threads(), "load_s": round(load_s, 2), "steps": steps})


def engine(model: str, work: Path, result: Path, way: str) -> None:
    """The engine's latents after every step, and how far they are from PyTorch's."""
    from tgate_runtime.runner import run
    from tgate_runtime.session import Session
    from tgate_runtime.state import State
    from tgate_runtime.verify import relative_error

    plan, noise, rows = _request(model, work)
    begin = time.perf_counter()
    steps: list[dict[str, Any]] = []
    name, options = CASES[model].engine
    with Session.open(work / model, engine=name, plans=[plan], check_digests=False, **options) as session:
        state = State(session, plan)
        load_s = time.perf_counter() - begin
        with np.load(work / f"{model}-eager.npz") as wanted:
            begin_cpu = time.process_time()
            for done in run(state, latents=noise, conditioning=rows, guidance_scale=plan.guidance_scale):
                cpu_s, latents = time.process_time() - begin_cpu, state.latents()
                steps.append(
                    {
                        "graph": done.step.graph,
                        "s": round(done.elapsed_ms / 1e3, 3),
                        "cpu_s": round(cpu_s, 3),
                        "relative_error": relative_error(latents, wanted[str(done.index + 1)]),
                        "rms": round(float(np.sqrt(np.square(latents, dtype=np.float64).mean())), 4),
                    }
                )
                begin_cpu = time.process_time()
        settings = {
            "engine": f"{session.engine.name} {session.engine.version}",
            "threads": session.engine.options.threads,
        }
    _write(result, {**settings, "load_s": round(load_s, 2), "steps": steps})


def graphs(model: str, work: Path, result: Path, way: str) -> None:
    """One step of each graph, the later ones on what the first one stored. Writes what it has after each."""
    from tgate_engine.dtypes import decode, encode
    from tgate_runtime.engines import open_engine
    from tgate_runtime.engines.protocol import Buffer

    bundle = Bundle.open(work / model, check_digests=False)
    plan, noise, rows = _request(model, work)
    values_of = {**rows, LATENTS: noise * np.float32(plan.sampler.initial_scale)}
    values_of[STEP] = step_row(plan.steps[0].call, plan.guidance_scale)[None]
    loader = open_engine("ort-cpu", memory="shared" if way == "shared" else "fast")
    buffers: dict[str, Buffer] = {}
    found: dict[str, Any] = {
        "engine": f"{loader.name} {loader.version}",
        "threads": loader.options.threads,
        "graphs": {},
    }
    for group in [[name] for name in GRAPHS] if way == "in-turn" else [GRAPHS]:
        opened: dict[str, Any] = {}
        for name in group:
            begin = time.perf_counter()
            spec = bundle.manifest.shapes[0].graphs[name]
            opened[name] = loader.load(bundle, [spec])[spec.file]
            found["graphs"][name] = {"load_s": round(time.perf_counter() - begin, 2), "loaded": _resident()}
            _write(result, found)
        for name, executable in opened.items():
            spec = bundle.manifest.shapes[0].graphs[name]
            for tensor in (*spec.inputs, *spec.outputs):
                if tensor.name not in buffers:
                    buffers[tensor.name] = loader.allocate(tensor.resolve(1), tensor.dtype)
                    if tensor.name in values_of:
                        buffers[tensor.name].write(encode(values_of[tensor.name], tensor.dtype))
            outputs = {t.name: buffers[t.name] for t in spec.outputs}
            call = executable.bind({t.name: buffers[t.name] for t in spec.inputs}, outputs)
            begin, begin_cpu = time.perf_counter(), time.process_time()
            call()
            step_s, cpu_s = time.perf_counter() - begin, time.process_time() - begin_cpu
            values = [decode(buffer.read(), buffer.dtype) for buffer in outputs.values()]
            found["graphs"][name] |= {
                "step_s": round(step_s, 2),
                "step_cpu_s": round(cpu_s, 2),
                "ran": _resident(),
                "finite": all(bool(np.isfinite(value).all()) for value in values),
                "output_rms": round(float(np.sqrt(np.square(values[1], dtype=np.float64).mean())), 4),
            }
            _write(result, found)
            del call
        del opened, executable
    carried = carry_bytes(plan, bundle.manifest.shapes[0].graphs, batch=1)
    _write(result, {**found, "carries_bytes": carried})


ROLES: Mapping[str, Callable[[str, Path, Path, str], None]] = {
    role.__name__: role for role in (request, eager, engine, graphs)
}


def _job(model: str) -> Any:
    """The job that the model's bundle was exported with."""
    from tgate_export.job import ExportSettings, prepare

    case = CASES[model]
    return prepare(
        ExportSettings(
            model=model,
            m=case.schedule.gate,
            k=case.schedule.self_interval,
            steps=case.schedule.steps,
            warm_up=case.schedule.warm_up,
            height=case.height,
            width=case.width,
            frames=case.frames,
            weights=case.weights,
            components=("denoiser",),
            dtype=case.dtype,
        )
    )


def _request(model: str, work: Path) -> tuple[Plan, NDArray[np.float32], dict[str, NDArray[np.float32]]]:
    """The plan, the noise, and the conditioning by name, as the role ``request`` left them."""
    with np.load(work / f"{model}-request.npz") as file:
        rows = {name: file[name] for name in file.files}
    return Plan.from_json(json.loads((work / f"{model}-plan.json").read_text())), rows.pop("noise"), rows


def _resident() -> dict[str, int]:
    """What this process holds now, in bytes: its own pages, those mapped from files (a page mapped twice counts
    twice), and both with every page counted once."""
    lines = (line.split() for line in Path("/proc/self/status").read_text("ascii", "replace").splitlines())
    status = {line[0].rstrip(":"): int(line[1]) * 1024 for line in lines if len(line) == 3 and line[2] == "kB"}
    once = proportional_bytes()
    return {"anonymous_bytes": status["RssAnon"], "file_bytes": status["RssFile"], "once_bytes": once}


def _write(path: Path, found: Mapping[str, Any]) -> None:
    write_atomically(path, json.dumps(found).encode())


if __name__ == "__main__":
    main()
