"""Compiles a diffusers scheduler into coefficients, by running it on unit vectors instead of images.

A scheduler is linear in its latents, model outputs and, where it is stochastic, the noise that it draws. So
call i is given unit vectors that no earlier call has seen, one as its latents X_i, one as its model output E_i
and, if it asks for noise, one as that noise Z_i. What it returns is its formula, written in those coordinates.
No sampler is written a second time here: a scheduler of diffusers that works this way compiles, whatever its
paper, and one that does not is refused.

Two samplers keep more than the recurrence may read: UniPC its corrected latents, and PNDM, once, the
first output of all. On a real trajectory X_j is what call j-1 returned; that identity removes the excess.

The result is checked against the scheduler at the same time, on random latents of three magnitudes.
"""

from __future__ import annotations

import copy
import functools
import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from tgate_engine.errors import ExportError
from tgate_engine.sampler import HISTORY, MOST_LEAD_IN, MOST_STEPS, Sampler, SamplerStep
from tgate_export.checkpoints.files import quoted
from tgate_export.libraries import one_line, refusing
from tgate_export.recipes import FLOW_EULER, SAMPLERS
from tgate_export.schedulers import (
    ADVICE,
    PIPELINE_SCALES,
    declared,
    facts,
    from_config,
    make_scheduler,
    pipeline_level,
    refuse_options,
    set_timesteps,
    timesteps_of,
)

__all__ = ["SAMPLERS", "compile_sampler", "compile_scheduler", "drawing", "make_scheduler"]

Array = NDArray[np.float64]

MAX_RESIDUAL = 1e-6
"""Largest relative difference allowed between the compiled step and the scheduler's own."""

TAIL = 1e-11
"""What counts as nothing left outside the window, relative to the step's largest coefficient."""

MAX_WEIGHT = 100.0
"""Largest use of an identity. A larger one would cancel digits that float32 does not have."""

MAGNITUDES = (0.1, 1.0, 30.0)
"""Scales of the random check: clipping and thresholding act on large values only."""

LEAST_NUMBERS = 64
"""Of each random latents."""

_PREDICTIONS = {FLOW_EULER: "flow_prediction"}
"""What networks predict by classes that have no option for it."""

OWN_STEPS = (*range(1, 31), 35, 40, 45, 50)
OTHER_STEPS = (10, 20, 25, 30, 50)
"""Numbers of steps that a bundle has tables for, of the model's own sampler and of the others."""


def compile_sampler(name: str, base_config: Mapping[str, Any], steps: int) -> Sampler:
    """The sampler ``name`` for ``steps`` inference steps of a checkpoint.

    ``base_config``: the checkpoint's scheduler configuration, whichever class it names.

    Raises :class:`ExportError` when the name is not known, an option is not linear or draws noise unseen,
    or diffusers itself cannot run the scheduler with that many steps.
    """
    return compile_scheduler(make_scheduler(name, base_config), steps, name=name)


def compile_tables(own: str, base_config: Mapping[str, Any]) -> tuple[Sampler, ...]:
    """The samplers that a bundle brings along for plans to come: a model's ``own`` for :data:`OWN_STEPS`, every other
    one that its configuration allows for :data:`OTHER_STEPS`. Those that cannot be compiled are left out."""
    return _tables(own, json.dumps(base_config, sort_keys=True, default=str))


@functools.lru_cache(maxsize=32)
def _tables(own: str, config: str) -> tuple[Sampler, ...]:
    samplers = []
    for name in (own, *(name for name in SAMPLERS if name != own)):
        with suppress(ExportError):
            scheduler = make_scheduler(name, json.loads(config))
            for steps in OWN_STEPS if name == own else OTHER_STEPS:
                with suppress(ExportError):
                    samplers.append(compile_scheduler(scheduler, steps, name=name))
    return tuple(samplers)


def check_steps(steps: int) -> None:
    """Raises :class:`ExportError` for a number of steps that no sampler takes."""
    if type(steps) is not int or not 1 <= steps <= MOST_STEPS:
        raise ExportError(f"the number of steps must be a whole number from 1 to {MOST_STEPS}, got {quoted(steps)}")


