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

from tgate_cli.inspect import guidance_stopped, ungated
from tgate_engine.errors import TgateError
from tgate_engine.manifest import Manifest
from tgate_engine.plan import Plan
from tgate_runtime.binding import Binding
from tgate_runtime.conditioning import given, inputs_of
from tgate_runtime.noise import noise


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
    """The bundle's own plan, and the two derived from it."""
    chosen = manifest.plan("default")
    found = {"gated": chosen, "guidance_stopped": guidance_stopped(chosen, manifest)}
    return {name: plan for name, plan in found.items() if plan is not None} | {"ungated": ungated(chosen, manifest)}


def request(manifest: Manifest, seed: int) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
    """Noise, and conditioning of noise: a GPU clocks higher on constants."""
    rows = {}
    for i, (name, spec) in enumerate(inputs_of(manifest).items()):
        shape = (1, *(int(side) for side in spec.shape[1:]))
        rows[name] = np.ones(shape, np.float32) if "mask" in name else noise(seed, i + 1, shape)
    return noise(seed, 0, manifest.latents)[None], given(manifest, rows)


def take(
    binding: Binding, start: NDArray[np.float32], rows: Mapping[str, NDArray[Any]], clock: Clock
) -> tuple[float, list[tuple[str, float]]]:
    """One loop: its milliseconds, and those of each step's graph."""
    plan, marks = binding.plan, []
    begin = clock.mark()
    binding.begin(start * np.float32(plan.sampler.initial_scale), rows)
    for step in plan.steps:
        call = binding.set_step(step, plan.guidance_scale)
        before = clock.mark()
        call()
        marks.append((step.graph, before, clock.mark()))
    return clock.ms(begin, marks[-1][2]), [(graph, clock.ms(before, after)) for graph, before, after in marks]


def one_line(error: BaseException) -> str:
    """What an error says first. This project's own need no class before them."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]
    return text if isinstance(error, TgateError) else f"{type(error).__name__}: {text}"
