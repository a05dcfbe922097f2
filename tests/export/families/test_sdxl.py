"""SDXL's own: what its pipeline reads of a checkpoint, models trained under EDM's preconditioning, and refiners."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from tests.tiny_models import load_tiny_sdxl, tiny_model
from tgate_engine.bundle import Bundle
from tgate_engine.errors import ExportError
from tgate_engine.report import Silent
from tgate_export.build import export
from tgate_export.job import ExportSettings, prepare
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.verify import verify

VARIANT, PROMPT = "conv_projection", "a large red circle"
MEAN, STD = [-1.6574, 1.886, -1.383, 2.5155], [8.4927, 5.9022, 6.5498, 5.2299]
"""As Playground v2.5 has them."""


def rewrite(file: Path, **changes: Any) -> None:
    """Keys of a JSON file set, or with ``...`` left out."""
    data = json.loads(file.read_text("utf-8")) | changes
    file.write_text(json.dumps({key: value for key, value in data.items() if value is not ...}), "utf-8")


@pytest.fixture
def copied(tiny_checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    root = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint(VARIANT), root)
    return root


def settings(root: Path, **more: Any) -> ExportSettings:
    model = tiny_model(VARIANT)
    height, width = (side * model.vae_factor for side in model.latent_size)
    common: dict[str, Any] = {"m": 3, "k": 1, "steps": 6, "warm_up": 0, "output": root.parent / "bundle"}
    return ExportSettings(model="sdxl", checkpoint=str(root), height=height, width=width, **(common | more))


def relative(got: Any, want: torch.Tensor) -> float:
    return float((torch.as_tensor(got) - want).abs().max() / want.abs().max())


@pytest.mark.slow
def test_playground_draws_what_diffusers_draws(copied: Path) -> None:
    """EDM's scheduler, and latents that are normalised by channel before they are decoded."""
    own = diffusers.EDMDPMSolverMultistepScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5)
    own.save_pretrained(copied / "scheduler")
    rewrite(copied / "model_index.json", scheduler=["diffusers", type(own).__name__])
    rewrite(copied / "vae" / "config.json", latents_mean=MEAN, latents_std=STD, scaling_factor=0.5)
    bundle = export(settings(copied, guidance_scale=3.0), Silent())
    assert all(golden.ok for golden in verify(Bundle.open(bundle), threads=1))
    with Pipeline.open(bundle, threads=1) as opened:
        noise = torch.randn(1, *opened.session.shapes()[0].latents, generator=torch.Generator().manual_seed(2))
        drawn = opened(PROMPT, negative_prompt="a photo", plan="ungated", initial_latents=noise.numpy())
    pipe = load_tiny_sdxl(copied)
    assert type(pipe.scheduler) is type(own)
    request: dict[str, Any] = {
        "negative_prompt": "a photo",
        "num_inference_steps": 6,
        "guidance_scale": 3.0,
        "latents": noise,
        "height": drawn.images[0].height,
        "width": drawn.images[0].width,
    }
    assert relative(drawn.latents, pipe(PROMPT, output_type="latent", **request).images) < 1e-4
    want = np.rint(pipe(PROMPT, output_type="np", **request).images[0] * 255)
    assert np.abs(np.asarray(drawn.images[0], np.float32) - want).max() <= 1
    pipe.vae.register_to_config(latents_mean=None, latents_std=None)
    other = np.rint(pipe(PROMPT, output_type="np", **request).images[0] * 255)
    assert np.abs(other - want).max() > 3, "the normalisation shows in the picture"


@pytest.mark.parametrize(
    "changes",
    [
        {"latents_mean": MEAN},
        {"latents_std": STD},
        {"latents_mean": MEAN[:3], "latents_std": STD},
        {"shift_factor": 0.1},
        {"shift_factor": 0.1, "latents_mean": MEAN, "latents_std": STD},
        {"scaling_factor": 0},
        {"scaling_factor": None},
        {"scaling_factor": "0.13"},
        {"out_channels": 4},
    ],
)
def test_decoders_that_the_pipeline_would_misuse_are_refused(copied: Path, changes: dict[str, Any]) -> None:
    rewrite(copied / "vae" / "config.json", **changes)
    with pytest.raises(ExportError, match=rf"vae/config.json has .*{next(iter(changes))[:6]}|vae.*shape"):
        prepare(settings(copied))


@pytest.mark.parametrize("changes", [{"shift_factor": None}, {"latents_mean": None}, {"latents_mean": [0.0] * 4}])
def test_keys_that_say_nothing_are_accepted(copied: Path, changes: dict[str, Any]) -> None:
    rewrite(copied / "vae" / "config.json", **changes)
    assert prepare(settings(copied)).sites


def test_a_refiner_is_refused_with_what_to_do(copied: Path) -> None:
    """As published: another pipeline's, without a first text encoder."""
    absent = [None, None]
    rewrite(
        copied / "model_index.json",
        _class_name="StableDiffusionXLImg2ImgPipeline",
        text_encoder=absent,
        tokenizer=absent,
        requires_aesthetics_score=True,
    )
    shutil.rmtree(copied / "text_encoder")
    with pytest.raises(ExportError, match=r"SDXL refiner.*give the base model"):
        prepare(settings(copied))


def test_a_network_that_counts_other_sizes_is_refused(copied: Path) -> None:
    rewrite(copied / "text_encoder_2" / "config.json", projection_dim=20)
    with pytest.raises(ExportError, match=r"projection_class_embeddings_input_dim.*projection_dim = 20"):
        prepare(settings(copied))


@pytest.mark.parametrize(
    ("component", "name"),
    [
        ("text_encoder", "CLIPTextModelWithProjection"),
        ("text_encoder_2", "CLIPTextModel"),
        ("vae", "AutoencoderTiny"),
        ("unet", "UNet2DModel"),
    ],
)
def test_components_of_other_classes_are_refused(copied: Path, component: str, name: str) -> None:
    """diffusers loads what model_index.json names, and a text encoder with a projection first gives its pooled text."""
    index = json.loads((copied / "model_index.json").read_text("utf-8"))
    rewrite(copied / "model_index.json", **{component: [index[component][0], name]})
    with pytest.raises(ExportError, match=rf"{component} is a {name} in model_index.json"):
        prepare(settings(copied))


def test_a_guidance_embedding_wants_no_second_half(copied: Path) -> None:
    unet = diffusers.UNet2DConditionModel.from_config(
        json.loads((copied / "unet" / "config.json").read_text("utf-8")) | {"time_cond_proj_dim": 8}
    )
    unet.save_pretrained(copied / "unet")
    job = prepare(settings(copied, guidance_scale=8.0))
    assert (job.guidance, job.guided) == ("embedded", False)
