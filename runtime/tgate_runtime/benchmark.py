"""How long a bundle takes on this machine: per graph, and a plan against its baselines, taken in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tgate_engine.bundle import Bundle
from tgate_engine.errors import RequestError
from tgate_engine.graph import DECODE, DENOISE, IMAGE, TEXT
from tgate_engine.manifest import Shape
from tgate_engine.plan import Plan
from tgate_runtime.conditioning import conditioning_inputs, conditioning_of, from_embeddings
from tgate_runtime.decoder import decode
from tgate_runtime.engines.protocol import Engine, OnBuild, Options
from tgate_runtime.files import check_place
from tgate_runtime.finite import check_computed
from tgate_runtime.generators import noise
from tgate_runtime.image import encode_image
from tgate_runtime.runner import run
from tgate_runtime.session import Session, graphs_of
from tgate_runtime.state import State, shape_for
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
    against: Sequence[str] | None = None,
    size: str | None = None,
    engine: str | Engine = "ort-cpu",
    batch: int | None = None,
    repeats: int = 5,
    warm_ups: int = 1,
    on_run: Callable[[int, int, str], None] | None = None,
    on_build: OnBuild | None = None,
    trace: Path | None = None,
    **options: Unpack[Options],
) -> dict[str, Any]:
    """Measure and return JSON values; all times are medians in milliseconds, all MACs for one image.

    ``graphs.<name>.ms``: one call. ``plans``: the chosen plan and those it is compared with, by name, run in turns
    (A B C A B C …) so that a machine that slows down slows all of them; ``ms`` is the whole denoising loop, and
    ``outside_engine`` the fraction of it that is not spent in engine calls; ``step_ms`` holds the
    median and the 99th percentile of the engine's steps. ``picture_ms`` adds
    one text (or image) and one decoder call for each image, where the bundle has those graphs. Each compared plan has
    ``speedup``, its ``ms`` over the chosen plan's, to be read beside ``mac_ratio``, the same of all MACs; those of the
    first one stand at the top as well, null where there is none.

    ``sgemm_gmacs_per_s`` says how fast NumPy multiplies matrices here, to judge each graph's ``gmacs_per_s`` by.

    ``against``: names of plans to compare with; None takes the plan's own baselines. ``size``: None is the default.
    ``batch``: images at once; None takes the least that the bundle allows. ``repeats`` and ``warm_ups`` count turns.
    ``on_run(done, total, plan)`` is called after each run. ``trace``: a file for the last run of the plan, see
    :mod:`tgate_runtime.trace`; it is written once, after the last turn. ``open_s`` is the time it took to load the
    graphs, whatever had to be compiled included.
    Raises :class:`RequestError` for settings that cannot be, and :class:`~tgate_engine.errors.EngineError` where what
    is measured gives numbers that are not finite.
    """
    if repeats < 1 or warm_ups < 0:
        raise RequestError(f"repeats must be at least 1 and warm-ups at least 0, got {repeats} and {warm_ups}")
    if trace is not None:
        check_place(trace)
    manifest = bundle.manifest
    plans, shape, images = compared(bundle, plan=plan, against=against, size=size, batch=batch)
    chosen = plans[plan]
    opened_s = time.perf_counter()
    with Session.open(
        bundle, engine=engine, plans=[*plans.values()], sizes=[shape.size], on_build=on_build, **options
    ) as session:
        opened_s = time.perf_counter() - opened_s
        around = _Around(session)
        states = {name: State(session, planned, images) for name, planned in plans.items()}
        graph_ms: dict[str, list[float]] = {}
        times = {name: _Times() for name in plans}
        start = np.stack([noise(j, shape.latents) for j in range(images)])
        total = (warm_ups + repeats) * len(plans)
        for turn in range(warm_ups + repeats):
            rows, around_ms = around.run(start[0])
            if turn >= warm_ups:
                for name, ms in around_ms.items():
                    graph_ms.setdefault(name, []).append(ms)
            for place, (name, state) in enumerate(states.items()):
                begin = time.perf_counter()
                steps = list(
                    run(
                        state,
                        latents=start,
                        conditioning=rows,
                        guidance_scale=plans[name].guidance_scale,
                        step_noise=lambda row, _: start[row],
                    )
                )
                end = time.perf_counter()
                elapsed_ms = (end - begin) * 1e3
                check_computed(state.latents(), f"the latents after the last step of plan {name!r}")
                if name == plan:
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
            write_trace(trace, f"{manifest.model}, plan {plan}, {session.engine.name}", *last)
        return {
            **_results(shape, plan, plans, times, graph_ms, images),
            "open_s": opened_s,
            "sgemm_gmacs_per_s": sgemm_gmacs_per_s(),
            "settings": {
                "model": manifest.model,
                "dtype": manifest.dtype,
                "size": shape.size,
                "plan": plan,
                "plan_settings": dict(chosen.settings),
                "sampler": chosen.sampler.name,
                "guidance_scale": chosen.guidance_scale,
                "engine": session.engine.name,
                "engine_version": session.engine.version,
                "threads": session.engine.options.threads,
                "precision": session.engine.options.precision,
                "memory": session.engine.options.memory,
                "cpu": cpu_model(),
                "batch": images,
                "repeats": repeats,
                "warm_ups": warm_ups,
            },
        }


def compared(
    bundle: Bundle, *, plan: str, against: Sequence[str] | None, size: str | None, batch: int | None
) -> tuple[dict[str, Plan], Shape, int]:
    """What :func:`bench` measures, by the manifest alone: the plans by name, the chosen one first; the shape; and how
    many images at once. Raises :class:`~tgate_engine.errors.TgateError` for what the bundle has not."""
    manifest = bundle.manifest
    others = manifest.plan(plan).baselines if against is None else against
    plans = {name: manifest.plan(name) for name in dict.fromkeys([plan, *others])}
    shapes = manifest.shapes_of(size)
    images = shapes[0].batch[0] if batch is None else batch
    shape = shape_for(shapes, images)
    graphs_of(bundle, [*plans.values()], [shape.size])
    return plans, shape, images


def sgemm_gmacs_per_s(size: int = 768, repeats: int = 5) -> float:
    """The rate at which NumPy multiplies two float32 matrices on all cores, best of ``repeats``: a limit that
    no graph is likely to pass here."""
    a, b = (noise(j, (size, size)) for j in range(2))
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


class _Around:
    """The graphs before and after the loop, for one image."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._text = TextEncoder(session) if session.graph(TEXT) else None
        shape = session.shapes()[0]
        self._grey = Image.new("RGB", (shape.width, shape.height), (128, 128, 128))
        self._names = {spec.role: name for name, spec in shape.graphs.items() if spec.role != DENOISE}

    def run(self, latents: NDArray[np.float32]) -> tuple[dict[str, NDArray[Any]], dict[str, float]]:
        """What conditions one image, and the milliseconds of each graph by its name."""
        session, ms = self._session, dict[str, float]()

        def timed(role: Any, call: Callable[[], Any]) -> Any:
            begin = time.perf_counter()
            result = call()
            ms[self._names[role]] = (time.perf_counter() - begin) * 1e3
            return result

        encoded: dict[str, NDArray[Any]] = {}
        text, image, decoder = self._text, session.graph(IMAGE), session.graph(DECODE)
        if text is not None:
            encoded |= timed(TEXT, lambda: text.encode(PROMPT).tensors)
        if image is not None:
            encoded |= timed(IMAGE, lambda: encode_image(session, image, self._grey, seed=0))
        if decoder is not None:
            timed(DECODE, lambda: decode(session, decoder, latents))
        # Of what no graph gives, the values do not matter to the time.
        specs = conditioning_inputs(session)
        ones = {name: np.ones((1, *map(int, spec.shape[1:])), np.float32) for name, spec in specs.items()}
        negative = None if session.manifest.zero_negative else encoded
        return {**from_embeddings(session, ones), **conditioning_of(session, encoded, negative)}, ms


