"""A sampler some of whose network calls are left out, their outputs forecast from those before.

A step x' = sum_j a_j x_{-j} + sum_j b_j e_{-j} is linear, and so is a forecast: of the outputs e_c and e_c' of the last
two calls, made at steps c' < c, the output at step i is taken to be

    e_i = e_c + (i - c) / (c - c') (e_c - e_c')

(a Taylor series to first order, with backward differences, as TaylorSeer has it, arXiv 2503.06923; e_c where there is
one call only). So all that happens from one call to the next is one step with other coefficients: run time knows
nothing of it, and a step that is left out costs nothing at all.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from tgate_engine.errors import MethodError
from tgate_engine.sampler import HISTORY, Sampler

FORECAST_OF = "forecast_of_steps"
"""The fact of a sampler that calls were left out of: how many steps it had."""
_EXACT = 1e-9
"""What may be missing of latents that a step is to give, beside their largest part, in float64."""
_MOST = 100.0
"""The largest coefficient of a step: float32's rounding of what it is multiplied with grows as much."""

_Value = NDArray[np.float64]
"""A tensor of the trajectory as a sum of the first latents and of every call's outputs: what each counts in it."""


def forecast(sampler: Sampler, left_out: Collection[int]) -> Sampler:
    """The sampler without the calls ``left_out``; its ``steps`` are those that are left.

    ``left_out``: indices of ``sampler.calls``, not the first. Raises :class:`MethodError` for a sampler that draws
    noise in its steps, which would be drawn less often, or one that would have to look further back than a step can,
    or would need coefficients that are too large.
    """
    if not left_out:
        return sampler
    if sampler.stochastic:
        raise MethodError(
            f"sampler {sampler.name} draws noise in every step, and none can be left out; take another --sampler, or "
            "leave out --forecast"
        )
    made = [i for i in range(len(sampler.calls)) if i not in left_out]
    if not set(left_out) <= set(range(max(1, sampler.lead_in), len(sampler.calls))):
        raise ValueError(f"calls 1 to {len(sampler.calls) - 1} may be left out, not {sorted(left_out)}")
    latents, outputs = _walked(sampler, made)
    calls = []
    for own, (i, following) in enumerate(zip(made, [*made[1:], len(sampler.calls)], strict=True)):
        step = sampler.calls[i]
        if following > i + 1 or any(j in left_out for j in range(i - step.lag, i)):
            window = [made[own - j] for j in range(min(own, HISTORY) + 1)]
            solved = _solved([latents[j] for j in window], [outputs[j] for j in window], latents[following])
            if solved is None:
                raise MethodError(
                    f"sampler {sampler.name} with {following - i - 1} network calls in a row left out would have to "
                    f"look further back than {HISTORY} calls, or at less with coefficients above {_MOST:g}; take a "
                    "smaller --forecast or another --sampler"
                )
            step = replace(step, latents=solved[0], outputs=solved[1])
        calls.append(step)
    return replace(
        sampler,
        steps=len(calls) - sampler.lead_in,
        calls=tuple(calls),
        options={**sampler.options, FORECAST_OF: sampler.steps},
    )


def _walked(sampler: Sampler, made: Sequence[int]) -> tuple[list[_Value], list[_Value]]:
    """The latents before and after each step, and each step's outputs."""
    known = np.eye(1 + len(made))  # the first latents, then the outputs of each call that is made
    latents: list[_Value] = [known[0]]
    outputs: list[_Value] = []
    last: list[tuple[int, _Value]] = []
    for i, step in enumerate(sampler.calls):
        if i in made:
            last = [*last[-1:], (i, known[1 + made.index(i)])]
            outputs.append(last[-1][1])
        else:
            (before, first), (at, then) = last[0], last[-1]
            outputs.append(then + (then - first) * ((i - at) / (at - before) if at > before else 0.0))
        following = np.zeros(len(known))
        for j in range(min(i, HISTORY) + 1):
            following += step.latents[j] * latents[i - j] + step.outputs[j] * outputs[i - j]
        latents.append(following)
    return latents, outputs


def _solved(
    latents: Sequence[_Value], outputs: Sequence[_Value], following: _Value
) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """The coefficients of a step that gives those latents, from as few pairs as do, the current one first."""
    for count in range(1, len(latents) + 1):
        columns = np.stack([*latents[:count], *outputs[:count]], axis=1)
        weights, *_ = np.linalg.lstsq(columns, following)
        missing = np.abs(columns @ weights - following).max()
        if missing <= _EXACT * np.abs(following).max() and np.abs(weights).max() <= _MOST:
            rest = (0.0,) * (HISTORY + 1 - count)
            return (*weights[:count].tolist(), *rest), (*weights[count:].tolist(), *rest)
    return None