def compile_scheduler(scheduler: Any, steps: int, *, name: str) -> Sampler:
    """The coefficients of any linear diffusers scheduler for ``steps`` inference steps.

    ``scheduler`` is not changed: every run uses a new one made from its configuration. Options given at each
    step rather than in the configuration (DDIM's eta, Euler's s_churn) have diffusers' defaults, which are
    deterministic. The coefficients are those diffusers computes, in float32, held exactly; raising its
    noise schedule to float64 first would give other numbers than its users get.

    Raises :class:`ExportError` naming the scheduler, what was measured and what to do.
    """
    kind = type(scheduler).__name__
    check_steps(steps)
    refuse_options(scheduler)
    run = Run(scheduler, steps)
    lead_in = len(run.timesteps) - steps
    # PNDM starts with two calls for its first step. Anything else that is not n calls (Heun takes two per
    # step; a rounding error in a scheduler's spacing adds one) would put the gate at the wrong place.
    if not 0 <= lead_in <= MOST_LEAD_IN or (lead_in == 1 and kind != "PNDMScheduler"):
        other = "Take a few steps more or fewer, or another timestep_spacing. " if lead_in == 1 else ""
        raise ExportError(
            f"{kind} calls the network {len(run.timesteps)} times for {steps} steps, and the gating rules "
            f"would not know which calls to count. {other}{ADVICE}"
        )
    with refusing(f"diffusers cannot run {kind} with {steps} steps", ADVICE):
        own = run.scheduler.sigmas[0] if run.explodes else getattr(run.scheduler, "init_noise_sigma", 1.0)
        initial_scale = float(own)
    calls, residual, _ = coefficients(run, kind, initial_scale)
    # A comparison with nan is false, so this also refuses a residual that is not a number.
    if not residual < MAX_RESIDUAL:
        raise ExportError(
            f"{kind} is not linear in its latents and outputs: with {steps} steps it differs from the "
            f"compiled coefficients by {residual:.1e} (relative; {MAX_RESIDUAL:.0e} is allowed). {ADVICE}"
        )
    return Sampler(
        name=name,
        steps=steps,
        initial_scale=initial_scale,
        calls=calls,
        lead_in=lead_in,
        prediction_type=str(declared(scheduler).get("prediction_type") or _PREDICTIONS.get(kind, "unstated")),
        options={**facts(scheduler), "residual": float(f"{residual:.2g}")},
    )


class Run:
    """One trajectory of a new scheduler. Schedulers count their steps, so none is used twice.

    Vectors travel as [batch, 1, 1, size] because some schedulers name the first dimensions.
    """

    def __init__(self, scheduler: Any, steps: int) -> None:
        self.kind = type(scheduler).__name__
        self.steps = steps
        self.scheduler = from_config(type(scheduler), scheduler.config)
        self.explodes = bool(scheduler.config.get(PIPELINE_SCALES))
        try:
            set_timesteps(self.scheduler, steps)
            self.timesteps = timesteps_of(self.scheduler)
        except Exception as error:
            raise self._failed(error) from error

    def begun(self, begin: int, most: int) -> Run:
        """A run of the same that has taken no step yet, and leaves out the first ``begin`` of them as diffusers'
        pipelines do that start from a picture; ``most``: how many calls are of interest."""
        other = copy.copy(self)
        other.scheduler = copy.deepcopy(self.scheduler)
        other.timesteps = self.timesteps[begin:][:most]
        if hasattr(other.scheduler, "set_begin_index"):
            other.scheduler.set_begin_index(begin)
        return other

    def step(self, call: int, latents: Array, output: Array, drawn: Array) -> tuple[Array, Array]:
        """What the network would see of ``latents``, and the next latents. All [batch, size].

        ``drawn``: what the scheduler gets where it asks for standard normal noise.
        """
        timestep = self.timesteps[call]
        sample = torch.from_numpy(latents)[:, None, None]
        try:
            seen = sample
            level, time = pipeline_level(self.scheduler, call)
            if level is not None:
                seen = sample * (1 - time)
            elif hasattr(self.scheduler, "scale_model_input"):
                seen = self.scheduler.scale_model_input(sample, timestep)
            noise = torch.from_numpy(output)[:, None, None]
            if level is not None:
                noise = (sample - ((1 - time) * sample - time * noise)) / level
            with drawing(self.scheduler, torch.from_numpy(drawn)[:, None, None]):
                following = self.scheduler.step(noise, timestep, sample, return_dict=False)[0]
        except Exception as error:
            raise self._failed(error) from error
        return _array(seen), _array(following)

    def shown(self, call: int) -> float:
        """The timestep that the network is told."""
        level, time = pipeline_level(self.scheduler, call)
        return float(self.timesteps[call] if level is None else time)

    def _failed(self, error: Exception) -> ExportError:
        return ExportError(
            f"diffusers cannot run {self.kind} with {self.steps} steps: {one_line(error)}. "
            f"Change the number of steps or the sampler. {ADVICE}"
        )


