"""The measurements of ``benchmarks.gpu.run``: each function is a section, run in a process of its own."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.correctness import check, reference
from benchmarks.gpu.kernels import kernels
from benchmarks.gpu.setting import CASES, Setting, engine_of, held_bytes, nvidia_smi, session_of
from benchmarks.loops import Clock, plans_of, request, take
from benchmarks.peers import compare
from tgate_runtime.benchmark import cpu_model
from tgate_runtime.session import Session
from tgate_runtime.state import State

PACKAGES = (
    *("torch", "triton", "diffusers", "transformers", "tgate", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino"),
    *("tensorrt", "tensorrt-rtx-cu13", "cuda-bindings", "numpy"),
)


def probe(setting: Setting) -> dict[str, Any]:
    """Whether the engine opens here."""
    return {"version": engine_of(setting.engine, setting.device).version, "says": "ready"}


def machine(setting: Setting) -> dict[str, Any]:
    """What every section depends on."""
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    settings: dict[str, Any] = {"cpu": cpu_model(), "cores": len(os.sched_getaffinity(0)), "packages": versions}
    settings |= {"python": platform.python_version(), "threads": os.environ.get("OMP_NUM_THREADS", "the engines' own")}
    if setting.device == "cuda":
        gpu = nvidia_smi("name,driver_version,memory.total").split(", ")
        settings |= dict(zip(("gpu", "driver", "gpu_memory_mib"), gpu, strict=True))
    return settings


def bundle(setting: Setting) -> dict[str, Any]:
    """The bundle, exported if it was not brought, and what it was made with."""
    path, begin = Path(setting.bundles) / setting.model, time.perf_counter()
    brought = (path / "manifest.json").exists()
    if not brought:
        from tgate_cli.display import Lines
        from tgate_export.build import export

        export(CASES[setting.model].settings(setting.model, output=path), Lines())
    manifest = setting.open().manifest
    plan, shape = manifest.plan("default"), manifest.shapes[0]
    return {
        **{"brought": brought, "export_s": None if brought else time.perf_counter() - begin, "dtype": manifest.dtype},
        **{"size": shape.size, "sampler": plan.sampler.name, "guidance_scale": plan.guidance_scale, "batch": 1},
        "plan_settings": dict(plan.settings),
        "macs": {name: chosen.macs(shape.graphs)[1] for name, chosen in plans_of(manifest).items()},
        "tools": dict(manifest.tools),
    }


def opening(setting: Setting) -> dict[str, Any]:
    """From a new process to a bound request. A first opening compiles where the engine does so ahead of time."""
    cached, begin = _cached(), time.perf_counter()
    engine = engine_of(setting.engine, setting.device)
    engine_s, opened = time.perf_counter() - begin, setting.open()
    plans = plans_of(opened.manifest)
    loaded = Session.open(opened, engine=engine, plans=[*plans.values()])
    open_s = time.perf_counter() - begin - engine_s
    states = [State(loaded, plan) for plan in plans.values()]
    bind_s = time.perf_counter() - begin - engine_s - open_s
    start, rows = request(opened.manifest, setting.seed)
    take(states[0], start, rows, Clock("cpu"))
    first_loop_s = time.perf_counter() - begin - engine_s - open_s - bind_s
    times = {"engine_s": engine_s, "open_s": open_s, "bind_s": bind_s, "first_gated_loop_s": first_loop_s}
    return {**times, "cache_entries": {"before": cached, "after": _cached()}}


def loops(setting: Setting) -> dict[str, Any]:
    """Whole loops of the three plans, in turns; all times are medians in milliseconds."""
    opened, clock = setting.open(), Clock(setting.device)
    manifest = opened.manifest
    plans = plans_of(manifest)
    start, rows = request(manifest, setting.seed)
    whole: dict[str, list[float]] = {name: [] for name in plans}
    wall: dict[str, list[float]] = {name: [] for name in plans}
    steps: dict[str, list[float]] = {name: [] for name in plans}
    graphs: dict[str, list[float]] = {}
    with session_of(setting, opened, plans) as session:
        states = {name: State(session, plan) for name, plan in plans.items()}
        for turn in range(setting.warm_ups + setting.repeats):
            for name, state in states.items():
                begin = time.perf_counter()
                loop_ms, taken = take(state, start, rows, clock)
                if turn >= setting.warm_ups:
                    wall[name].append((time.perf_counter() - begin) * 1e3)
                    whole[name].append(loop_ms)
                    steps[name] += [ms for _, ms in taken]
                    for graph, ms in taken:
                        graphs.setdefault(graph, []).append(ms)
        finite = all(bool(np.isfinite(state.latents()).all()) for state in states.values())
        options = session.engine.options
    medians = {name: statistics.median(ms) for name, ms in graphs.items()}
    return {
        "clock": clock.name,
        "graphs": {
            name: {"ms": ms, "tflop_per_s": 2 * manifest.shapes[0].graphs[name].macs.all / ms / 1e9}
            for name, ms in medians.items()
        },
        "plans": {
            name: {
                "ms": statistics.median(whole[name]),
                "wall_ms": statistics.median(wall[name]),
                "step_ms": {"p50": statistics.median(steps[name]), "p99": float(np.percentile(steps[name], 99))},
                "runs_ms": whole[name],
            }
            for name in plans
        },
        "options": {"precision": options.precision, "memory": options.memory, "threads": options.threads},
        "finite": finite,
    }


def memory(setting: Setting) -> dict[str, Any]:
    """Bytes held with the graph ``full`` (``setting.graphs`` is "one") or all of the gated plan's loaded and run once:
    of the GPU, all that it holds; on the CPU, the process's proportional set size."""
    before = held_bytes(setting.device)
    engine, opened = engine_of(setting.engine, setting.device), setting.open()
    engine.allocate((1,), "float32")  # or the GPU's context, made with the first buffer, would count as weights
    empty = held_bytes(setting.device)
    names = opened.manifest.plan("default").graphs()
    names = names[:1] if setting.graphs == "one" else names
    buffers: dict[str, Any] = {}  # tensors of one name share one, as they do in a request
    kept = []
    specs = [opened.manifest.shapes[0].graphs[name] for name in names]
    loaded = engine.load(opened, specs)
    for spec in specs:
        executable = loaded[spec.file]
        for tensor in (*spec.inputs, *spec.outputs):
            if tensor.name not in buffers:
                buffers[tensor.name] = engine.allocate(tensor.resolve(1), tensor.dtype)
        inputs, outputs = ({t.name: buffers[t.name] for t in some} for some in (spec.inputs, spec.outputs))
        call = executable.bind(inputs, outputs)
        call()
        call()  # engines that record CUDA graphs do so the second time at the latest
        kept.append((executable, call))
    held = held_bytes(setting.device)
    return {"graphs": list(names), "before_bytes": before, "empty_bytes": empty - before, "bytes": held - empty}


def peers(setting: Setting) -> dict[str, Any]:
    """Whole loops of the engine, gated and ungated, and of what users would otherwise take, in turns."""
    opened = setting.open()
    shape, plans = opened.manifest.shapes[0], plans_of(opened.manifest)
    session = session_of(setting, opened, {name: plans[name] for name in ("gated", "ungated")})
    return compare(
        session,
        setting.engine,
        CASES[setting.model].settings(setting.model, height=shape.height, width=shape.width),
        device=setting.device,
        compile_mode=setting.compile_mode,
        repeats=setting.repeats,
        warm_ups=setting.warm_ups,
        seed=setting.seed,
    )


SECTIONS: Mapping[str, Callable[[Setting], dict[str, Any]]] = {
    section.__name__: section
    for section in (machine, probe, bundle, reference, opening, check, loops, memory, kernels, peers)
}


def _cached() -> int:
    root = Path(os.environ["TGATE_CACHE"])
    return sum(1 for entry in root.iterdir() if entry.is_dir()) if root.is_dir() else 0
