"""What a checkpoint's scheduler says of its training is followed, or refused by name: never filtered."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from numpy.typing import NDArray

from tests.export.test_sampling import (
    NOISE,
    SDXL,
    compiled_walk,
    config,
    difference,
    diffusers_walk,
    model,
    step_noise,
)
from tgate_engine.errors import ExportError
from tgate_export.recipes import SAMPLERS
from tgate_export.sampling import compile_sampler, drawing
from tgate_export.schedulers import (
    TRAINED_UNDER,
    TRAINED_UNDER_EDM,
    TRAINED_UNDER_FLOW,
    TRAINED_UNDER_TRIG,
    TRAINING,
    make_scheduler,
    size_shift,
)

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers", "ignore:__array:DeprecationWarning")

PLAYGROUND = diffusers.EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
COSXL = diffusers.EDMEulerScheduler(sigma_min=0.002, sigma_max=120.0, sigma_data=1.0, prediction_type="v_prediction")
ROUNDED = 1e-5
"""EDM's schedulers and Euler's step in float32, whatever they are given."""


def saved(scheduler: Any, **changes: Any) -> dict[str, Any]:
    """Its configuration as a file holds it."""
    stated = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    return {**stated, "_class_name": type(scheduler).__name__, **changes}


@pytest.mark.parametrize("steps", [1, 2, 6, 20])
@pytest.mark.parametrize("own", [PLAYGROUND, COSXL], ids=["playground", "cosxl"])
@pytest.mark.parametrize("name", ["euler", "dpmpp_2m", "dpmpp_2m_karras", "dpmpp_3m"])
def test_edm_checkpoints_sample_as_their_schedulers_do(name: str, own: Any, steps: int) -> None:
    sampler = compile_sampler(name, saved(own), steps)
    cls = diffusers.EDMEulerScheduler if name == "euler" else diffusers.EDMDPMSolverMultistepScheduler
    options = {} if name == "euler" else {"solver_order": 3 if name == "dpmpp_3m" else 2}
    want = cls.from_config(own.config, **options)
    assert difference(compiled_walk(sampler), diffusers_walk(want, steps)) < ROUNDED
    want.set_timesteps(steps)
    assert [call.timestep for call in sampler.calls] == pytest.approx(want.timesteps.tolist(), abs=1e-6)
    assert sampler.initial_scale == pytest.approx((own.config.sigma_max**2 + 1) ** 0.5)


@pytest.mark.parametrize("change", [{"sigma_max": 40.0}, {"sigma_min": 0.01}, {"sigma_data": 1.0}, {"rho": 5.0}])
def test_every_number_of_edm_counts(change: dict[str, float]) -> None:
    assert (
        compile_sampler("dpmpp_2m", saved(PLAYGROUND, **change), 6).calls
        != compile_sampler("dpmpp_2m", saved(PLAYGROUND), 6).calls
    )


@pytest.mark.parametrize("name", sorted(name for name, recipe in SAMPLERS.items() if recipe.edm is None))
def test_samplers_that_know_no_edm_are_refused(name: str) -> None:
    with pytest.raises(ExportError, match=r"EDMEulerScheduler.*Choose one of euler, dpmpp_2m"):
        compile_sampler(name, saved(COSXL), 6)


KARRAS = diffusers.EulerDiscreteScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule="scaled_linear",
    use_karras_sigmas=True,
    sigma_min=0.05,
    sigma_max=9.0,
)


@pytest.mark.parametrize("name", ["euler", "dpmpp_2m_karras", "unipc", "deis"])
def test_ends_of_a_karras_ladder_are_followed(name: str) -> None:
    """Two of these classes list no such option, and read it all the same."""
    want = getattr(diffusers, SAMPLERS[name].scheduler).from_config(KARRAS.config, **SAMPLERS[name].overrides)
    sampler = compile_sampler(name, saved(KARRAS), 8)
    assert difference(compiled_walk(sampler), diffusers_walk(want, 8)) < ROUNDED
    other = compile_sampler(name, saved(KARRAS, sigma_min=None, sigma_max=None), 8)
    assert [call.timestep for call in sampler.calls] != [call.timestep for call in other.calls]


@pytest.mark.parametrize("name", ["ddim", "dpmpp_2m", "pndm", "lms", "euler_a"])
def test_samplers_that_lose_those_ends_are_refused(name: str) -> None:
    with pytest.raises(ExportError, match=r"sigma_m(in|ax) = .*choose one of euler, dpmpp_2m_karras, unipc, deis"):
        compile_sampler(name, saved(KARRAS), 8)


def test_ends_that_the_checkpoints_own_ladder_does_not_use_mean_nothing() -> None:
    plain = saved(KARRAS, use_karras_sigmas=False)
    assert (
        compile_sampler("dpmpp_2m", plain, 8).calls
        == compile_sampler("dpmpp_2m", {**plain, "sigma_min": None, "sigma_max": None}, 8).calls
    )


@pytest.mark.parametrize("sampler", ["pndm", "lms", "deis"])
def test_zero_terminal_snr_is_refused_where_it_is_not_read(sampler: str) -> None:
    base = config(rescale_betas_zero_snr=True, prediction_type="v_prediction", timestep_spacing="trailing")
    with pytest.raises(ExportError, match=r"rescale_betas_zero_snr = True.*does not read; choose one of .*euler"):
        compile_sampler(sampler, base, 8)


@pytest.mark.parametrize("sampler", ["dpmpp_2m_karras", "ddim", "unipc"])
def test_continuous_timesteps_are_refused_where_they_are_not_read(sampler: str) -> None:
    """Stable Video Diffusion's network is told a quarter of log sigma, and Euler's class alone does so."""
    base = saved(KARRAS, timestep_type="continuous", prediction_type="v_prediction")
    with pytest.raises(ExportError, match=r"timestep_type = 'continuous'.*choose one of euler$"):
        compile_sampler(sampler, base, 8)
    assert compile_sampler("euler", base, 8).calls[0].timestep < 1


def test_flow_matching_under_another_name_is_refused() -> None:
    flow = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    with pytest.raises(ExportError):
        compile_sampler("ddim", saved(flow), 8)


@pytest.mark.parametrize(
    "kind", ["FlowMatchHeunDiscreteScheduler", "CogVideoXDDIMScheduler", "NoSuchScheduler", None, 3]
)
def test_classes_of_schedulers_that_are_not_known_are_refused(kind: Any) -> None:
    with pytest.raises(ExportError, match=f"the checkpoint's scheduler is {kind}"):
        make_scheduler("euler", {**SDXL, "_class_name": kind})


SD3 = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
SANA = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
WAN = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}
FLOWING = [name for name, recipe in SAMPLERS.items() if recipe.flow is not None]


def flow_walk(scheduler: Any, steps: int | None, **options: Any) -> list[NDArray[np.float64]]:
    """The loop of a flow-matching pipeline, in float64: x_0 .. x_N. What such networks see is not scaled."""
    scheduler.set_timesteps(steps, **options)
    latents = torch.from_numpy(NOISE)
    trajectory = [latents.numpy()]
    for timestep in scheduler.timesteps:
        output = torch.from_numpy(model(latents.numpy(), float(timestep)))
        latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
        trajectory.append(latents.numpy().astype(np.float64))
    return trajectory


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 28])
@pytest.mark.parametrize("own", [SD3, SANA, WAN], ids=["sd3", "sana", "wan"])
@pytest.mark.parametrize("name", FLOWING)
def test_flow_checkpoints_sample_as_their_schedulers_do(name: str, own: Any, steps: int) -> None:
    """Each sampler by the class and options that a user of diffusers would write out for it."""
    shift = own.config.get("shift") or own.config.flow_shift
    order = {"solver_order": 3 if name == "dpmpp_3m" else 2}
    want = {
        "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=shift),
        "unipc": lambda: diffusers.UniPCMultistepScheduler(**FLOW, flow_shift=shift),
    }.get(name, lambda: diffusers.DPMSolverMultistepScheduler(**FLOW, flow_shift=shift, **order))()
    sampler = compile_sampler(name, saved(own), steps)
    assert difference(compiled_walk(sampler), flow_walk(want, steps)) < ROUNDED
    assert [call.timestep for call in sampler.calls] == pytest.approx(want.timesteps.tolist(), abs=1e-3)
    assert (sampler.initial_scale, sampler.prediction_type) == (1.0, "flow_prediction")
    assert {call.input_scale for call in sampler.calls} == {1.0}


def test_a_flow_sampler_is_its_formula() -> None:
    """Euler's step along the straight path, at noise levels shifted as arXiv 2403.03206, equation 23, has it."""
    sampler = compile_sampler("euler", saved(SD3, pipeline_sigmas=True), 4)
    levels = [3 * s / (1 + 2 * s) for s in (1.0, 0.75, 0.5, 0.25)] + [0.0]
    assert [call.timestep for call in sampler.calls] == pytest.approx([1000 * s for s in levels[:-1]])
    for i, call in enumerate(sampler.calls):
        assert call.latents == (1, 0, 0, 0)
        assert call.outputs[0] == pytest.approx(levels[i + 1] - levels[i], rel=1e-6)


