"""Names of samplers: those that are refused have a reason, and something to take instead that is one."""

from __future__ import annotations

import re

import diffusers
import pytest

from tgate_engine.errors import ExportError
from tgate_export.recipes import SAMPLERS, check_sampler


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_sampler_that_is_one(name: str) -> None:
    check_sampler(name)
    assert hasattr(diffusers, SAMPLERS[name].scheduler)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("heun", "calls the network twice"),
        ("HeunDiscreteScheduler", "calls the network twice"),
        ("dpm++_2s_a", "calls the network twice"),
        ("DPM++ 2M SDE Karras", "draws noise in every step"),
        ("dpmpp_sde", "draws noise in every step"),
        ("ddpm", "draws noise in every step"),
    ],
)
def test_a_sampler_that_is_known_and_refused_has_its_reason(name: str, why: str) -> None:
    with pytest.raises(ExportError, match=why) as error:
        check_sampler(name)
    instead = re.search(r"; take (.*?)\. Known", str(error.value))
    assert instead is not None
    assert set(re.findall(r"[a-z_0-9]{3,}", instead[1])) <= SAMPLERS.keys()


def test_heun_does_call_the_network_twice() -> None:
    """The reason is diffusers' own: as many timesteps as network calls, two for each step but the last."""
    scheduler = diffusers.HeunDiscreteScheduler()
    scheduler.set_timesteps(10)
    assert len(scheduler.timesteps) == 19


@pytest.mark.parametrize(("name", "near"), [("eulr", "'euler'"), ("dpmpp2m", "'dpmpp_2m'"), ("\x1b[2J", "Known")])
def test_a_sampler_that_nobody_knows(name: str, near: str) -> None:
    with pytest.raises(ExportError, match="there is no sampler ") as error:
        check_sampler(name)
    assert near in str(error.value)
    assert str(error.value).isprintable()