def _results(
    shape: Shape,
    chosen: str,
    plans: Mapping[str, Plan],
    times: Mapping[str, _Times],
    graph_ms: Mapping[str, list[float]],
    images: int,
) -> dict[str, Any]:
    graphs: dict[str, dict[str, Any]] = {}
    around_ms = 0.0
    for name, spec in shape.graphs.items():
        if name in graph_ms:
            ms = statistics.median(graph_ms[name])
            rows = images if spec.role == DENOISE else 1
            graphs[name] = {
                "ms": ms,
                "macs": {"paper": spec.macs.paper, "all": spec.macs.all},
                "gmacs_per_s": rows * spec.macs.all / ms / 1e6,
            }
            around_ms += 0.0 if spec.role == DENOISE else images * ms
    results: dict[str, Any] = {}
    for name, plan in plans.items():
        loop_ms, engine_ms = statistics.median(times[name].loop), statistics.median(times[name].engine)
        outside = [loop - inside for loop, inside in zip(times[name].loop, times[name].engine, strict=True)]
        paper, every = plan.macs(shape.graphs)
        results[name] = {
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
    own = results[chosen]
    for name in plans:
        if name != chosen:
            results[name]["speedup"] = results[name]["ms"] / own["ms"]
            results[name]["mac_ratio"] = results[name]["macs"]["all"] / own["macs"]["all"]
    first = next((results[name] for name in plans if name != chosen), None)
    return {
        "graphs": graphs,
        "plans": results,
        "speedup": first and first["speedup"],
        "mac_ratio": first and first["mac_ratio"],
    }
