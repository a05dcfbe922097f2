"""Folded samplers, against the whole sampler walked with a network that extrapolates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.export.test_sampling import NOISE, SDXL, model
from tgate_engine.errors import MethodError
from tgate_engine.sampler import walk
from tgate_export.methods.base import Settings
from tgate_export.methods.forecast.fold import FORECAST_OF, forecast
from tgate_export.sampling import SAMPLERS, compile_sampler

STOCHASTIC = ("lcm", "euler_a", "scm")


class Extrapolating:
    """The stand-in network, called at the steps that are not left out; at others the line through its last two
    outputs."""

    def __init__(self, left_out: tuple[int, ...]) -> None:
        self._left_out, self._step = left_out, -1
        self._seen: list[tuple[int, NDArray[Any]]] = []

    def __call__(self, latents: NDArray[Any], timestep: float) -> NDArray[Any]:
        self._step += 1
        if self._step not in self._left_out:
            self._seen.append((self._step, model(latents, timestep)))
            return self._seen[-1][1]
        if len(self._seen) == 1:
            return self._seen[0][1]
        (before, first), (at, last) = self._seen[-2:]
        return np.asarray(last + (last - first) * (self._step - at) / (at - before))


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name not in STOCHASTIC])
@pytest.mark.parametrize(("steps", "gate", "interval"), [(10, 4, 2), (12, 1, 3), (25, 10, 2), (9, 5, 4), (7, 1, 5)])
def test_a_folded_sampler_is_the_whole_one_with_forecasts(sampler: str, steps: int, gate: int, interval: int) -> None:
    whole = compile_sampler(sampler, SDXL, steps)
    left_out = Settings(steps=steps, gate=gate, forecast_interval=interval).left_out(whole.lead_in)
    network = Extrapolating(left_out)
    want = walk(whole, network, NOISE)
    folded = forecast(whole, left_out)
    assert len(folded.calls) == len(whole.calls) - len(left_out)
    assert (folded.options[FORECAST_OF], folded.name) == (steps, sampler)
    asked: list[float] = []

    def counted(latents: NDArray[Any], timestep: float) -> NDArray[Any]:
        asked.append(timestep)
        return model(latents, timestep)

    got = walk(folded, counted, NOISE)
    assert asked == [call.timestep for i, call in enumerate(whole.calls) if i not in left_out]
    np.testing.assert_allclose(got[-1], want[-1], rtol=1e-9, atol=1e-9)
    made = [i for i in range(len(whole.calls)) if i not in left_out]
    for own, i in enumerate(made):
        np.testing.assert_allclose(got[own], want[i], rtol=1e-9, atol=1e-9)
    # The test could fail: without forecasts it is another trajectory.
    assert np.abs(got[-1] - walk(whole, model, NOISE)[-1]).max() > 1e-4


def test_nothing_left_out_is_the_same_sampler() -> None:
    whole = compile_sampler("dpmpp_2m", SDXL, 8)
    assert forecast(whole, ()) is whole


@pytest.mark.parametrize("name", STOCHASTIC)
def test_a_sampler_that_draws_noise_is_refused(name: str) -> None:
    config = {"_class_name": "SCMScheduler"} if name == "scm" else SDXL
    with pytest.raises(MethodError, match=f"sampler {name} draws noise in every step"):
        forecast(compile_sampler(name, config, 8), (5, 7))


def test_the_first_call_is_never_left_out() -> None:
    whole = compile_sampler("ddim", SDXL, 8)
    for left_out in ((0, 2), (8,)):
        with pytest.raises(ValueError, match="calls 1 to 7 may be left out"):
            forecast(whole, left_out)


def test_coefficients_that_float32_could_not_bear_are_refused_for_what_they_are() -> None:
    """DDIM never looks further back than a step; one line through two outputs, 49 steps on, is a sum of large parts."""
    whole = compile_sampler("ddim", SDXL, 50)
    with pytest.raises(
        MethodError, match=r"48 network calls in a row left out .* coefficients above 100; take a small"
    ):
        forecast(whole, range(2, 50))
    assert len(forecast(whole, range(2, 20)).calls) == 32