@contextmanager
def drawing(scheduler: Any, noise: torch.Tensor) -> Iterator[None]:
    """While open, the scheduler's module draws ``noise`` whenever it draws noise, once a step at most."""
    module = sys.modules[type(scheduler).__module__]
    real = getattr(module, "randn_tensor", None)
    if real is None:
        yield
        return
    drawn = False

    def draw(*_args: object, **_kwargs: object) -> torch.Tensor:
        nonlocal drawn
        if drawn:
            raise ExportError(f"{type(scheduler).__name__} draws noise twice in a step. {ADVICE}")
        drawn = True
        return noise

    module.__dict__["randn_tensor"] = draw
    try:
        yield
    finally:
        module.__dict__["randn_tensor"] = real


def _array(tensor: Any) -> Array:
    array: Array = tensor[:, 0, 0].to(torch.float64).numpy()
    return array


def coefficients(run: Run, kind: str, initial_scale: float) -> tuple[tuple[SamplerStep, ...], float, bool]:
    """Every call's formula, read off unit vectors; how far the scheduler's own steps on random latents are from it; and
    whether all of them hold for latents that somebody else made, which no identity tells of.

    Both are rows of one trajectory, since a scheduler's steps take the time. Row 0 holds the unit vectors: coordinate j
    is X_j, calls + j is E_j, 2 calls + j is Z_j. The others are :class:`_Random`.
    """
    calls = len(run.timesteps)
    random = _Random(max(3 * calls, LEAST_NUMBERS), initial_scale, explodes=run.explodes)
    formulas: Array = np.zeros((calls, 2, calls))  # [call, X or E, index]
    steps, free = [], True
    for i in range(calls):
        latents, output, drawn = random.begin()
        latents[0, i] = output[0, calls + i] = drawn[0, 2 * calls + i] = 1.0
        seen, following = run.step(i, latents, output, drawn)
        formulas[i] = following[0, : 2 * calls].reshape(2, calls)
        noises = following[0, 2 * calls : 3 * calls]
        if not (np.isfinite(following[0]).all() and np.isfinite(seen[0]).all()):
            raise ExportError(
                f"diffusers gives values that are not finite in call {i} of {calls} when {kind} runs with "
                f"{run.steps} steps. Change the number of steps or the scheduler's options. {ADVICE}"
            )
        if np.delete(noises, i).any():
            raise ExportError(f"call {i} of {kind} reuses an earlier step's noise, and is not compiled. {ADVICE}")
        found = _window(formulas, i)
        if found is None:
            raise ExportError(
                f"call {i} of {kind} with {run.steps} steps needs more than the current and {HISTORY} "
                f"previous pairs of latents and outputs, and is not compiled. {ADVICE}"
            )
        window, used = found
        free = free and not used
        steps.append(
            SamplerStep(
                timestep=run.shown(i),
                input_scale=float(seen[0, i]),
                latents=tuple(window[0].tolist()),
                outputs=tuple(window[1].tolist()),
                noise=float(noises[i]),
            )
        )
        random.end(steps[i], seen[1:], following[1:])
    return tuple(steps), random.worst, free


