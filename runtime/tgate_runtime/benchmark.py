"""How long a bundle takes on this machine: per graph, and gated against what it replaces, taken in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from PIL import Image

from tgate_engine.bundle import Bundle
from tgate_engine.errors import RequestError
from tgate_engine.inspect import guidance_stopped, ungated
from tgate_engine.manifest import Manifest
from tgate_engine.plan import DENOISING_GRAPHS, Plan
from tgate_runtime.backends import OnBuild, Options
from tgate_runtime.binding import Binding
from tgate_runtime.conditioning import batch_rows, given, halves, inputs_of
from tgate_runtime.decoder import decode
from tgate_runtime.files import check_place
from tgate_runtime.image import encode_image
from tgate_runtime.noise import noise
from tgate_runtime.runner import run
from tgate_runtime.session import Session
from tgate_runtime.text import TextEncoder
from tgate_runtime.trace import write_trace

PROMPT = "a large red circle above a small blue square"


@dataclass
class _Times:
    """Milliseconds of each measured run of one plan."""

    loop: list[float] = field(default_factory=list)
    engine: list[float] = field(default_factory=list)
    steps: list[float] = field(default_factory=list)


def bench(
    bundle: Bundle,
    *,
    plan: str = "default",
    engine: str = "ort-cpu",
    batch: int | None = None,
    stopped: bool = True,
    repeats: int = 5,
    warm_ups: int = 1,
    on_run: Callable[[int, int, str], None] | None = None,
    on_build: OnBuild | None = None,
    trace: Path | None = None,
    **options: Unpack[Options],
) -> dict[str, Any]:
    """Measure and return JSON values; all times are medians in milliseconds, all MACs for one image.

    ``graphs.<name>.ms``: one call. ``plans.{gated,guidance_stopped,ungated}``: the chosen plan and the two derived
    from it, run in turns (A B C A B C …) so that a machine that slows down slows all of them; ``ms`` is the whole
    denoising loop, and ``outside_engine`` the fraction of it that is not spent in engine calls; ``step_ms`` holds the
    median and the 99th percentile of the engine's steps. ``picture_ms`` adds
    one text (or image) and one decoder call for each image, where the bundle has those graphs. ``speedup`` is
    ungated over gated ``ms``, to be read beside ``mac_ratio``, ungated over gated by all MACs. A bundle without
    guidance has no ``guidance_stopped``: null, as with ``stopped=False``, which spares the memory of its graph.

    ``sgemm_gmacs_per_s`` says how fast NumPy multiplies matrices here, to judge each graph's ``gmacs_per_s`` by.

    ``batch``: images at once; None takes the least that the bundle allows. ``repeats`` and ``warm_ups`` count turns.
    ``on_run(done, total, plan)`` is called after each run. ``trace``: a file for the last gated run, see
    :mod:`tgate_runtime.trace`; it is written once, after the last turn. ``open_s`` is the time it took to load the
    graphs, whatever had to be compiled included.
    Raises :class:`RequestError` for settings that cannot be.
    """
    if repeats < 1 or warm_ups < 0:
        raise RequestError(f"repeats must be at least 1 and warm-ups at least 0, got {repeats} and {warm_ups}")
    if trace is not None:
        check_place(trace)
    manifest = bundle.manifest
    chosen = manifest.plan(plan)
    candidates = {
        "gated": chosen,
        "guidance_stopped": guidance_stopped(chosen, manifest) if stopped else None,
        "ungated": ungated(chosen, manifest),
    }
    plans = {name: found for name, found in candidates.items() if found is not None}
    images = manifest.batch[0] if batch is None else batch
    opened_s = time.perf_counter()
    with Session.open(bundle, engine=engine, plans=[*plans.values()], on_build=on_build, **options) as session:
        opened_s = time.perf_counter() - opened_s
        encoders = _encoders(session)
        bindings = {name: Binding(session, found, images) for name, found in plans.items()}
        graph_ms: dict[str, list[float]] = {}
        times = {name: _Times() for name in plans}
        start = np.stack([noise(0, j, manifest.latents) for j in range(images)])
        total = (warm_ups + repeats) * len(plans)
        for turn in range(warm_ups + repeats):
            conditioning = _around(session, encoders, start[0], graph_ms, measured=turn >= warm_ups)
            rows = {name: batch_rows(values, images) for name, values in conditioning.items()}
            for place, (name, binding) in enumerate(bindings.items()):
                scale = plans[name].guidance_scale
                begin = time.perf_counter()
                steps = list(
                    run(binding, latents=start, conditioning=rows, guidance_scale=scale, step_noise=lambda _: start)
                )
                end = time.perf_counter()
                elapsed_ms = (end - begin) * 1e3
                if name == "gated":
                    last = (begin, end, steps)
                if turn >= warm_ups:
                    times[name].loop.append(elapsed_ms)
                    times[name].engine.append(sum(done.elapsed_ms for done in steps))
                    times[name].steps += [done.elapsed_ms for done in steps]
                    for done in steps:
                        graph_ms.setdefault(done.step.graph, []).append(done.elapsed_ms)
                if on_run is not None:
                    on_run(turn * len(plans) + place + 1, total, name)
        if trace is not None:
            write_trace(trace, f"{manifest.model}, plan {plan}, {session.backend.name}", *last)
        return {
            **_results(manifest, candidates, times, graph_ms, images),
            "open_s": opened_s,
            "sgemm_gmacs_per_s": sgemm_gmacs_per_s(),
            "settings": {
                **_settings(manifest, chosen),
                "engine": session.backend.name,
                "engine_version": session.backend.version,
                "threads": session.backend.options.threads,
                "precision": session.backend.options.precision,
                "memory": session.backend.options.memory,
                "cpu": cpu_model(),
                "batch": images,
                "repeats": repeats,
                "warm_ups": warm_ups,
            },
        }


def sgemm_gmacs_per_s(size: int = 768, repeats: int = 5) -> float:
    """The rate at which NumPy multiplies two float32 matrices on all cores, best of ``repeats``: a limit that
    no graph is likely to pass here."""
    a, b = (noise(0, j, (size, size)) for j in range(2))
    best_s = float("inf")
    for _ in range(repeats + 1):  # the first one warms up
        begin = time.perf_counter()
        a @ b
        best_s = min(best_s, time.perf_counter() - begin)
    return size**3 / best_s / 1e9


def cpu_model() -> str:
    """The processor's name as Linux gives it; empty where it does not."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")


