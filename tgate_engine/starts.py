"""Trajectories that begin from a picture: the noise it is given, and a plan of the steps that are left.

A request of strength s keeps the last int(n s) of a plan's n steps, as diffusers does. It begins from
``x_0 = picture * latents + noise * z``, the noised picture at the first of those timesteps, with no history. Samplers
that look back begin anew there, so their first few steps have coefficients of their own; from then on they are those of
the whole trajectory. Export finds both by running the real scheduler from every step on
(:mod:`tgate_export.starts`), and here they are read.

Which graph a step runs is decided by its index in the plan that is left: its first step runs the graph of the plan's
first step, and so on. So n, m, k, w and f count the steps that are taken, not the noise that is left.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from tgate_engine.errors import BundleError, PlanError, shown
from tgate_engine.graph import GraphSpec
from tgate_engine.plain_files import open_plain, read_most
from tgate_engine.plan import Call, Plan
from tgate_engine.plan_build import build_plan
from tgate_engine.sampler import Sampler, SamplerStep
from tgate_engine.sampler_tables import MOST_BYTES, call_of, load_tables
from tgate_engine.step import STEP_ROW, step_row

STARTS = ".starts"
"""How the names of tensors of starts end, in the file of compiled samplers: ``<sampler>.<n>.starts``."""
_HEAD = 3
"""Numbers before the rows of a start's own calls: its level, and whether it is free."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a trajectory begins from a picture.

    ``begin``: steps of the whole trajectory that are left out, 0 .. n - 1. ``levels``: for each call that is left, what
    the picture's latents and standard normal noise are multiplied by to be as noisy as the latents before it.
    ``calls``: the first calls, whose coefficients are not those of the whole trajectory; often none, and never many.
    ``free``: whether the steps go by whatever latents they are given, so that some of them may be replaced between two
    steps.
    """

    begin: int
    levels: tuple[tuple[float, float], ...]
    calls: tuple[SamplerStep, ...]
    free: bool

    def noised(self, picture: NDArray[np.float32], noise: NDArray[np.float32], call: int = 0) -> NDArray[np.float32]:
        """A picture's latents as noisy as those before call ``call`` of what is left; x_0 before the first. Float32 of
        the shape of both arrays. Pure."""
        own, added = self.levels[call]
        latents: NDArray[np.float32] = np.float32(own) * picture + np.float32(added) * noise
        return latents

    def sampler(self, whole: Sampler) -> Sampler:
        """What is left of the whole trajectory's sampler; its ``initial_scale`` is 1, as x_0 is given. Pure."""
        calls = (*self.calls, *whole.calls[self.begin + len(self.calls) :])
        return replace(whole, steps=whole.steps - self.begin, initial_scale=1.0, calls=calls)


def begin_of(steps: int, strength: float) -> int:
    """How many of ``steps`` a strength in (0, 1] leaves out, 0 .. steps - 1, counted as diffusers counts them.

    Raises :class:`PlanError` for a strength so small that no step is left.
    """
    left = min(int(steps * strength), steps)
    if left < 1:
        raise PlanError(
            f"strength {strength:g} leaves none of {steps} steps; take {math.ceil(100 / steps) / 100:g} or more"
        )
    return steps - left


def plan_from(plan: Plan, start: Start, graphs: Mapping[str, GraphSpec], carries: Collection[str]) -> Plan:
    """What is left of ``plan`` from ``start`` on: as many of its programme's first steps as there are, at the start's
    timesteps and coefficients.

    ``graphs``, ``carries``: as :func:`~tgate_engine.plan_build.build_plan` takes them. The plan's settings are those it
    was made from, with ``begin``. Raises :class:`PlanError` as :func:`build_plan` does.
    """
    sampler = start.sampler(plan.sampler)
    return build_plan(
        plan.name,
        [Call(step.phase, step.graph) for step in plan.steps[: len(sampler.calls)]],
        sampler=sampler,
        guidance_scale=plan.guidance_scale,
        graphs=graphs,
        carries=carries,
        settings={**plan.settings, "begin": start.begin},
        baselines=plan.baselines,
    )


