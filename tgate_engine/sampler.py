"""A sampler as numbers: each step is a fixed linear combination of recent latents and model outputs.

Every sampler in use (DDIM, Euler, DPM-Solver++, UniPC, PNDM, LMS, DEIS; LCM and Euler ancestral) computes

    x_{i+1} = sum_j latents[j] * x_{i-j} + sum_j outputs[j] * e_{i-j} + noise * z_i,    j = 0..3

where x_i are the latents before call i, e_i is the model's output in call i, after guidance, and z_i is
standard normal noise that only stochastic samplers use. The
coefficients depend on the noise schedule and the number of steps alone, so they are known at export. A
host evaluates one weighted sum per step and knows nothing of sigmas, lambdas or solver orders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tgate_engine.errors import SamplerError
from tgate_engine.reader import LARGEST_NUMBER, LARGEST_WHOLE, is_word

HISTORY = 3
"""How many pairs (latents, model output) before the current one a step may read."""

Fact = str | int | float | bool | None
"""A setting worth keeping for the reader."""
Model = Callable[[NDArray[Any], float], NDArray[Any]]
Noise = Callable[[int], NDArray[Any]]

MOST_STEPS = 1000
"""The most steps that a trajectory is asked for, and so the most of whatever is counted in steps. Networks are trained
on a thousand: no sampler is the better for more, and a plan names each of them."""
MOST_LEAD_IN = 1
"""How many calls a sampler may make before its first step; PNDM makes one."""
MOST_CALLS = MOST_STEPS + MOST_LEAD_IN
"""How many network calls a trajectory has at most, which is what a file may hold."""


def _number(value: object, what: str) -> float:
    """``value`` as a float, or SamplerError when it is not a finite number that float32 holds."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise SamplerError(f"{what} must be a number, got {value!r:.60}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not abs(number) <= LARGEST_NUMBER:
        raise SamplerError(f"{what} must be finite and a number of float32, got {number}")
    return number


def check_facts(facts: Mapping[str, Any]) -> Mapping[str, Fact]:
    """``facts`` where each is a text, a number, true, false or null. Raises :class:`SamplerError` otherwise."""
    for key, fact in facts.items():
        if not is_word(key):
            raise SamplerError(f"a fact's name must be printable and short, got {key!r:.60}")
        if isinstance(fact, float):
            if not math.isfinite(fact):
                raise SamplerError(f"fact {key} must be finite, got {fact}")
        elif isinstance(fact, int):
            if not -LARGEST_WHOLE - 1 <= fact <= LARGEST_WHOLE:
                raise SamplerError(f"fact {key} must be a whole number of 64 bits")
        elif fact is not None and not isinstance(fact, str):
            raise SamplerError(f"fact {key} must be a text, a number, true, false or null, got {fact!r:.60}")
    return facts