def _settings(manifest: Manifest, plan: Plan) -> dict[str, Any]:
    return {
        "model": manifest.model,
        "dtype": manifest.dtype,
        "height": manifest.height,
        "width": manifest.width,
        "plan": plan.name,
        "steps_n": plan.schedule.steps,
        "gate_m": plan.schedule.gate,
        "self_interval_k": plan.schedule.self_interval,
        "warm_up": plan.schedule.warm_up,
        "fidelity_interval": plan.schedule.fidelity_interval,
        "sampler": plan.sampler.name,
        "guidance_scale": plan.guidance_scale,
    }


def _encoders(session: Session) -> dict[str, Callable[[], Mapping[str, Any]]]:
    """What makes the conditioning of one request, by graph; nothing where the bundle holds the denoiser alone."""
    manifest = session.manifest
    found: dict[str, Callable[[], Mapping[str, Any]]] = {}
    if manifest.text:
        text = TextEncoder(session)
        found[manifest.text] = lambda: text.encode(PROMPT).tensors
    if manifest.image:
        grey = Image.new("RGB", (manifest.width, manifest.height), (128, 128, 128))
        found[manifest.image] = lambda: encode_image(session, grey, seed=0)
    return found


def _around(
    session: Session,
    encoders: Mapping[str, Callable[[], Mapping[str, Any]]],
    latents: Any,
    graph_ms: dict[str, list[float]],
    *,
    measured: bool,
) -> dict[str, Any]:
    """Run the graphs around the denoiser once, timed; the conditioning of one image."""
    manifest = session.manifest
    calls: dict[str, Callable[[], Any]] = dict(encoders)
    if manifest.decoder:
        calls[manifest.decoder] = lambda: decode(session, latents)
    encoded: dict[str, Any] = {}
    for name, call in calls.items():
        begin = time.perf_counter()
        result = call()
        if measured:
            graph_ms.setdefault(name, []).append((time.perf_counter() - begin) * 1e3)
        if name != manifest.decoder:
            encoded |= result
    if not encoders:  # the values do not matter to the time
        specs = inputs_of(manifest)
        return given(manifest, {name: np.ones((1, *map(int, s.shape[1:])), np.float32) for name, s in specs.items()})
    return halves(manifest, encoded, None if manifest.zero_negative else encoded)


def _results(
    manifest: Manifest,
    plans: dict[str, Plan | None],
    times: dict[str, _Times],
    graph_ms: dict[str, list[float]],
    images: int,
) -> dict[str, Any]:
    graphs: dict[str, dict[str, Any]] = {}
    for name in manifest.graphs:
        if name in graph_ms:
            macs = manifest.graphs[name].macs
            ms = statistics.median(graph_ms[name])
            rows = images if name in DENOISING_GRAPHS else 1
            graphs[name] = {
                "ms": ms,
                "macs": {"paper": macs.paper, "all": macs.all},
                "gmacs_per_s": rows * macs.all / ms / 1e6,
            }
    around_ms = images * sum(statistics.median(ms) for name, ms in graph_ms.items() if name not in DENOISING_GRAPHS)
    found: dict[str, Any] = {}
    for name, plan in plans.items():
        if plan is None:
            found[name] = {"ms": None}
            continue
        loop_ms, engine_ms = statistics.median(times[name].loop), statistics.median(times[name].engine)
        outside = [loop - inside for loop, inside in zip(times[name].loop, times[name].engine, strict=True)]
        paper, every = plan.macs(manifest.graphs)
        found[name] = {
            "ms": loop_ms,
            "picture_ms": loop_ms + around_ms,
            "outside_engine": 1 - engine_ms / loop_ms,
            "outside_engine_ms_per_step": statistics.median(outside) / len(plan.steps),
            "step_ms": {
                "p50": statistics.median(times[name].steps),
                "p99": float(np.percentile(times[name].steps, 99)),
            },
            "macs": {"paper": paper, "all": every},
            "runs_ms": times[name].loop,
        }
    gated, base, stopped = found["gated"], found["ungated"], found["guidance_stopped"]
    return {
        "graphs": graphs,
        "plans": found,
        "speedup": base["ms"] / gated["ms"],
        "mac_ratio": base["macs"]["all"] / gated["macs"]["all"],
        "guidance_stopped_speedup": base["ms"] / stopped["ms"] if stopped["ms"] else None,
        "guidance_stopped_mac_ratio": base["macs"]["all"] / stopped["macs"]["all"] if stopped["ms"] else None,
    }
