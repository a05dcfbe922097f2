"""A compiled sampler: its sum, its JSON, and what it refuses to be."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tgate_engine.errors import SamplerError, TgateError
from tgate_engine.reader import LARGEST_NUMBER, MOST_LETTERS
from tgate_engine.sampler import HISTORY, Sampler, SamplerStep, walk

PREDICTIONS = ("epsilon", "v_prediction", "sample")


def step(outputs: tuple[float, ...] = (0.5, 0.0, 0.0, 0.0)) -> SamplerStep:
    return SamplerStep(timestep=1.0, input_scale=1.0, latents=(1.0, 0.0, 0.0, 0.0), outputs=outputs)


def ten() -> Sampler:
    return Sampler(name="x", steps=10, initial_scale=1.0, calls=(step(),) * 10, lead_in=0, prediction_type="epsilon")


numbers = st.floats(-LARGEST_NUMBER, LARGEST_NUMBER)
words = st.text(min_size=1, max_size=MOST_LETTERS).filter(str.isprintable)


@st.composite
def samplers(draw: st.DrawFn) -> Sampler:
    steps, lead_in = draw(st.integers(1, 4)), draw(st.integers(0, 1))
    calls = []
    for i in range(steps + lead_in):
        exists = [j <= i for j in range(HISTORY + 1)]
        calls.append(
            SamplerStep(
                timestep=draw(numbers),
                input_scale=draw(numbers),
                latents=tuple(draw(numbers) if there else 0.0 for there in exists),
                outputs=tuple(draw(numbers) if there else 0.0 for there in exists),
                noise=draw(numbers),
            )
        )
    options = draw(st.dictionaries(words, numbers | st.text() | st.booleans() | st.none()))
    return Sampler(
        name=draw(words),
        steps=steps,
        initial_scale=draw(st.floats(1e-3, 1e3)),
        calls=tuple(calls),
        lead_in=lead_in,
        prediction_type=draw(st.sampled_from(PREDICTIONS)),
        options=options,
    )


@settings(max_examples=25, deadline=None)
@given(sampler=samplers())
def test_json_round_trip_is_exact(sampler: Sampler) -> None:
    again = Sampler.from_json(json.loads(json.dumps(sampler.to_json(), allow_nan=False)))
    assert again == sampler
    assert hash(again) == hash(sampler)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 9}, "9 steps and 0 lead-in calls needs 9 calls, got 10"),
        ({"steps": 0}, "steps .* at least 1, got 0"),
        ({"steps": True}, "steps .* got True"),
        ({"steps": 1001}, r"steps \(n\) must be at most 1000, got 1001"),
        ({"lead_in": -1}, "lead_in .* at least 0, got -1"),
        ({"lead_in": 2, "steps": 8}, "lead_in must be at most 1, got 2"),
        ({"name": ""}, "name must be a printable text"),
        ({"initial_scale": "1"}, "initial_scale must be a number, got '1'"),
        ({"initial_scale": 0.0}, "initial_scale must be above 0"),
        ({"initial_scale": 10**400}, "initial_scale must be finite"),
        ({"calls": None}, "calls must be a list"),
        ({"calls": [3] * 10}, "call 0: a call must be an object, got int"),
        ({"options": []}, "options must be an object"),
        ({"options": {"a": [1]}}, "fact a must be a text"),
        ({"extra": 1}, "unknown: 'extra'"),
    ],
)
def test_bad_json_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(SamplerError, match=message):
        Sampler.from_json({**ten().to_json(), **change})


def test_json_of_the_wrong_shape() -> None:
    with pytest.raises(SamplerError, match="a sampler must be an object, got list"):
        Sampler.from_json([])
    data = ten().to_json()
    del data["calls"][3]["timestep"]
    with pytest.raises(SamplerError, match=r"call 3: .*missing: timestep; unknown: none"):
        Sampler.from_json(data)
    assert issubclass(SamplerError, TgateError)


@pytest.mark.parametrize("values", [(1.0,), (1.0, 0.0, 0.0, float("nan")), (1.0, 0.0, 0.0, "0"), 1.0])
def test_a_step_checks_its_coefficients(values: Any) -> None:
    with pytest.raises(SamplerError, match="latents"):
        SamplerStep(timestep=1.0, input_scale=1.0, latents=values, outputs=(0.0, 0.0, 0.0, 0.0))


def test_a_step_cannot_read_what_does_not_exist_yet() -> None:
    late = SamplerStep(timestep=1.0, input_scale=1.0, latents=(1.0, 0.0, 0.5, 0.0), outputs=(0.0,) * 4)
    with pytest.raises(SamplerError, match="call 0 reads 2 pairs back, but only 0 exist before it"):
        Sampler(name="x", steps=1, initial_scale=1.0, calls=(late,), lead_in=0, prediction_type="epsilon")


def test_a_walk_by_hand() -> None:
    """x' = 2x + 3x_before + 5e + 7e_before + 11z, where e is the scaled latents plus the timestep."""
    first = SamplerStep(timestep=1.0, input_scale=0.5, latents=(2, 0, 0, 0), outputs=(5, 0, 0, 0), noise=11)
    second = SamplerStep(timestep=10.0, input_scale=1.0, latents=(2, 3, 0, 0), outputs=(5, 7, 0, 0))
    sampler = Sampler(name="x", steps=2, initial_scale=4.0, calls=(first, second), lead_in=0, prediction_type="epsilon")
    assert (sampler.stochastic, sampler.reach, first.lag, second.lag) == (True, 1, 0, 1)
    noise = np.array([1.0])
    states = walk(sampler, lambda x, t: x + t, noise, step_noise=lambda i: np.array([100.0 + i]))
    x0, e0 = 4.0, 4.0 * 0.5 + 1
    x1 = 2 * x0 + 5 * e0 + 11 * 100
    e1 = x1 + 10
    assert [float(state[0]) for state in states] == [x0, x1, 2 * x1 + 3 * x0 + 5 * e1 + 7 * e0]
    assert noise.tolist() == [1.0]
    with pytest.raises(SamplerError, match="call 0 needs step_noise"):
        walk(sampler, lambda x, t: x + t, noise)
