"""Walks a plan. It knows steps and buffers, not prompts and not the method."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tgate_engine.errors import RequestError
from tgate_engine.plan import Step
from tgate_runtime.binding import Binding


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """A step that was taken. ``elapsed_ms`` is the time inside the engine alone, which began at ``begin_s`` of
    :func:`time.perf_counter`."""

    index: int
    step: Step
    begin_s: float
    elapsed_ms: float


def run(
    binding: Binding,
    *,
    latents: NDArray[np.float32],
    conditioning: Mapping[str, NDArray[Any]],
    guidance_scale: float,
    step_noise: Callable[[int], NDArray[np.float32]] | None = None,
) -> Generator[StepDone]:
    """Take the steps of ``binding.plan``, one for each item asked for.

    ``latents``: standard normal noise, float32 [B, ...]; x_0 is this times the sampler's ``initial_scale``.
    ``conditioning``: see :meth:`Binding.begin`. ``guidance_scale``: ignored by graphs that have no
    guidance. ``step_noise``: standard normal noise [B, ...] of a step by its index, asked for where the sampler is
    stochastic.

    Yields after each step; ``binding.latents()`` then gives that step's result, and after the last step the
    final latents. Between items nothing runs: closing the generator (or dropping it) stops the work, and frees
    the binding for the next run. Raises :class:`~tgate_engine.errors.RequestError` at the first item for inputs
    that do not fit, or a binding in use, and :class:`~tgate_engine.errors.EngineError` where a graph fails.
    """
    if binding.plan.sampler.stochastic and step_noise is None:
        raise RequestError(f"sampler {binding.plan.sampler.name!r} draws noise in its steps; give step_noise")
    lock = binding.claim()
    try:
        scale = np.float32(binding.plan.sampler.initial_scale)
        binding.begin(np.asarray(latents) * scale, conditioning)
        for step in binding.plan.steps:
            drawn = step_noise(step.index) if step_noise is not None and step.call.noise else None
            call = binding.set_step(step, guidance_scale, drawn)
            begin_s = time.perf_counter()
            call()
            elapsed_ms = (time.perf_counter() - begin_s) * 1e3
            yield StepDone(index=step.index, step=step, begin_s=begin_s, elapsed_ms=elapsed_ms)
    finally:
        lock.release()