def _window(formulas: Array, i: int) -> tuple[Array, int] | None:
    """Call i's coefficients [X or E, lag], over the current and at most HISTORY previous pairs, and how many identities
    they rest on.

    Tried first: the formula as it stands. Then the formula less multiples of the identities
    X_j - formula_{j-1} = 0, for j = i and if need be i-1 and i-2, the fewest that clear everything older
    than the window; the smallest window they clear. None when nothing does.
    """
    target = formulas[i]
    scale = np.abs(target).max()
    for used in range(min(i, HISTORY) + 1):
        identities = np.zeros((used, *target.shape))
        for a in range(used):
            identities[a] = -formulas[i - a - 1]
            identities[a, 0, i - a] += 1.0
        for lag in range(used, HISTORY + 1):
            first = max(i - lag, 0)
            tail = target[:, :first].ravel()
            weights = np.zeros(used)
            if used and tail.size:
                # Columns are the identities; min-norm where they depend on each other.
                weights = np.linalg.lstsq(identities[:, :, :first].reshape(used, -1).T, tail, rcond=1e-12)[0]
            cleared = target - np.tensordot(weights, identities, axes=1)
            left = np.abs(cleared[:, :first]).max(initial=0.0)
            if left <= TAIL * scale and np.abs(weights).max(initial=0.0) <= MAX_WEIGHT:
                window = np.zeros((2, HISTORY + 1))
                window[:, : i - first + 1] = cleared[:, first : i + 1][:, ::-1]
                return window, used
    return None


class _Random:
    """Random trajectories, one at each of :data:`MAGNITUDES`; ``worst``: how far their steps are from compiled ones.

    Each step is compared by itself, on the scheduler's own latents, relative to the largest of its terms: float32
    rounding inside the scheduler is of that size; or where noise ``explodes``, of the latents', most of which a step
    takes away.
    """

    def __init__(self, size: int, initial_scale: float, *, explodes: bool = False) -> None:
        self._explodes = explodes
        self._rng = np.random.default_rng(0)
        self._magnitudes = np.array(MAGNITUDES)[:, None]
        self._shape = (len(MAGNITUDES), size)
        self._latents = [initial_scale * self._normal()]
        self._outputs: list[Array] = []
        self._drawn: Array = np.zeros(self._shape)
        self.worst = 0.0

    def _normal(self) -> Array:
        return self._magnitudes * self._rng.standard_normal(self._shape)

    def begin(self) -> tuple[Array, Array, Array]:
        """The next step's latents, output and noise, [1 + magnitudes, size], with a row of zeros before them."""
        self._outputs.append(self._normal())
        self._drawn = self._normal()
        zeros = np.zeros((1, self._shape[1]))
        latents, output, drawn = (np.vstack([zeros, x]) for x in (self._latents[-1], self._outputs[-1], self._drawn))
        return latents, output, drawn

    def end(self, call: SamplerStep, seen: Array, following: Array) -> None:
        """What the scheduler made of it, which ``call`` says too."""
        expected = call.input_scale * self._latents[-1]
        terms = [c * x for c, x in zip(call.latents, reversed(self._latents), strict=False) if c]
        terms += [c * e for c, e in zip(call.outputs, reversed(self._outputs), strict=False) if c]
        terms.append(call.noise * self._drawn)
        inside = [self._latents[-1]] if self._explodes else []
        size = np.abs([following, *terms, *inside]).max(axis=(0, 2))
        differences = [
            np.abs(seen - expected).max(axis=1) / np.abs(expected).max(axis=1),
            np.abs(following - sum(terms)).max(axis=1) / size,
        ]
        self.worst = float(np.maximum(self.worst, np.max(differences)))  # keeps a nan, where max() may lose it
        self._latents.append(following)