def test_the_shift_of_a_size_is_diffusers() -> None:
    named = {"base_image_seq_len": 1024, "max_image_seq_len": 4096, "base_shift": 0.95, "max_shift": 2.05}
    for places in (64, 1024, 6930):
        assert size_shift({}, places) == calculate_shift(places)
        assert size_shift(named, places) == calculate_shift(places, *named.values())
    with pytest.raises(ExportError, match="base_image_seq_len = max_image_seq_len = 4096"):
        size_shift({**named, "base_image_seq_len": 4096}, 64)
    with pytest.raises(ExportError, match="has max_shift = '2'"):
        size_shift({**named, "max_shift": "2"}, 64)


@pytest.mark.parametrize("terminal", [None, 0.1])
@pytest.mark.parametrize("kind", ["exponential", "linear"])
def test_noise_levels_that_a_pipeline_shifts_by_the_size(kind: str, terminal: float | None) -> None:
    """FLUX's pipeline and those after it: mu from the size, and noise levels from 1 to 1/n, given to the scheduler."""
    own = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type=kind, shift_terminal=terminal
    )
    calls = []
    for tokens in (256, 4096):
        mu = calculate_shift(tokens)
        sampler = compile_sampler("euler", saved(own, mu=mu, pipeline_sigmas=True), 6)
        want = flow_walk(own, None, sigmas=np.linspace(1.0, 1 / 6, 6), mu=mu)
        assert difference(compiled_walk(sampler), want) < ROUNDED
        assert (sampler.options["mu"], sampler.options["pipeline_sigmas"]) == (mu, True)
        calls.append(sampler.calls)
    assert calls[0] != calls[1]
    with pytest.raises(ExportError, match=r"sampler 'unipc' would take others\. Choose euler"):
        compile_sampler("unipc", saved(own, mu=mu), 6)


