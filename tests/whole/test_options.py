"""Options that change the text or the guidance give what diffusers gives with the same ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.conftest import family_settings
from tests.plain import export_plain
from tests.tiny_families import load_tiny, make_tiny
from tests.tiny_models import load_tiny_sdxl, make_tiny_sdxl
from tgate_export.embed import embed
from tgate_export.job import ExportSettings
from tgate_runtime.pipeline import Pipeline

PROMPT, NEGATIVE = "a large red circle", "a photo"
STEPS, RESCALE = 5, 0.7
CLIP_MODELS = ("sd15_a", "sdxl")


@pytest.fixture(scope="module", params=CLIP_MODELS)
def optioned(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Any, Path]:
    """(name, diffusers' pipeline, bundle) with a layer skipped and guidance rescaled."""
    name, folder = request.param, tmp_path_factory.mktemp(request.param)
    root, output = folder / "checkpoint", folder / "bundle"
    if name == "sdxl":
        make_tiny_sdxl(root, "conv_projection")
        settings = ExportSettings(model="sdxl", checkpoint=str(root), height=64, width=64, output=output)
        pipe = load_tiny_sdxl(root)
    else:
        make_tiny(root, name)
        settings = family_settings(name, root, output)
        pipe = load_tiny(root, name)
    asked = replace(settings, steps=STEPS, clip_skip=1, guidance_rescale=RESCALE, components=("text", "denoiser"))
    return name, pipe, export_plain(asked)


def drawn(name: str, pipe: Any, noise: torch.Tensor, scale: float, **options: Any) -> torch.Tensor:
    height, width = (side * pipe.vae_scale_factor for side in noise.shape[-2:])
    if name != "sdxl" and not hasattr(
        pipe.text_encoder, "text_model"
    ):  # diffusers 0.42 looks for it, transformers 5 has it not
        object.__setattr__(pipe.text_encoder, "text_model", pipe.text_encoder)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, use_karras_sigmas=False)
    result: torch.Tensor = pipe(
        PROMPT,
        negative_prompt=NEGATIVE,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        latents=noise.clone(),
        height=height,
        width=width,
        output_type="latent",
        **options,
    ).images
    return result


def relative(got: Any, want: torch.Tensor) -> float:
    return float((torch.as_tensor(got) - want).abs().max() / want.abs().max())


def test_clip_skip_and_rescaled_guidance_equal_diffusers(optioned: tuple[str, Any, Path]) -> None:
    name, pipe, bundle = optioned
    with Pipeline.open(bundle, threads=1) as opened:
        manifest = opened.session.manifest
        noise = torch.randn(1, *manifest.shapes[0].latents, generator=torch.Generator().manual_seed(1))
        got = opened(PROMPT, negative_prompt=NEGATIVE, initial_latents=noise.numpy()).latents
    scale = manifest.guidance_scale
    want = drawn(name, pipe, noise, scale, clip_skip=1, guidance_rescale=RESCALE)
    assert relative(got, want) < 1e-4
    for other in ({"clip_skip": 1}, {"guidance_rescale": RESCALE}):
        assert relative(got, drawn(name, pipe, noise, scale, **other)) > 1e-2, f"{other} alone is told apart"
    assert (manifest.clip_skip, manifest.guidance_rescale) == (1, RESCALE)


def test_embedding_ahead_of_time_skips_the_same_layers(optioned: tuple[str, Any, Path], tmp_path: Path) -> None:
    name, _, bundle = optioned
    checkpoint, file = bundle.parent / "checkpoint", tmp_path / "e.safetensors"
    model = "sdxl" if name == "sdxl" else "sd15"
    embed(model, [PROMPT], file, checkpoint=str(checkpoint), negative_prompt=NEGATIVE, clip_skip=1)
    noise = np.random.default_rng(0).standard_normal
    with Pipeline.open(bundle, threads=1) as opened:
        start = noise((1, *opened.session.manifest.shapes[0].latents)).astype(np.float32)
        want = opened(PROMPT, negative_prompt=NEGATIVE, initial_latents=start).latents
        got = opened(prompt_embeds=load_file(file), initial_latents=start).latents
    assert relative(got, torch.from_numpy(want)) < 1e-5
