"""Starts are what diffusers does from the middle of a trajectory, with every sampler there is."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch

from tests.contract.test_sampler_tables import SDXL
from tgate_engine.errors import ExportError
from tgate_engine.sampler import walk
from tgate_engine.starts import STARTS
from tgate_export.sampling import SAMPLERS, compile_sampler, drawing, make_scheduler
from tgate_export.starts import compile_starts, starts_of

STEPS = 12
FREE = {name: name not in ("unipc", "pndm") for name in SAMPLERS if name != "scm"}
"""Whether somebody else may change latents between two steps: UniPC corrects what it has itself made, and PNDM keeps
the first output of all."""

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore:__array:DeprecationWarning")


@pytest.mark.parametrize("name", FREE)
def test_from_every_step_on_as_diffusers_does(name: str) -> None:
    """Its own scheduler, its begin index set as pipelines set it, on a network that is no straight line."""
    scheduler, whole = make_scheduler(name, SDXL), compile_sampler(name, SDXL, STEPS)
    starts = starts_of(scheduler, whole)
    rng = np.random.default_rng(5)
    picture, noise = rng.standard_normal((2, 1, 4, 3, 3))
    drawn = rng.standard_normal((len(whole.calls), 1, 4, 3, 3))
    assert [start.begin for start in starts] == [*range(len(whole.calls))]
    for start in starts[: STEPS - 1 : 2]:
        own = copy.deepcopy(scheduler)
        own.set_timesteps(STEPS)
        timesteps = own.timesteps[start.begin :]
        if hasattr(own, "set_begin_index"):
            own.set_begin_index(start.begin)
        first = own.add_noise(torch.from_numpy(picture), torch.from_numpy(noise), timesteps[:1])
        latents, seen = first, list[int]()
        for i, timestep in enumerate(timesteps):
            output = _network(own.scale_model_input(latents, timestep).numpy(), float(timestep))
            with drawing(own, torch.from_numpy(drawn[i])):
                latents = own.step(torch.from_numpy(output), timestep, latents, return_dict=False)[0]
            seen.append(i)
        np.testing.assert_allclose(
            np.float64(start.levels[0][0]) * picture + start.levels[0][1] * noise, first.numpy(), rtol=0, atol=1e-5
        )
        walked = walk(start.sampler(whole), _network, first.numpy(), step_noise=lambda i: drawn[i])
        scale = np.abs(latents.numpy()).max()
        assert np.abs(walked[-1] - latents.numpy()).max() / scale < 1e-5, (name, start.begin)


@pytest.mark.parametrize("name", FREE)
def test_whether_latents_may_be_replaced(name: str) -> None:
    starts = starts_of(make_scheduler(name, SDXL), compile_sampler(name, SDXL, STEPS))
    assert {start.free for start in starts} == {FREE[name]}


def test_a_bundle_has_those_of_its_own_sampler_and_one_number_of_steps_of_others() -> None:
    own, other = compile_sampler("euler", SDXL, 7), compile_sampler("ddim", SDXL, 25)
    samplers = [own, other, compile_sampler("ddim", SDXL, 10), compile_sampler("euler", SDXL, 11)]
    tables = compile_starts(samplers, own, SDXL)
    assert {name: len(rows) for name, rows in tables.items()} == {f"euler.7{STARTS}": 7, f"ddim.25{STARTS}": 25}


def test_what_never_becomes_the_whole_trajectory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A scheduler that counts its steps from the beginning, whatever it is told."""
    scheduler, whole = make_scheduler("euler", SDXL), compile_sampler("ddim", SDXL, STEPS)
    with pytest.raises(ExportError, match="takes another way from step"):
        starts_of(scheduler, whole)


def _network(latents: Any, timestep: float) -> Any:
    return np.sin(3 * latents) * 0.7 + np.cos(timestep / 100) * 0.2