@pytest.mark.parametrize("name", sorted(name for name, recipe in SAMPLERS.items() if recipe.flow is None))
def test_samplers_that_know_no_flow_are_refused(name: str) -> None:
    with pytest.raises(ExportError, match=r"trained by flow matching.*Choose one of euler, dpmpp_2m"):
        compile_sampler(name, saved(SD3), 6)


@pytest.mark.parametrize("change", [{"invert_sigmas": True}, {"shift_terminal": 0.1}])
def test_options_of_flow_that_a_sampler_does_not_read_are_refused(change: dict[str, Any]) -> None:
    compile_sampler("euler", saved(SD3, **change), 6)
    with pytest.raises(ExportError, match=rf"{next(iter(change))} = .*'dpmpp_2m'.*does not read; choose one of euler"):
        compile_sampler("dpmpp_2m", saved(SD3, **change), 6)


def trig_walk(scheduler: Any, **times: Any) -> list[Any]:
    """The loop of Sana-Sprint's pipeline, x_0 .. x_N, on a network that is given and gives what the sampler has."""
    scheduler.set_timesteps(**times)
    latents = torch.from_numpy(NOISE) * scheduler.config.sigma_data
    trajectory = [NOISE]
    for i, timestep in enumerate(scheduler.timesteps[:-1]):
        output = torch.from_numpy(model((latents / scheduler.config.sigma_data).numpy(), float(timestep)))
        with drawing(scheduler, torch.from_numpy(step_noise(i))):
            latents = scheduler.step(output * scheduler.config.sigma_data, timestep, latents, return_dict=False)[0]
        trajectory.append((latents / scheduler.config.sigma_data).numpy())
    return trajectory