def start_rows(starts: Sequence[Start]) -> NDArray[np.float32]:
    """The starts of a trajectory as a table, float32 [calls, 3 + 12 D], by their ``begin``: the level before a call, 1
    where the sampler is free and 0 where it is not, and the calls of its own that a trajectory has from there on, D of
    them or as many as are left, then zeros."""
    depth = max(len(start.calls) for start in starts)
    rows = np.zeros((len(starts), _HEAD + STEP_ROW * depth), np.float32)
    for start in starts:
        own = [step_row(call, 0.0) for call in start.calls]
        row = np.concatenate([np.array([*start.levels[0], start.free], np.float32), *own])
        rows[start.begin, : len(row)] = row
    return rows


class Starts:
    """The starts of a bundle's compiled samplers. Immutable."""

    def __init__(
        self,
        samplers: Mapping[tuple[str, int], Sampler],
        tables: Mapping[tuple[str, int], NDArray[np.float32]],
    ) -> None:
        """``samplers``: the whole trajectories, by name and number of steps; ``tables``: their starts, as
        :func:`start_rows` makes them."""
        self._samplers, self._tables = dict(samplers), dict(tables)

    @staticmethod
    def load(path: Path) -> Starts:
        """Those of a file that :func:`~tgate_engine.sampler_tables.dump_tables` wrote; none in a file without them.
        Raises :class:`BundleError` where it is damaged."""
        samplers = load_tables(path)
        tables: dict[tuple[str, int], NDArray[np.float32]] = {}
        try:
            with open_plain(path) as file:
                tensors: Mapping[str, NDArray[Any]] = load(read_most(file, MOST_BYTES))
            for key, rows in tensors.items():
                if key.endswith(STARTS):
                    name, _, steps = key.removesuffix(STARTS).rpartition(".")
                    tables[name, int(steps)] = _checked(rows, samplers[name, int(steps)])
        except (OSError, ValueError, LookupError, SafetensorError) as error:
            raise BundleError(f"{path} holds no tables of starts ({error!s:.200}); export the bundle again") from None
        return Starts(samplers, tables)

    def find(self, plan: Plan, begin: int) -> Start:
        """Where ``plan`` begins with ``begin`` of its steps left out, 0 .. n - 1.

        Raises :class:`PlanError` for a plan of another sampler or number of steps than there are starts of, and for one
        whose steps are not the sampler's own, such as one that forecasts network calls.
        """
        sampler = plan.sampler
        key = sampler.name, sampler.steps
        rows, whole = self._tables.get(key), self._samplers.get(key)
        if rows is None or whole is None:
            there = ", ".join(f"{name} of {steps}" for name, steps in sorted(self._tables))
            raise PlanError(
                f"plan '{shown(plan.name)}' takes {sampler.steps} steps of sampler '{shown(sampler.name)}', for which "
                f"the bundle has no start from a picture; make one with `tgate plan` for which it has "
                f"({shown(there, 400) or 'none: export the bundle again'})"
            )
        if _rows(sampler) != _rows(whole):
            raise PlanError(
                f"plan '{shown(plan.name)}' does not make every network call of sampler {sampler.name} as it is, which "
                "a start from a picture wants; take a plan without --forecast"
            )
        own = min((rows.shape[1] - _HEAD) // STEP_ROW, len(sampler.calls) - begin)
        numbers = rows[begin:].astype(np.float64).tolist()
        calls = tuple(call_of(numbers[0][_HEAD + STEP_ROW * i : _HEAD + STEP_ROW * (i + 1)]) for i in range(own))
        return Start(
            begin=begin, levels=tuple((row[0], row[1]) for row in numbers), calls=calls, free=bool(numbers[0][2])
        )


def _rows(sampler: Sampler) -> bytes:
    return (np.stack([step_row(call, 0.0) for call in sampler.calls]) + np.float32(0)).tobytes()  # -0 is 0


def _checked(rows: NDArray[Any], whole: Sampler) -> NDArray[np.float32]:
    wide = rows.ndim == 2 and rows.shape[1] >= _HEAD and (rows.shape[1] - _HEAD) % STEP_ROW == 0
    if not wide or rows.dtype != np.float32 or len(rows) != len(whole.calls) or not np.isfinite(rows).all():
        raise ValueError(f"starts of {whole.steps} steps are {rows.dtype} {list(rows.shape)}, or not finite")
    return rows
