"""Compiled samplers against the diffusers schedulers they come from, and against the papers' formulas."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Mapping
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from tgate_engine.errors import ExportError
from tgate_engine.sampler import Sampler, walk
from tgate_export import sampling
from tgate_export.sampling import (
    OTHER_STEPS,
    OWN_STEPS,
    SAMPLERS,
    compile_sampler,
    compile_scheduler,
    compile_tables,
    make_scheduler,
)

Array = NDArray[np.float64]

# The facts of Stable Diffusion XL's own scheduler configuration.
SDXL: Mapping[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "prediction_type": "epsilon",
}
SPACINGS = ("leading", "linspace", "trailing")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
STEPS = (1, 2, 3, 4, 5, 10, 25, 50)

BETAS = tuple(name for name in SAMPLERS if name != "scm")
"""Those that know networks whose noise is a table of betas."""

# These schedulers round their latents to float32 in every step, and so drift from the exact recurrence.
ROUNDING = ("euler", "euler_a", "lcm", "dpmpp_2m", "dpmpp_2m_karras", "dpmpp_3m")

# torch scalars in numpy functions, inside diffusers.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore:__array:DeprecationWarning")

NOISE = np.random.default_rng(7).standard_normal((2, 4, 4, 4))


def model(latents: NDArray[Any], timestep: float) -> NDArray[Any]:
    """A stand-in network: not linear, mixes neighbours, depends on the timestep. Any [B, C, H, W]."""
    mixed = 0.9 * latents + 0.4 * np.roll(latents, 1, axis=-1) - 0.2 * np.roll(latents, 1, axis=1)
    return np.asarray(np.tanh(mixed) + 0.1 * np.sin(latents + timestep / 300.0), latents.dtype)


def diffusers_walk(scheduler: Any, steps: int, dtype: Any = torch.float64) -> list[Array]:
    """The loop of every diffusers pipeline: x_0 .. x_N."""
    scheduler.set_timesteps(steps)
    latents = torch.from_numpy(NOISE).to(dtype) * scheduler.init_noise_sigma
    trajectory = [latents.numpy().astype(np.float64)]
    module = sys.modules[type(scheduler).__module__]
    for i, timestep in enumerate(scheduler.timesteps):
        seen = scheduler.scale_model_input(latents, timestep)
        output = torch.from_numpy(model(seen.numpy(), float(timestep)))
        noise = torch.from_numpy(step_noise(i)).to(dtype)
        with mock.patch.object(module, "randn_tensor", lambda *_, noise=noise, **__: noise, create=True):
            latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
        trajectory.append(latents.numpy().astype(np.float64))
    return trajectory


def step_noise(i: int) -> Array:
    """What a stochastic sampler draws in step i."""
    return np.random.default_rng((9, i)).standard_normal(NOISE.shape)


def compiled_walk(sampler: Sampler, dtype: Any = np.float64) -> list[Array]:
    return walk(sampler, model, NOISE, step_noise=step_noise, dtype=dtype)


def difference(got: list[Array], wanted: list[Array]) -> float:
    """Largest relative difference over all the latents of two trajectories."""
    assert len(got) == len(wanted)
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(got, wanted, strict=True))


def tolerance(name: str, steps: int) -> float:
    return max(1e-6, 5e-8 * steps) if name in ROUNDING else 1e-11


def config(**options: Any) -> dict[str, Any]:
    return {**SDXL, **options}


@functools.cache
def compiled(name: str, steps: int) -> Sampler:
    return compile_sampler(name, SDXL, steps)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("name", BETAS)
def test_every_latent_equals_diffusers(name: str, spacing: str, prediction: str) -> None:
    base = config(timestep_spacing=spacing, prediction_type=prediction)
    for steps in STEPS:
        # diffusers integrates LMS's coefficients by quadrature, which takes seconds.
        if steps > (10 if name == "lms" else 25) and (spacing, prediction) != ("leading", "epsilon"):
            continue
        if name in ("pndm", "euler_a") and prediction == "sample":
            with pytest.raises(ExportError, match=r"cannot run (PNDM|EulerAncestralDiscrete)Scheduler with \d+ steps"):
                compile_sampler(name, base, steps)
            continue
        sampler = compile_sampler(name, base, steps)
        wanted = diffusers_walk(make_scheduler(name, base), steps)
        assert difference(compiled_walk(sampler), wanted) < tolerance(name, steps), steps
        single = compiled_walk(sampler, np.float32)
        assert single[-1].dtype == np.float32
        assert difference(single, wanted) < 1e-4, steps


@pytest.mark.parametrize("name", BETAS)
def test_float32_equals_float32_diffusers(name: str) -> None:
    wanted = diffusers_walk(make_scheduler(name, SDXL), 25, torch.float32)
    assert difference(compiled_walk(compiled(name, 25), np.float32), wanted) < 1e-4


@pytest.mark.parametrize("name", BETAS)
def test_calls_lead_in_and_facts(name: str) -> None:
    sampler = compiled(name, 25)
    assert (sampler.name, sampler.steps, sampler.prediction_type) == (name, 25, "epsilon")
    assert (len(sampler.calls), sampler.lead_in) == ((26, 1) if name == "pndm" else (25, 0))
    assert sampler.options["scheduler"] == SAMPLERS[name].scheduler
    assert sampler.options["beta_end"] == 0.012
    # Small coefficients are what keeps float32 accurate.
    assert max(abs(c) for call in sampler.calls for c in call.latents + call.outputs) < 15


@pytest.mark.parametrize(
    ("name", "lag"),
    [("ddim", 0), ("euler", 0), ("dpmpp_2m", 1), ("dpmpp_3m", 2), ("deis", 1), ("pndm", 3), ("lms", 3)],
)
def test_a_step_reads_no_further_back_than_its_paper_says(name: str, lag: int) -> None:
    assert max(call.lag for call in compiled(name, 25).calls) == lag


def test_pndm_without_history_makes_one_call() -> None:
    sampler = compiled("pndm", 1)
    assert (len(sampler.calls), sampler.lead_in) == (1, 0)


def test_a_long_trajectory_compiles() -> None:
    sampler = compile_sampler("unipc", SDXL, 250)
    assert len(sampler.calls) == 250
    assert difference(compiled_walk(sampler), diffusers_walk(make_scheduler("unipc", SDXL), 250)) < 1e-11


@pytest.mark.parametrize(
    "options",
    [
        {"solver_order": 3},
        {"solver_type": "bh1", "final_sigmas_type": "sigma_min"},
        {"use_karras_sigmas": True},
        {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
        {"predict_x0": False, "final_sigmas_type": "sigma_min"},
        {"disable_corrector": [0, 3]},
    ],
)
def test_unipc_variants(options: dict[str, Any]) -> None:
    scheduler = diffusers.UniPCMultistepScheduler.from_config(config(**options))
    sampler = compile_scheduler(scheduler, 12, name="variant")
    assert difference(compiled_walk(sampler), diffusers_walk(scheduler, 12)) < 1e-11


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m", "unipc"])
def test_zero_terminal_snr(name: str) -> None:
    base = config(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="v_prediction")
    sampler = compile_sampler(name, base, 10)
    # Sigma starts at 4096, and the scheduler's own float32 rounding grows with it.
    assert difference(compiled_walk(sampler), diffusers_walk(make_scheduler(name, base), 10)) < 1e-4


# Formulas written from the papers, in float64 throughout. diffusers computes them in float32.


def noise_levels(timesteps: list[int]) -> tuple[Array, Array]:
    """alpha and sigma of the variance-preserving process at these training steps."""
    betas = np.linspace(SDXL["beta_start"] ** 0.5, SDXL["beta_end"] ** 0.5, 1000) ** 2
    squares = np.cumprod(1.0 - betas)[timesteps]
    return np.sqrt(squares), np.sqrt(1.0 - squares)


def test_ddim_is_equation_12_of_its_paper() -> None:
    steps = 10
    timesteps = [100 * i + 1 for i in reversed(range(steps))]
    alpha, sigma = noise_levels([*timesteps, 0])  # "set_alpha_to_one": false ends at training step 0
    x = NOISE
    trajectory = [x]
    for i, timestep in enumerate(timesteps):
        noise = model(x, timestep)
        clean = (x - sigma[i] * noise) / alpha[i]
        x = alpha[i + 1] * clean + sigma[i + 1] * noise
        trajectory.append(x)
    sampler = compiled("ddim", steps)
    assert [call.timestep for call in sampler.calls] == timesteps
    assert difference(compiled_walk(sampler), trajectory) < 2e-5


def test_dpmpp_2m_is_algorithm_2_of_its_paper() -> None:
    steps = 20
    timesteps = [int(t) for t in np.linspace(0, 999, steps + 1).round()[:0:-1]]
    alpha, sigma = noise_levels(timesteps)
    log_snr = np.log(alpha / sigma)
    x, cleans = NOISE, []
    trajectory = [x]
    for i, timestep in enumerate(timesteps):
        cleans.append((x - sigma[i] * model(x, timestep)) / alpha[i])
        if i == steps - 1:  # to sigma = 0: the first-order step gives the clean image itself
            x = cleans[i]
        else:
            h = log_snr[i + 1] - log_snr[i]
            blend = cleans[i]
            if i > 0:
                r = (log_snr[i] - log_snr[i - 1]) / h
                blend = (1 + 1 / (2 * r)) * cleans[i] - 1 / (2 * r) * cleans[i - 1]
            x = sigma[i + 1] / sigma[i] * x - alpha[i + 1] * np.expm1(-h) * blend
        trajectory.append(x)
    sampler = compile_sampler("dpmpp_2m", config(timestep_spacing="linspace"), steps)
    assert [call.timestep for call in sampler.calls] == timesteps
    assert difference(compiled_walk(sampler), trajectory) < 2e-5


def test_euler_by_hand() -> None:
    sampler = compiled("euler", 4)
    alpha, sigma = noise_levels([751, 501, 251, 1])
    levels = [*(sigma / alpha), 0.0]
    assert sampler.initial_scale == pytest.approx(np.sqrt(levels[0] ** 2 + 1), rel=1e-5)
    for i, call in enumerate(sampler.calls):
        assert call.input_scale == pytest.approx(1 / np.sqrt(levels[i] ** 2 + 1), rel=1e-5)
        assert call.latents == (1, 0, 0, 0)
        assert call.outputs[0] == pytest.approx(levels[i + 1] - levels[i], rel=1e-5)


# What is refused, and whether the reason can be understood.


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    with pytest.raises(ExportError, match=r"no sampler 'dpm\+\+_2m'. Did you mean 'dpmpp_2m'\? Known.*unipc"):
        compile_sampler("dpm++_2m", SDXL, 10)
    with pytest.raises(ExportError, match=r"no sampler 'zzz'. Known samplers: ddim"):
        make_scheduler("zzz", SDXL)


@pytest.mark.parametrize("key", ["clip_sample", "thresholding"])
def test_clipping_is_refused(key: str) -> None:
    with pytest.raises(ExportError, match=f"DDIMScheduler has {key}=True, which is not linear.*set {key} to"):
        compile_sampler("ddim", config(**{key: True}), 10)


def test_thresholding_is_refused_for_dpmpp() -> None:
    with pytest.raises(ExportError, match="DPMSolverMultistepScheduler has thresholding=True"):
        compile_sampler("dpmpp_2m", config(thresholding=True), 10)


def test_an_option_of_another_class_is_not_read() -> None:
    # Euler has no clip_sample: users of diffusers get no clipping from it, whatever the checkpoint says.
    assert compile_sampler("euler", config(clip_sample=True), 4).calls == compiled("euler", 4).calls


def test_ddim_does_not_clip_when_the_checkpoint_is_silent() -> None:
    silent = {key: value for key, value in SDXL.items() if key != "clip_sample"}
    sampler = compile_sampler("ddim", silent, 10)
    assert sampler.calls == compiled("ddim", 10).calls
    assert sampler.options["clip_sample"] is False
    with pytest.raises(ExportError, match="clip_sample=True"):  # the class's own default
        compile_scheduler(diffusers.DDIMScheduler(), 10, name="ddim")


def test_stochastic_solvers_are_refused() -> None:
    sde = diffusers.DPMSolverMultistepScheduler.from_config(config(algorithm_type="sde-dpmsolver++"))
    with pytest.raises(ExportError, match=r"algorithm_type='sde-dpmsolver\+\+', which draws noise"):
        compile_scheduler(sde, 10, name="sde")
    for kind in (
        "DDPMScheduler",
        "KDPM2AncestralDiscreteScheduler",
    ):
        with pytest.raises(ExportError, match=f"{kind} draws noise in every step.*Choose one of"):
            compile_scheduler(getattr(diffusers, kind).from_config(config()), 10, name="noisy")


def test_what_the_options_do_not_tell_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "refuse_options", lambda scheduler: None)
    for scheduler in (
        diffusers.DDIMScheduler.from_config(config(clip_sample=True)),
        diffusers.DPMSolverMultistepScheduler.from_config(config(thresholding=True)),
    ):
        with pytest.raises(ExportError, match="is not linear in its latents and outputs: with 6 steps it diff"):
            compile_scheduler(scheduler, 6, name="unnoticed")


def test_learned_variance_is_refused() -> None:
    with pytest.raises(ExportError, match=r"variance_type='learned_range'.*Set variance_type to null"):
        compile_sampler("dpmpp_2m", config(variance_type="learned_range"), 10)


def test_two_calls_per_step_are_refused() -> None:
    with pytest.raises(ExportError, match="HeunDiscreteScheduler calls the network 19 times for 10 steps"):
        compile_scheduler(diffusers.HeunDiscreteScheduler.from_config(config()), 10, name="heun")


def test_a_call_too_many_is_refused() -> None:
    # "trailing" counts down from 1000 in steps of 1000/61, and rounding leaves room for one more.
    with pytest.raises(ExportError, match="DDIMScheduler calls the network 62 times for 61 steps"):
        compile_sampler("ddim", config(timestep_spacing="trailing"), 61)


def test_more_history_than_the_recurrence_keeps_is_refused() -> None:
    class Long(diffusers.DDIMScheduler):
        """Adds the output of six calls ago to the latents."""

        def step(self, model_output: Any, timestep: Any, sample: Any, **options: Any) -> Any:
            self.past = [*getattr(self, "past", []), model_output]
            following = super().step(model_output, timestep, sample, return_dict=False)[0]
            return (following + self.past[-7:][0],)

    with pytest.raises(ExportError, match=r"call \d+ of Long with 12 steps needs more than the current and 3"):
        compile_scheduler(Long.from_config(config()), 12, name="long")


def test_the_scheduler_of_a_flow_matching_checkpoint_compiles() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    sampler = compile_scheduler(scheduler, 10, name="flow")
    assert (sampler.initial_scale, sampler.prediction_type) == (1.0, "flow_prediction")
    assert all(call.latents == (1, 0, 0, 0) for call in sampler.calls)


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "unipc", "pndm", "lms", "deis"])
def test_steps_that_diffusers_cannot_run_are_refused(name: str) -> None:
    # "leading" with an offset of 1 runs past the last training step, or repeats one step for ever.
    with pytest.raises(ExportError, match=r"diffusers (cannot run|gives values that are not finite).*1000"):
        compile_sampler(name, SDXL, 1000)


@pytest.mark.parametrize("steps", [0, -1, 2.5, True, 1001, 10**400])
def test_a_number_of_steps_must_be_one_that_a_sampler_takes(steps: Any) -> None:
    with pytest.raises(ExportError, match="whole number from 1 to 1000, got"):
        compile_sampler("ddim", SDXL, steps)


def test_a_configuration_that_diffusers_refuses() -> None:
    with pytest.raises(ExportError, match=r"cannot make a \w+Scheduler.*NotImplemented"):
        compile_sampler("ddim", config(beta_schedule="no such schedule"), 10)


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from([name for name in BETAS if name != "lms"]),
    steps=st.integers(1, 40),
    spacing=st.sampled_from(SPACINGS),
    prediction=st.sampled_from(PREDICTIONS),
    offset=st.integers(0, 1),
    schedule=st.sampled_from(["linear", "scaled_linear", "squaredcos_cap_v2"]),
    karras=st.booleans(),
)
def test_a_sampler_equals_diffusers_or_diffusers_fails(
    name: str, steps: int, spacing: str, prediction: str, offset: int, schedule: str, karras: bool
) -> None:
    base = config(
        timestep_spacing=spacing,
        prediction_type=prediction,
        steps_offset=offset,
        beta_schedule=schedule,
        use_karras_sigmas=karras,
    )
    try:
        wanted = diffusers_walk(make_scheduler(name, base), steps)
    except (ValueError, IndexError, AssertionError, NotImplementedError):
        wanted = []
    if not wanted or not np.isfinite(wanted[-1]).all():
        with pytest.raises(ExportError, match="diffusers"):
            compile_sampler(name, base, steps)
        return
    got = compiled_walk(compile_sampler(name, base, steps))
    # The cosine schedule ends at sigma = 1e3 and more, where float32 rounding inside diffusers shows.
    assert difference(got, wanted) < (1e-4 if schedule == "squaredcos_cap_v2" else tolerance(name, steps))


def test_compiled_samplers_survive_json() -> None:
    for name in ("unipc", "pndm"):
        sampler = compiled(name, 10)
        assert Sampler.from_json(json.loads(json.dumps(sampler.to_json(), allow_nan=False))) == sampler


def test_tables_are_what_compiling_each_gives() -> None:
    tables = {(sampler.name, sampler.steps): sampler for sampler in compile_tables("ddim", SDXL)}
    assert {steps for name, steps in tables if name == "ddim"} == set(OWN_STEPS)
    for name in BETAS:
        steps = [n for own, n in tables if own == name]
        assert set(steps) >= set(OTHER_STEPS), name
        assert tables[name, 20] == compile_sampler(name, SDXL, 20)


def test_tables_leave_out_what_cannot_be_compiled() -> None:
    """PNDM knows no network that predicts the sample; LMS does."""
    names = {sampler.name for sampler in compile_tables("euler", config(prediction_type="sample"))}
    assert "pndm" not in names
    assert {"euler", "lms"} <= names
