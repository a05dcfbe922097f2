"""What benchmarks share: the plans of a bundle, a request of noise, one loop step by step, and clocks.

torch is imported where a GPU is asked for.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tgate_engine.conditioning import half_names
from tgate_engine.errors import TgateError
from tgate_engine.graph import DENOISE
from tgate_engine.manifest import Manifest
from tgate_engine.plan import Plan
from tgate_runtime.generators import noise
from tgate_runtime.state import State


class Clock:
    """CUDA events where PyTorch sees a GPU. Engines return when their work is done, so the events of PyTorch's stream,
    which is idle then, enclose it."""

    def __init__(self, device: str) -> None:
        self._cuda: Any = None
        with contextlib.suppress(ImportError):
            if device == "cuda":
                import torch

                self._cuda = torch.cuda if torch.cuda.is_available() else None
        self.name = "CUDA events" if self._cuda else "perf_counter"

    def mark(self) -> Any:
        if self._cuda is None:
            return time.perf_counter()
        event = self._cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, begin: Any, end: Any) -> float:
        if self._cuda is None:
            return float(end - begin) * 1e3
        end.synchronize()
        return float(begin.elapsed_time(end))


def plans_of(manifest: Manifest) -> dict[str, Plan]:
    """The bundle's own plan, and those that it is measured against, the plainest last."""
    chosen = manifest.plan("default")
    return {"gated": chosen} | {name: manifest.plan(name) for name in reversed(chosen.baselines)}


def request(manifest: Manifest, seed: int) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
    """Noise, and conditioning of noise: a GPU clocks higher on constants."""
    shape = manifest.shapes[0]
    names = half_names(manifest.conditioning)
    specs = {t.name: t for g in shape.graphs.values() if g.role == DENOISE for t in g.inputs if t.name in names}
    rows: dict[str, NDArray[Any]] = {}
    for draw, (name, spec) in enumerate(specs.items(), start=1):
        stem = name.rpartition(".")[0]
        if stem in shape.constants:
            rows[name] = np.array([shape.constants[stem]], np.float32)
        else:
            one = spec.resolve(1)
            rows[name] = np.ones(one, np.float32) if "mask" in name else noise(seed, one, draw=draw)
    return noise(seed, shape.latents)[None], rows


def take(
    state: State, start: NDArray[np.float32], rows: Mapping[str, NDArray[Any]], clock: Clock
) -> tuple[float, list[tuple[str, float]]]:
    """One loop of a state's one image: its milliseconds, and those of each step's graph."""
    (plan,), image, marks = state.plans, range(1), []
    begin = clock.mark()
    state.begin(
        0,
        start[0],
        {name: row[0] for name, row in rows.items()},
        guidance_scale=plan.guidance_scale,
        step_noise=lambda _: start[0],
    )
    while state.step(0) is not None:
        call, (step,) = state.take(image)
        before = clock.mark()
        call()
        marks.append((step.graph, before, clock.mark()))
        state.turn(image)
    return clock.ms(begin, marks[-1][2]), [(graph, clock.ms(before, after)) for graph, before, after in marks]


def one_line(error: BaseException) -> str:
    """What an error says first. This project's own need no class before them."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]
    return text if isinstance(error, TgateError) else f"{type(error).__name__}: {text}"
