"""Inpainting checkpoints: what is exported of them, what their pipelines do otherwise, what is refused by name."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.export.families.test_sdxl import rewrite
from tests.tiny_inpainting import save_inpainting
from tgate_engine.errors import ExportError
from tgate_export.job import ExportSettings, Job, prepare

SD, SDXL = "StableDiffusionInpaintPipeline", "StableDiffusionXLInpaintPipeline"


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def both(
    request: pytest.FixtureRequest,
    family_bundle: Callable[..., tuple[Path, Path]],
    tiny_checkpoint: Callable[[str], Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[str, Path]:
    family: str = request.param
    plain = family_bundle("sd15_a")[0] if family == "sd" else tiny_checkpoint("conv_projection")
    return family, save_inpainting(plain, tmp_path_factory.mktemp(family) / "checkpoint")


@pytest.fixture
def copied(both: tuple[str, Path], tmp_path: Path) -> tuple[str, Path]:
    shutil.copytree(both[1], tmp_path / "checkpoint")
    return both[0], tmp_path / "checkpoint"


def job(family: str, checkpoint: Path, **more: Any) -> Job:
    own: dict[str, Any] = {"sizes": [(64, 96)], "components": ["denoiser", "encoder"], **more}
    return prepare(ExportSettings(model="sd15" if family == "sd" else "sdxl", checkpoint=str(checkpoint), **own))


def refusal(family: str, checkpoint: Path, **more: Any) -> str:
    with pytest.raises(ExportError) as caught:
        job(family, checkpoint, **more)
    return str(caught.value)


def test_the_network_is_told_of_the_mask_beside_its_latents(both: tuple[str, Path]) -> None:
    made = job(*both)
    (around,) = made.inputs_from("masked")
    channels, height, width = made.latents
    assert (channels, around.shape) == (4, (5, height, width))
    assert (around.attended, around.follows_dtype, around.conditioning.negative) == (False, True, "same")


def test_the_class_that_is_named_and_the_channels_belong_together(copied: tuple[str, Path]) -> None:
    family, checkpoint = copied
    inpainting, index = (SD if family == "sd" else SDXL), checkpoint / "model_index.json"
    plain = inpainting.replace("Inpaint", "")
    rewrite(index, _class_name=plain)
    assert f"takes 9 channels, its latents have 4; that is an inpainting model's: name {inpainting} in its" in refusal(
        *copied
    )
    rewrite(index, _class_name=inpainting)
    rewrite(checkpoint / "unet" / "config.json", in_channels=4)
    assert f"takes 4 channels, its latents have 4; {inpainting} is exported with 9 and 4." in refusal(*copied)
    rewrite(checkpoint / "unet" / "config.json", in_channels=8)
    assert "takes 8 channels" in refusal(*copied)
    rewrite(checkpoint / "unet" / "config.json", in_channels=9, out_channels=9)
    assert "takes 4 channels of latents and gives 9; samplers want as many" in refusal(*copied)


def test_what_their_pipelines_do_not_do_is_refused(copied: tuple[str, Path]) -> None:
    family, checkpoint = copied
    if family == "sd":
        assert f"--guidance-rescale: {SD} does not rescale guidance" in refusal(*copied, guidance_rescale=0.5)
        rewrite(checkpoint / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler", clip_sample=True)
        rewrite(checkpoint / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
        assert "clip_sample=True" in refusal(*copied, sampler="ddim")
        return
    assert job(*copied, guidance_rescale=0.5).settings.guidance_rescale == 0.5
    rewrite(checkpoint / "model_index.json", requires_aesthetics_score=True)
    assert "requires_aesthetics_score = true, as the SDXL refiner's" in refusal(*copied)
    rewrite(checkpoint / "model_index.json", requires_aesthetics_score=False)
    rewrite(checkpoint / "vae" / "config.json", latents_mean=[0.1] * 4, latents_std=[2.0] * 4)
    assert f"latents_mean and latents_std, which {SDXL} goes by where it decodes" in refusal(*copied)
