"""Where trajectories begin from a picture: diffusers' scheduler, run from each of its steps on.

A sampler that looks back has no history there, and so takes its first few steps in another way. Only those are kept:
once as many steps as a step looks back agree with the whole trajectory's, all later ones do.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tgate_engine.errors import ExportError
from tgate_engine.sampler import HISTORY, Sampler
from tgate_engine.starts import STARTS, Start, start_rows
from tgate_engine.step import step_row
from tgate_export.libraries import refusing
from tgate_export.sampling import MAX_RESIDUAL, Run, coefficients
from tgate_export.schedulers import ADVICE, make_scheduler

_SAME = 2e-6
"""How far apart, relative to its largest, a step's coefficients may be to be the same: float32's rounding in a
scheduler, which compiled ones carry as well."""

_MOST = 2 * (HISTORY + 1)
"""Calls after which every sampler is the whole trajectory's again: a step reads a window of :data:`HISTORY` pairs."""


OWN_STEPS = (*range(1, 11), 15, 20, 25, 30, 40, 50)
OTHER_STEPS = (25,)
"""Numbers of steps that a bundle has starts for, of the model's own sampler and of the others. Each is n trajectories
to run, so they are fewer than those of :data:`tgate_export.sampling.OWN_STEPS`."""


def compile_starts(
    samplers: Sequence[Sampler], own: Sampler, base_config: Mapping[str, Any]
) -> dict[str, NDArray[np.float32]]:
    """Tables of starts, for :func:`tgate_engine.sampler_tables.dump_tables`: those of compiled ``samplers`` that have
    as many steps as are wanted, or as the bundle's ``own`` sampler. Those that cannot begin in the middle are left
    out."""
    wanted = tuple(
        sampler
        for sampler in samplers
        if (sampler.steps in (*OWN_STEPS, own.steps) and sampler.name == own.name) or sampler.steps in OTHER_STEPS
    )
    return dict(_tables(wanted, json.dumps(base_config, sort_keys=True, default=str)))


@functools.lru_cache(maxsize=32)
def _tables(samplers: tuple[Sampler, ...], config: str) -> tuple[tuple[str, NDArray[np.float32]], ...]:
    tables = []
    for whole in samplers:
        with suppress(ExportError):
            starts = starts_of(make_scheduler(whole.name, json.loads(config)), whole)
            tables.append((f"{whole.name}.{whole.steps}{STARTS}", start_rows(starts)))
    return tuple(tables)


def starts_of(scheduler: Any, whole: Sampler) -> tuple[Start, ...]:
    """Every start of a compiled sampler, by its ``begin``, one for each call; all of them have as many calls of their
    own, as far as their trajectories go. Raises :class:`ExportError` where one never becomes the whole trajectory."""
    run = Run(scheduler, whole.steps)
    if hasattr(run.scheduler, "get_lms_coefficient"):  # integrates, over and over, what depends on the step alone
        run.scheduler.get_lms_coefficient = functools.cache(run.scheduler.get_lms_coefficient)
    levels = tuple(_level(run.begun(begin, 1)) for begin in range(len(whole.calls)))
    _, _, free = coefficients(run.begun(0, _MOST), run.kind, whole.initial_scale)

    def start(begin: int, most: int) -> Start:
        calls, residual, own = coefficients(run.begun(begin, most), run.kind, whole.initial_scale)
        if not residual < MAX_RESIDUAL:
            raise ExportError(
                f"{run.kind} is not linear from step {begin} of {whole.steps} on: {residual:.1e}. {ADVICE}"
            )
        return Start(begin=begin, levels=levels[begin:], calls=calls, free=free and own)

    depth = _depth(start(whole.steps // 2, _MOST), whole)
    starts = [start(begin, depth + 2) for begin in range(len(whole.calls))]
    if any(_depth(each, whole) > depth for each in starts):
        raise ExportError(
            f"{run.kind} begins in other ways from some of {whole.steps} steps than from others. {ADVICE}"
        )
    free = all(each.free for each in starts)
    return tuple(replace(each, calls=each.calls[:depth], free=free) for each in starts)


def _level(run: Run) -> tuple[float, float]:
    """What the scheduler multiplies a picture's latents and noise by, where a run begins."""
    picture, noise = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 1.0]]]])
    with refusing(f"diffusers cannot add noise to a picture with {run.kind}", ADVICE):
        latents = run.scheduler.add_noise(picture, noise, torch.stack(run.timesteps[:1]))
    first, second = latents.flatten().tolist()
    return first, second


def _depth(start: Start, whole: Sampler) -> int:
    """How many of a start's first calls are not the whole trajectory's. Raises :class:`ExportError` where the last ones
    that are known are not."""
    there = whole.calls[start.begin : start.begin + len(start.calls)]
    rows, others = (np.stack([step_row(call, 0.0) for call in calls]) for calls in (start.calls, there))
    differ = np.abs(rows - others).max(axis=1) > _SAME * np.abs(others[:, 1:]).max(axis=1)
    depth = int(np.flatnonzero(differ).max(initial=-1)) + 1
    known = len(start.calls)
    if known < len(whole.calls) - start.begin and depth > known - 2:
        raise ExportError(f"{whole.name} takes another way from step {start.begin} of {whole.steps} on. {ADVICE}")
    return depth