@pytest.mark.parametrize("sigma_data", [0.5, 1.7])
@pytest.mark.parametrize(("steps", "middle"), [(1, None), (2, 1.3), (3, None), (10, None)])
def test_trigflow_is_diffusers_whatever_the_deviation_of_data(
    sigma_data: float, steps: int, middle: float | None
) -> None:
    """The pipeline multiplies latents by it and divides them again; the angle between two steps is the pipeline's."""
    own = diffusers.SCMScheduler(sigma_data=sigma_data)
    sampler = compile_sampler("scm", saved(own), steps)
    want = trig_walk(own, num_inference_steps=steps, intermediate_timesteps=middle)
    assert difference(compiled_walk(sampler), want) < ROUNDED
    assert (sampler.prediction_type, sampler.initial_scale, len(sampler.calls)) == ("trigflow", 1.0, steps)
    assert [call.noise != 0 for call in sampler.calls] == [True] * (steps - 1) + [False], "the last adds none"


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "scm"])
def test_samplers_that_know_no_trigflow_are_refused(name: str) -> None:
    with pytest.raises(ExportError, match=r"SCMScheduler: its network was distilled as TrigFlow.*Choose scm"):
        compile_sampler(name, saved(diffusers.SCMScheduler()), 2)


@pytest.mark.parametrize("other", [diffusers.DDIMScheduler(), SD3, COSXL], ids=lambda s: type(s).__name__)
def test_trigflow_is_for_networks_that_were_distilled_so(other: Any) -> None:
    with pytest.raises(ExportError, match=rf"scheduler is {type(other).__name__}.*'scm'"):
        compile_sampler("scm", saved(other), 2)


@pytest.mark.parametrize("config", [{"prediction_type": "epsilon"}, {"num_train_timesteps": 1}])
def test_what_trigflow_is_not_diffusers_refuses(config: dict[str, Any]) -> None:
    with pytest.raises(ExportError, match="diffusers cannot run SCMScheduler with 2 steps"):
        compile_sampler("scm", saved(diffusers.SCMScheduler(), **config), 2)


def test_the_lists_name_schedulers_of_diffusers() -> None:
    for name in (*TRAINED_UNDER, *TRAINED_UNDER_EDM, *TRAINED_UNDER_FLOW, *TRAINED_UNDER_TRIG):
        assert hasattr(diffusers, name), name


def test_defaults_that_a_pipeline_changes_hold_for_its_own_scheduler_alone() -> None:
    """diffusers notes which options a file left out (_use_default_values) and lets another class have its own."""
    base = {k: v for k, v in SDXL.items() if k != "steps_offset"} | {"_class_name": "DDIMScheduler"}
    patched = base | {"steps_offset": 1, "_use_default_values": ["steps_offset"]}
    last = {name: make_scheduler(name, patched) for name in ("ddim", "euler")}
    assert (last["ddim"].config.steps_offset, last["euler"].config.steps_offset) == (1, 0)


def test_training_facts_are_options_of_diffusers() -> None:
    """A fact that no class of diffusers has any more would never be looked for."""
    listed = {
        key
        for name in dir(diffusers)
        if name.endswith("Scheduler") and inspect.isclass(getattr(diffusers, name))
        for key in inspect.signature(getattr(diffusers, name).__init__).parameters
    }
    assert set(TRAINING) <= listed