def _count(value: object, what: str, least: int, most: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise SamplerError(f"{what} must be a whole number of at least {least}, got {value!r:.60}")
    if value > most:
        raise SamplerError(f"{what} must be at most {most}, got {value if value <= LARGEST_WHOLE else 'more'}")
    return value


def _text(value: object, what: str) -> str:
    if not is_word(value):
        raise SamplerError(f"{what} must be a printable text that is neither empty nor long, got {value!r:.60}")
    assert isinstance(value, str)  # is_word has seen it
    return value


@dataclass(frozen=True, kw_only=True)
class SamplerStep:
    """The arithmetic around one network call.

    ``timestep``: what the network is told, in training steps (0..999 for Stable Diffusion); not always whole.
    ``input_scale``: the network sees ``latents * input_scale``.
    ``latents``: coefficients of x_i, x_{i-1}, x_{i-2}, x_{i-3}.
    ``outputs``: coefficients of e_i, e_{i-1}, e_{i-2}, e_{i-3}, the guided model outputs.
    A pair that does not exist yet has the coefficient 0.
    ``noise``: coefficient of z_i, the step's own standard normal noise; 0 in deterministic samplers.

    Raises :class:`SamplerError` on a wrong length or a number that is not finite.
    """

    timestep: float
    input_scale: float
    latents: tuple[float, ...]
    outputs: tuple[float, ...]
    noise: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "timestep", _number(self.timestep, "timestep"))
        object.__setattr__(self, "input_scale", _number(self.input_scale, "input_scale"))
        object.__setattr__(self, "noise", _number(self.noise, "noise"))
        for name in ("latents", "outputs"):
            values = getattr(self, name)
            if not isinstance(values, (tuple, list)) or len(values) != HISTORY + 1:
                raise SamplerError(f"{name} must hold {HISTORY + 1} coefficients, got {values!r:.60}")
            checked = tuple(_number(value, f"{name}[{j}]") for j, value in enumerate(values))
            object.__setattr__(self, name, checked)

    @property
    def lag(self) -> int:
        """How far back this step reads: 0 for the current pair only, at most HISTORY."""
        pairs = zip(self.latents, self.outputs, strict=True)
        return max((j for j, (latent, output) in enumerate(pairs) if latent or output), default=0)

    def to_json(self) -> dict[str, Any]:
        """This step as JSON values. Floats survive the round trip exactly."""
        return {
            "timestep": self.timestep,
            "input_scale": self.input_scale,
            "latents": list(self.latents),
            "outputs": list(self.outputs),
            "noise": self.noise,
        }


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """A whole sampler for one number of steps. Immutable and safe to share between threads.

    ``name``: what the user asked for, such as ``dpmpp_2m``.
    ``steps``: n, the inference steps the user asked for; where calls are forecast, those that are left of them.
    ``initial_scale``: standard normal noise times this is x_0 (diffusers calls it init_noise_sigma).
    ``calls``: one entry per network call, n of them or, for PNDM, n + 1.
    ``lead_in``: calls before the method's rules begin, ``len(calls) - steps``.
    ``prediction_type``: what the network predicts: ``epsilon``, ``v_prediction``, ``sample``, ``flow_prediction``, or
    ``unstated`` where the scheduler does not say. The coefficients already allow for it; it is kept for the reader.
    ``options``: where the numbers came from (scheduler class, noise schedule, measured residual).

    Raises :class:`SamplerError` when counts disagree or a step reads a pair that does not exist yet.
    """

    name: str
    steps: int
    initial_scale: float
    calls: tuple[SamplerStep, ...]
    lead_in: int
    prediction_type: str
    options: Mapping[str, Fact] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        _text(self.name, "the sampler's name")
        _text(self.prediction_type, "prediction_type")
        _count(self.steps, "steps (n)", 1, MOST_STEPS)
        _count(self.lead_in, "lead_in", 0, MOST_LEAD_IN)
        scale = _number(self.initial_scale, "initial_scale")
        if scale <= 0:
            raise SamplerError(f"initial_scale must be above 0, got {scale}")
        object.__setattr__(self, "initial_scale", scale)
        calls = tuple(self.calls)
        object.__setattr__(self, "calls", calls)
        if len(calls) != self.steps + self.lead_in:
            raise SamplerError(
                f"a sampler of {self.steps} steps and {self.lead_in} lead-in calls needs "
                f"{self.steps + self.lead_in} calls, got {len(calls)}"
            )
        for i, call in enumerate(calls):
            if not isinstance(call, SamplerStep):
                raise SamplerError(f"call {i} must be a SamplerStep, got {type(call).__name__}")
            if call.lag > i:
                raise SamplerError(f"call {i} reads {call.lag} pairs back, but only {i} exist before it")
        check_facts(self.options)

    @property
    def stochastic(self) -> bool:
        """Whether some step draws noise of its own."""
        return any(call.noise for call in self.calls)

    @property
    def reach(self) -> int:
        """How many pairs before the current one some step reads, at most HISTORY."""
        return max(call.lag for call in self.calls)

    def to_json(self) -> dict[str, Any]:
        """This sampler as JSON values; :meth:`from_json` gives back an equal one."""
        return {
            "name": self.name,
            "steps": self.steps,
            "initial_scale": self.initial_scale,
            "lead_in": self.lead_in,
            "prediction_type": self.prediction_type,
            "options": dict(self.options),
            "calls": [call.to_json() for call in self.calls],
        }

    @classmethod
    def from_json(cls, data: object) -> Sampler:
        """Reads what :meth:`to_json` wrote. Raises :class:`SamplerError` naming the part that is wrong."""
        fields = _fields(
            data,
            "sampler",
            ("name", "steps", "initial_scale", "lead_in", "prediction_type", "options", "calls"),
        )
        if not isinstance(fields["calls"], list):
            raise SamplerError(f"a sampler's calls must be a list, got {type(fields['calls']).__name__}")
        if not isinstance(fields["options"], dict):
            raise SamplerError(f"a sampler's options must be an object, got {fields['options']!r:.60}")
        calls = []
        for i, call in enumerate(fields["calls"]):
            try:
                step = _fields(call, "call", ("timestep", "input_scale", "latents", "outputs", "noise"))
                calls.append(SamplerStep(**step))
            except SamplerError as error:
                raise SamplerError(f"call {i}: {error}") from None
        return cls(**{**fields, "calls": tuple(calls)})


def _fields(data: object, what: str, names: tuple[str, ...]) -> dict[str, Any]:
    """``data`` as a dict with exactly the keys ``names``."""
    if not isinstance(data, dict):
        raise SamplerError(f"a {what} must be an object, got {type(data).__name__}")
    missing = [name for name in names if name not in data]
    unknown = [f"{name!r:.60}" for name in data if name not in names][:4]
    if missing or unknown:
        raise SamplerError(
            f"a {what} holds {', '.join(names)}; missing: {', '.join(missing) or 'none'}; "
            f"unknown: {', '.join(unknown) or 'none'}. Export the bundle again."
        )
    return dict(data)


def walk(
    sampler: Sampler,
    model: Model,
    noise: NDArray[Any],
    *,
    step_noise: Noise | None = None,
    dtype: DTypeLike = np.float64,
) -> list[NDArray[Any]]:
    """Runs a sampler in numpy: the slow, readable reference for every faster evaluation.

    ``model``: takes the scaled latents and the timestep, returns the (guided) output, of the same shape.
    ``noise``: standard normal, any shape; it is multiplied by ``initial_scale`` here. Not written to.
    ``step_noise``: z_i for call i, of the same shape; needed by stochastic samplers only.
    ``dtype``: the arithmetic's type; float32 shows what an engine would give.

    Returns x_0 .. x_N, N = ``len(sampler.calls)``; the last entry is the result.
    """
    latents = [np.asarray(noise, dtype) * sampler.initial_scale]
    outputs: list[NDArray[Any]] = []
    for i, call in enumerate(sampler.calls):
        outputs.append(np.asarray(model(latents[i] * call.input_scale, call.timestep), dtype))
        following = np.zeros_like(latents[0])
        for j in range(min(i, HISTORY) + 1):
            following += call.latents[j] * latents[i - j] + call.outputs[j] * outputs[i - j]
        if call.noise:
            if step_noise is None:
                raise SamplerError(f"sampler {sampler.name!r} is stochastic: call {i} needs step_noise")
            following += call.noise * np.asarray(step_noise(i), dtype)
        latents.append(following)
    return latents
