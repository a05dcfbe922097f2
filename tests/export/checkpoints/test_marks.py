"""What a single file says of itself is followed as diffusers would, or refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from tests.export.checkpoints.ldm import Small, build, marked, schedule, written
from tgate_engine.errors import ExportError
from tgate_export.sampling import compile_sampler, compile_scheduler

__all__ = ["written"]  # a fixture

EMPTY = torch.zeros(0)
CONFIG = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "num_train_timesteps": 1000}
VELOCITY = {"prediction_type": "v_prediction"}


@pytest.mark.parametrize(
    ("model", "tensors", "metadata"),
    [
        pytest.param("sdxl", {"v_pred": EMPTY}, {}, id="v_pred"),
        pytest.param("sd15", {"v_pred": EMPTY}, {"modelspec.prediction_type": "v"}, id="twice"),
        pytest.param("ssd-1b", {}, {"modelspec.predict_key": "v"}, id="ComfyUI's metadata"),
        pytest.param("sdxl", {}, {"modelspec.prediction_type": "v_prediction"}, id="model specification"),
        pytest.param("sdxl", {}, {"ss_v_parameterization": "True", "ss_zero_terminal_snr": "False"}, id="kohya"),
        pytest.param("sd15", {}, {"ss_base_model_version": "sd_v1_v", "ss_v2": "False"}, id="kohya's version"),
    ],
)
def test_velocity_is_followed(
    written: Callable[[str], tuple[Path, Small]],
    tmp_path: Path,
    model: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    config = marked(written, tmp_path, model, tensors, metadata).scheduler_config()
    assert config == {**written(model)[1].scheduler_config(), **VELOCITY}
    hand = diffusers.DDIMScheduler(
        **CONFIG, **VELOCITY, clip_sample=False, set_alpha_to_one=False, steps_offset=1, timestep_spacing="leading"
    )
    compiled, wanted = compile_sampler("ddim", config, 5), compile_scheduler(hand, 5, name="ddim")
    assert compiled.prediction_type == "v_prediction"
    assert compiled.calls == wanted.calls
    assert compiled.calls != compile_sampler("ddim", written(model)[1].scheduler_config(), 5).calls


@pytest.mark.parametrize(
    ("model", "tensors", "metadata"),
    [
        pytest.param("sdxl", {"v_pred": EMPTY, "ztsnr": EMPTY}, {}, id="ztsnr"),
        pytest.param("sd15", {"v_pred": EMPTY, **schedule(True)}, {}, id="buffers"),
        pytest.param("sd15", {"v_pred": EMPTY, "betas": schedule(True)["betas"].bfloat16()}, {}, id="rounded"),
        pytest.param(
            "sdxl",
            {"v_pred": EMPTY, "denoiser.sigmas": schedule(True)["denoiser.sigmas"].clamp(max=4518.0)},
            {},
            id="σ",
        ),
        pytest.param("sdxl", {"v_pred": EMPTY}, {"ss_zero_terminal_snr": "True"}, id="kohya"),
        pytest.param("sd21", {"ztsnr": EMPTY}, {}, id="of a model that predicts velocity"),
    ],
)
def test_zero_terminal_snr_is_followed(
    written: Callable[[str], tuple[Path, Small]],
    tmp_path: Path,
    model: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
) -> None:
    config = marked(written, tmp_path, model, tensors, metadata).scheduler_config()
    rescaled = {**VELOCITY, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    assert config == {**written(model)[1].scheduler_config(), **rescaled}
    hand = diffusers.EulerDiscreteScheduler(**CONFIG, **rescaled)
    compiled, wanted = compile_sampler("euler", config, 4), compile_scheduler(hand, 4, name="euler")
    assert [call.timestep for call in compiled.calls] == [999, 749, 499, 249]
    assert compiled.calls == wanted.calls
    assert compiled.initial_scale == wanted.initial_scale == pytest.approx(4096)


def test_the_published_noise_schedule_says_nothing(
    written: Callable[[str], tuple[Path, Small]], tmp_path: Path
) -> None:
    """Networks that were trained further keep the buffers of their ancestor."""
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        held = {key: tensor.to(dtype) for key, tensor in schedule().items()}
        assert marked(written, tmp_path, "sd15", held).scheduler_config() == written("sd15")[1].scheduler_config()
    config = marked(written, tmp_path, "sdxl", {"v_pred": EMPTY, "ztsnr": EMPTY, **schedule()}).scheduler_config()
    assert config["rescale_betas_zero_snr"] is True


def test_playground(written: Callable[[str], tuple[Path, Small]], tmp_path: Path) -> None:
    """As diffusers reads such a file."""
    from diffusers.loaders.single_file_utils import _legacy_load_scheduler, create_vae_diffusers_config_from_ldm

    mean = torch.tensor([-1.6574, 1.886, -1.383, 2.5155]).view(1, 4, 1, 1)
    std = torch.tensor([8.4927, 5.9022, 6.5498, 5.2299]).view(1, 4, 1, 1)
    tensors = {"edm_mean": mean, "edm_std": std}
    checkpoint = marked(written, tmp_path, "sdxl", tensors, {"modelspec.prediction_type": "epsilon"})

    with pytest.warns(FutureWarning):
        hand = _legacy_load_scheduler(None, tensors, "scheduler", scheduler_type="edm_dpm_solver_multistep")
    config = checkpoint.scheduler_config()
    assert config["_class_name"] == checkpoint.model_index["scheduler"][1] == type(hand).__name__
    read = type(hand).from_config(config)
    assert {**read.config, "_use_default_values": 0, "_class_name": 0} == {
        **hand.config,
        "_use_default_values": 0,
        "_class_name": 0,
    }
    assert compile_sampler("dpmpp_2m", config, 6).calls == compile_scheduler(hand, 6, name="dpmpp_2m").calls
    assert written("sdxl")[1].model_index["scheduler"][1] == "EulerDiscreteScheduler"

    params = {"ch": 4, "ch_mult": [1], "in_channels": 3, "out_ch": 3, "z_channels": 4, "num_res_blocks": 2}
    original = {"model": {"params": {"first_stage_config": {"params": {"ddconfig": params}}}}}
    vae = create_vae_diffusers_config_from_ldm(original, tensors, image_size=1024)
    built: Any = build(checkpoint, "vae").config
    assert built["scaling_factor"] == vae["scaling_factor"] == 0.5
    assert built["latents_mean"] == vae["latents_mean"].flatten().tolist()
    assert built["latents_std"] == vae["latents_std"].flatten().tolist()
    assert checkpoint.config("unet") == written("sdxl")[1].config("unet")


@pytest.mark.parametrize("minimum", [None, 0.01])
def test_cosxl(written: Callable[[str], tuple[Path, Small]], tmp_path: Path, minimum: float | None) -> None:
    tensors = {"edm_vpred.sigma_max": torch.tensor(120.0)}
    if minimum is not None:
        tensors["edm_vpred.sigma_min"] = torch.tensor([minimum])
    checkpoint = marked(written, tmp_path, "sdxl", tensors)
    hand = diffusers.EDMEulerScheduler(
        sigma_min=minimum or 0.002,
        sigma_max=120.0,
        sigma_data=1.0,
        sigma_schedule="exponential",
        prediction_type="v_prediction",
    )
    config = checkpoint.scheduler_config()
    assert config["_class_name"] == checkpoint.model_index["scheduler"][1] == "EDMEulerScheduler"
    compiled, wanted = compile_sampler("euler", config, 7), compile_scheduler(hand, 7, name="euler")
    assert compiled.prediction_type == "v_prediction"
    assert [call.timestep for call in compiled.calls] == pytest.approx(
        [call.timestep for call in wanted.calls], abs=1e-6
    )
    for call, by_hand in zip(compiled.calls, wanted.calls, strict=True):
        for read, made in (
            ((call.input_scale,), (by_hand.input_scale,)),
            (call.latents, by_hand.latents),
            (call.outputs, by_hand.outputs),
        ):
            assert read == pytest.approx(made, rel=1e-5)
    assert checkpoint.config("vae") == written("sdxl")[1].config("vae")


SIGMA_MAX = {"edm_vpred.sigma_max": torch.tensor(120.0)}
PLAYGROUND = {"edm_mean": torch.zeros(4), "edm_std": torch.ones(4)}


@pytest.mark.parametrize(
    ("model", "tensors", "metadata", "message"),
    [
        # Two marks that disagree.
        ("sdxl", {"v_pred": EMPTY}, {"modelspec.prediction_type": "epsilon"}, "by tensor 'v_pred' its prediction type"),
        ("sdxl", {"v_pred": EMPTY}, {"ss_v_parameterization": "False"}, "by its ss_v_parameterization epsilon"),
        ("sdxl", {}, {"modelspec.prediction_type": "v", "modelspec.predict_key": "epsilon"}, "contradicts itself"),
        ("sdxl", {"v_pred": EMPTY, "ztsnr": EMPTY}, {"ss_zero_terminal_snr": "False"}, "its zero terminal SNR is True"),
        ("sdxl", SIGMA_MAX, {"modelspec.prediction_type": "epsilon"}, "by tensor 'edm_vpred.sigma_max' v_prediction"),
        ("sdxl", {**SIGMA_MAX, "ztsnr": EMPTY}, {}, "by tensor 'ztsnr' its zero terminal SNR is True"),
        ("sdxl", {**PLAYGROUND, "v_pred": EMPTY}, {}, "by tensor 'edm_mean' epsilon"),
        ("sdxl", {**PLAYGROUND, **SIGMA_MAX}, {}, "not parts or both of them"),
        # Parts of marks, and marks without sense.
        ("sdxl", {"edm_mean": torch.zeros(4)}, {}, "it has the marks edm_mean, and wants edm_mean and edm_std"),
        ("sdxl", {"edm_vpred.sigma_min": torch.tensor(0.1)}, {}, "it has the marks edm_vpred.sigma_min, and wants"),
        ("sdxl", {**SIGMA_MAX, "edm_vpred.sigma_min": torch.tensor(130.0)}, {}, "goes from 130 to 120"),
        ("sdxl", {"edm_vpred.sigma_max": torch.tensor(-1.0)}, {}, "holds [-1.0], and must hold 1 positive number;"),
        (
            "sdxl",
            {**PLAYGROUND, "edm_std": torch.zeros(4)},
            {},
            "'edm_std' holds [0.0, 0.0, 0.0, 0.0], and must hold 4",
        ),
        ("sdxl", {**PLAYGROUND, "edm_mean": torch.full((4,), torch.nan)}, {}, "must hold 4 finite numbers"),
        ("sdxl", {**PLAYGROUND, "edm_mean": torch.zeros(3)}, {}, "must hold 4 finite numbers"),
        ("sdxl", {"ztsnr": EMPTY}, {}, "by tensor 'ztsnr' its terminal SNR is zero, where epsilon says nothing"),
        ("sd15", schedule(True), {}, "its terminal SNR is zero, where epsilon says nothing"),
        # Noise schedules of other models.
        ("sd15", {"betas": schedule(beta_end=0.02)["betas"]}, {}, "tensor 'betas' holds 1000 numbers, 0.00085 to 0.02"),
        ("sd15", {"alphas_cumprod": torch.linspace(1, 0, 10)}, {}, "'alphas_cumprod' holds 10 numbers, 1 to 0"),
        ("sdxl", {"denoiser.sigmas": EMPTY}, {}, "'denoiser.sigmas' holds 0 numbers, nothing"),
        # Marks of another model than --model says.
        ("sd15", {**SIGMA_MAX}, {}, "marks it as an EDM model, which is known of sdxl alone"),
        ("sd21", {"global_step": torch.tensor(875000)}, {}, "by tensor 'global_step' (875000, SD 2 base) it predicts"),
        ("sd21", {}, {"modelspec.prediction_type": "epsilon"}, "by its modelspec.prediction_type it predicts epsilon"),
        ("sd21", {}, {"modelspec.resolution": "512x512"}, "modelspec.resolution = '512x512', and SD 2 of that size"),
        ("sd21", {}, {"modelspec.resolution": "large"}, "modelspec.resolution = 'large'"),
        ("sd21", {}, {"modelspec.architecture": "stable-diffusion-v2-512"}, "sd21 is stable-diffusion-v2-768-v"),
        ("sdxl", {}, {"modelspec.architecture": "stable-diffusion-v1"}, "sdxl is stable-diffusion-xl-v1-base"),
        ("sdxl", {}, {"modelspec.architecture": "stable-diffusion-xl-v1-refiner"}, "sdxl is stable-diffusion-xl-v1"),
        ("sdxl", {}, {"modelspec.architecture": "Stable-Diffusion-XL-v1-base/lora"}, "'Stable-Diffusion-XL-v1-base/lo"),
        ("sd15", {}, {"modelspec.architecture": "stable-diffusion-v1/inpainting"}, "sd15 is stable-diffusion-v1;"),
        ("sd15", {}, {"ss_v2": "True"}, "ss_v2 = 'True'; sd15 is not of Stable Diffusion 2"),
        ("sd21", {}, {"ss_v2": "False"}, "ss_v2 = 'False'; sd21 is of Stable Diffusion 2"),
        ("sd15", {}, {"ss_base_model_version": "sdxl_base_v1-0"}, "ss_base_model_version = 'sdxl_base_v1-0'; sd15 is"),
        ("sdxl", {}, {"ss_base_model_version": "sdxl_refiner_v1-0"}, "sdxl is sdxl_base_v1-0"),
        # Marks that cannot be followed.
        ("sdxl", {}, {"modelspec.prediction_type": "sample"}, "which is none of epsilon, eps, v, v_prediction"),
        ("sdxl", {}, {"ss_zero_terminal_snr": "maybe"}, "ss_zero_terminal_snr = 'maybe', which is none of true"),
        ("sdxl", {}, {"modelspec.timestep_range": "200,1000"}, "trained for a part of the 1000 timesteps"),
        ("sdxl", {}, {"_quantization_metadata": "{}"}, "its weights are quantised"),
        ("sd15", {}, {"modelspec.encoder_layer": "last"}, "modelspec.encoder_layer = 'last', and 1 is the last"),
    ],
)
def test_marks_that_are_refused(
    written: Callable[[str], tuple[Path, Small]],
    tmp_path: Path,
    model: str,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    message: str,
) -> None:
    with pytest.raises(ExportError, match=re.escape(message)) as caught:
        marked(written, tmp_path, model, tensors, metadata)
    said = str(caught.value)
    assert said.startswith(f"{tmp_path / 'marked.safetensors'}: ")
    assert "\n" not in said
    assert "; " in said  # what to do next


@pytest.mark.parametrize(
    ("model", "metadata"),
    [
        ("sd15", {"modelspec.architecture": "stable-diffusion-v1", "modelspec.resolution": "768x768"}),
        ("sd15", {"modelspec.prediction_type": "epsilon", "ss_v2": "False", "ss_base_model_version": "sd_v1"}),
        ("sd15", {"ss_base_model_version": "sd_1.5", "modelspec.timestep_range": "0,1000"}),
        ("sd21", {"modelspec.architecture": "stable-diffusion-v2-768-v", "ss_v2": "True"}),
        ("sd21", {"modelspec.resolution": "768x768", "ss_base_model_version": "sd_v2_v"}),
        ("sd21", {"modelspec.resolution": "512x512", "modelspec.prediction_type": "v"}),
        ("sdxl", {"modelspec.architecture": "stable-diffusion-xl-v1-base", "modelspec.resolution": "512x512"}),
        ("sdxl", {"ss_base_model_version": "sdxl_base_v1-0", "modelspec.encoder_layer": "2", "ss_v2": "False"}),
        ("ssd-1b", {"modelspec.architecture": "stable-diffusion-xl-v1-base", "ss_zero_terminal_snr": "None"}),
        ("sdxl", {"modelspec.title": "v_pred", "modelspec.author": "ztsnr", "format": "pt", "prompt": "{}"}),
    ],
)
def test_metadata_that_agrees_changes_nothing(
    written: Callable[[str], tuple[Path, Small]], tmp_path: Path, model: str, metadata: Mapping[str, str]
) -> None:
    checkpoint = marked(written, tmp_path, model, metadata=metadata)
    networks = written(model)[1]
    assert checkpoint.scheduler_config() == networks.scheduler_config()
    assert checkpoint.model_index == networks.model_index
    for component, module in networks.modules.items():
        assert checkpoint.config(component) == networks.config(component)
        assert len(checkpoint.tensors(component).stored()) == len(list(module.named_parameters()))


def test_skipped_layers_touch_the_text_alone(written: Callable[[str], tuple[Path, Small]], tmp_path: Path) -> None:
    checkpoint = marked(written, tmp_path, "sd15", metadata={"modelspec.encoder_layer": "2"})
    checkpoint.tensors("unet")
    with pytest.raises(ExportError, match=r"modelspec.encoder_layer = 2: prompts are encoded without the last"):
        checkpoint.tensors("text_encoder")
