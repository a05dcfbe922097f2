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
from collections.abc import Collection, Mapping
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
_HEAD = 2
"""Numbers before a start's own rows: what the picture and the noise are multiplied by."""


@dataclass(frozen=True, kw_only=True)
class Start:
    """Where a trajectory begins from a picture.

    ``begin``: steps of the whole trajectory that are left out, 0 .. n - 1. ``picture``, ``noise``: coefficients of the
    picture's latents and of standard normal noise in x_0. ``calls``: the first calls, whose coefficients are not those
    of the whole trajectory; often none, and never many.
    """

    begin: int
    picture: float
    noise: float
    calls: tuple[SamplerStep, ...]

    def latents(self, picture: NDArray[np.float32], noise: NDArray[np.float32]) -> NDArray[np.float32]:
        """x_0, float32 of the shape of both, which is one result's or several's latents. Pure."""
        latents: NDArray[np.float32] = np.float32(self.picture) * picture + np.float32(self.noise) * noise
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


def start_rows(starts: Collection[Start], calls: int) -> NDArray[np.float32]:
    """Starts as a table, float32 [n, 2 + 12 D], by their ``begin``: D is the most calls of their own that any has, and
    where one has fewer, zeros stand after them. ``calls``: those of the whole trajectory."""
    depth = max(len(start.calls) for start in starts)
    rows = np.zeros((len(starts), _HEAD + STEP_ROW * depth), np.float32)
    for start in starts:
        # A start that could do with fewer has as many as the others, so that the table says all.
        if len(start.calls) < min(depth, calls - start.begin):
            raise ValueError(f"start {start.begin} has {len(start.calls)} calls of its own, others have {depth}")
        numbers = [np.float32(start.picture), np.float32(start.noise)]
        own = [step_row(call, 0.0) for call in start.calls]
        row = np.concatenate([np.array(numbers, np.float32), *own])
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
            there = ", ".join(f"{name} of {steps}" for name, steps in self._tables)
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
        numbers = rows[begin].astype(np.float64).tolist()
        calls = tuple(call_of(numbers[_HEAD + STEP_ROW * i : _HEAD + STEP_ROW * (i + 1)]) for i in range(own))
        return Start(begin=begin, picture=numbers[0], noise=numbers[1], calls=calls)


def _rows(sampler: Sampler) -> bytes:
    return (np.stack([step_row(call, 0.0) for call in sampler.calls]) + np.float32(0)).tobytes()  # -0 is 0


def _checked(rows: NDArray[Any], whole: Sampler) -> NDArray[np.float32]:
    wide = rows.ndim == 2 and rows.shape[1] >= _HEAD and (rows.shape[1] - _HEAD) % STEP_ROW == 0
    if not wide or rows.dtype != np.float32 or len(rows) != whole.steps or not np.isfinite(rows).all():
        raise ValueError(f"starts of {whole.steps} steps are {rows.dtype} {list(rows.shape)}, or not finite")
    return rows
