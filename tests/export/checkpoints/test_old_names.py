"""Checkpoints as diffusers and transformers wrote them years ago.

Each is made of a small checkpoint of today. What is read is what diffusers' own loader reads from the same directory,
or where it reads nothing, what the checkpoint was made of.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from torch import Tensor

from tests.conftest import family_settings
from tests.export.checkpoints.copies import (
    MODELS,
    PIXART,
    SD,
    SDXL,
    TRANSFORMERS,
    Copy,
    Tensors,
    change_json,
    copy,
    job,
    read,
    refused,
    rewrite,
    same,
    whole,
)
from tests.oracle_families import Request, plain_latents
from tests.plain import export_plain
from tests.tiny_families import latent_noise, load_tiny
from tgate_engine.bundle import Bundle
from tgate_export.checkpoints.directory import DirectoryCheckpoint
from tgate_export.families import find_model
from tgate_export.modules import real_module
from tgate_runtime.pipeline import Pipeline

__all__ = ["copy", "whole"]  # fixtures


# --- names of old -------------------------------------------------------------------------------

VAE_NAMES = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}


def old_vae(tensors: Tensors, convolutions: bool) -> Tensors:
    """The autoencoder's attention as diffusers named it until 2023; its projections were once convolutions."""
    renamed: Tensors = {}
    for name, value in tensors.items():
        for new, old in VAE_NAMES.items():
            if new in name:
                name = name.replace(new, old)
                value = value[:, :, None, None] if convolutions and value.ndim == 2 else value
        renamed[name] = value
    assert len(renamed.keys() - tensors.keys()) == 16, "weight and bias of four layers, in encoder and decoder"
    return renamed


@pytest.mark.parametrize("convolutions", [False, True])
@pytest.mark.parametrize("variant", [SD, PIXART, SDXL])
def test_the_autoencoders_attention_of_2022(whole: Copy, copy: Copy, variant: str, convolutions: bool) -> None:
    directory = copy(variant)
    rewrite(directory / "vae", lambda tensors: old_vae(tensors, convolutions))
    got = read(directory, variant, "vae")
    same(got, diffusers.AutoencoderKL.from_pretrained(whole(variant) / "vae").state_dict())
    if not convolutions:  # which diffusers no longer reads
        same(got, diffusers.AutoencoderKL.from_pretrained(directory / "vae").state_dict())


def test_names_of_old_and_of_today_in_one_file(whole: Copy, copy: Copy) -> None:
    """Encoder renamed, decoder not: each key is looked for by itself."""
    directory = copy(SD)

    def change(tensors: Tensors) -> Tensors:
        old = old_vae(tensors, False)
        return {
            **{name: value for name, value in old.items() if name.startswith("encoder.")},
            **{name: value for name, value in tensors.items() if not name.startswith("encoder.")},
        }

    rewrite(directory / "vae", change)
    same(read(directory, SD, "vae"), diffusers.AutoencoderKL.from_pretrained(whole(SD) / "vae").state_dict())


@pytest.mark.parametrize("prefix", [True, False], ids=["text_model", "no-prefix"])
@pytest.mark.parametrize("places", [torch.int64, torch.float16, None], ids=["int64", "float16", "none"])
@pytest.mark.parametrize(("variant", "component"), [(SD, "text_encoder"), (SDXL, "text_encoder_2")])
def test_clip_with_its_places(
    copy: Copy, variant: str, component: str, prefix: bool, places: torch.dtype | None
) -> None:
    """Until 2023 the numbers of the places were among the tensors; a file cast to halves has them as halves."""
    directory = copy(variant)
    length = json.loads((directory / component / "config.json").read_text())["max_position_embeddings"]

    def change(tensors: Tensors) -> Tensors:
        bare = {name.removeprefix("text_model."): value for name, value in tensors.items()}
        if places is not None:
            bare["embeddings.position_ids"] = torch.arange(length)[None].to(places)
        if not prefix:
            return bare
        return {name if name == "text_projection.weight" else f"text_model.{name}": v for name, v in bare.items()}

    rewrite(directory / component, change, TRANSFORMERS)
    cls: Any = transformers.CLIPTextModelWithProjection if variant == SDXL else transformers.CLIPTextModel
    want = cls.from_pretrained(directory / component)
    same(read(directory, variant, component), want.state_dict())
    job(directory, variant)
    ids = torch.tensor([[1, 5, 9, length]])
    family, checkpoint = find_model(MODELS[variant]).family, DirectoryCheckpoint(directory)
    got = real_module(family, checkpoint, component)
    with torch.no_grad():
        assert torch.equal(got(ids).last_hidden_state, want.eval()(ids).last_hidden_state)


def test_clip_without_a_model_type(whole: Copy, copy: Copy) -> None:
    directory = copy(SD)
    want = read(whole(SD), SD, "text_encoder")
    change_json(directory / "text_encoder" / "config.json", model_type=..., architectures=...)
    same(read(directory, SD, "text_encoder"), want)
    assert job(directory, SD).conditioning == job(whole(SD), SD).conditioning


def test_the_configuration_of_all_of_clip(copy: Copy) -> None:
    """A text encoder beside the configuration of both of CLIP's halves, as in CLIP's own repository."""
    directory = copy(SD)
    path = directory / "text_encoder" / "config.json"
    text = json.loads(path.read_text())
    path.write_text(json.dumps({"model_type": "clip", "architectures": ["CLIPModel"], "text_config": text}))
    want = transformers.CLIPTextModel.from_pretrained(directory / "text_encoder")
    same(read(directory, SD, "text_encoder"), want.state_dict())
    assert job(directory, SD).conditioning[0].shape == (text["max_position_embeddings"], text["hidden_size"])


@pytest.mark.parametrize("names", [["shared.weight"], ["encoder.embed_tokens.weight"], None], ids=str)
def test_t5_holds_its_words_under_either_name_or_both(whole: Copy, copy: Copy, names: list[str] | None) -> None:
    directory = copy(PIXART)
    both = ["shared.weight", "encoder.embed_tokens.weight"]

    def change(tensors: Tensors) -> Tensors:
        words = next(tensors.pop(name) for name in both if name in tensors)
        return {name: value for name, value in tensors.items() if name not in both} | {
            name: words.clone() for name in names or both
        }

    rewrite(directory / "text_encoder", change, TRANSFORMERS)
    want = transformers.T5EncoderModel.from_pretrained(whole(PIXART) / "text_encoder").state_dict()
    same(read(directory, PIXART, "text_encoder"), want)
    job(directory, PIXART)


# --- configurations of old ----------------------------------------------------------------------

TRANSFORMER_2D = {
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_type": "default",
    "double_self_attention": False,
    "dropout": 0.0,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_single",
    "num_embeds_ada_norm": 1000,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "upcast_attention": False,
    "use_linear_projection": False,
}
"""What PixArt's configuration said, beside its sizes, when the class was the one of every 2D transformer."""

LATER = {"interpolation_scale": None, "use_additional_conditions": None}
"""What the last versions of that class added."""


def as_transformer_2d(directory: Path, more: Mapping[str, Any]) -> None:
    path = directory / "transformer" / "config.json"
    config = json.loads(path.read_text())
    sizes = (
        *("attention_head_dim", "caption_channels", "cross_attention_dim", "in_channels", "num_attention_heads"),
        *("num_layers", "out_channels", "patch_size", "sample_size"),
    )
    old = {"_class_name": "Transformer2DModel", "_diffusers_version": "0.22.0.dev0", **TRANSFORMER_2D, **more}
    path.write_text(json.dumps(old | {name: config[name] for name in sizes}))
    change_json(directory / "model_index.json", transformer=["diffusers", "Transformer2DModel"])


@pytest.mark.parametrize("more", [{}, LATER], ids=["2023", "2024"])
def test_pixart_as_a_transformer_2d_model(copy: Copy, more: Mapping[str, Any]) -> None:
    directory = copy(PIXART)
    as_transformer_2d(directory, more)
    pipe = load_tiny(directory, PIXART)
    assert type(pipe.transformer).__name__ == "PixArtTransformer2DModel"
    same(read(directory, PIXART, "transformer"), pipe.transformer.state_dict())
    made = job(directory, PIXART, height=64, width=128)
    constants = {c.conditioning.name: c.value for c in made.conditioning if c.value}
    assert constants == {"resolution": (64.0, 128.0), "aspect_ratio": (0.5,)}


@pytest.mark.parametrize(
    "entries",
    [
        {"feature_extractor": ..., "safety_checker": ..., "requires_safety_checker": ...},
        {"feature_extractor": [None, None], "safety_checker": [None, None], "image_encoder": [None, None]},
        {"feature_extractor": ["transformers", "CLIPFeatureExtractor"], "_diffusers_version": "0.2.2"},
        {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "_diffusers_version": "0.6.0"},
        {"_diffusers_version": ...},
    ],
    ids=["left-out", "null", "2022-extractor", "2022-checker", "no-version"],
)
def test_entries_of_the_index_that_no_bundle_needs(copy: Copy, entries: dict[str, Any]) -> None:
    directory = copy(SD)
    change_json(directory / "model_index.json", **entries)
    made = job(directory, SD)
    assert made.components == ("text", "denoiser", "decoder", "encoder")


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "scheduler", "tokenizer"])
def test_a_component_that_the_index_does_not_name(whole: Copy, copy: Copy, component: str) -> None:
    """Its directory is there, and is read; diffusers' pipeline does the same where it is given the module by hand."""
    directory = copy(SD)
    change_json(directory / "model_index.json", **{component: ...})
    made = job(directory, SD)
    want = job(whole(SD), SD)
    assert (made.conditioning, made.latents, made.sampler) == (want.conditioning, want.latents, want.sampler)


def test_an_index_that_names_no_pipeline_is_refused(copy: Copy) -> None:
    directory = copy(SD)
    change_json(directory / "model_index.json", _class_name=...)
    assert "StableDiffusionPipeline" in refused(directory, SD)


def test_sdxl_is_silent_about_the_empty_prompt(copy: Copy) -> None:
    """diffusers' default is zeros."""
    directory = copy(SDXL)
    assert not prepared_zero(directory)
    change_json(directory / "model_index.json", force_zeros_for_empty_prompt=...)
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(directory, add_watermarker=False)
    assert pipe.config.force_zeros_for_empty_prompt is True
    assert prepared_zero(directory)


def prepared_zero(directory: Path) -> bool:
    made = job(directory, SDXL)
    return made.family.zero_negative(made.checkpoint)


def old_sd(directory: Path, **scheduler: Any) -> Any:
    """Stable Diffusion's schedulers and U-Net as they were described in 2022, read by diffusers."""
    (directory / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(
            {
                "_class_name": "PNDMScheduler",
                "_diffusers_version": "0.2.2",
                "beta_end": 0.012,
                "beta_schedule": "scaled_linear",
                "beta_start": 0.00085,
                "num_train_timesteps": 1000,
                "skip_prk_steps": True,
                "trained_betas": None,
                **scheduler,
            }
        )
    )
    change_json(directory / "model_index.json", scheduler=["diffusers", scheduler.get("_class_name", "PNDMScheduler")])
    return load_tiny(directory, SD)


PNDM, DDIM, DPM = "PNDMScheduler", "DDIMScheduler", "DPMSolverMultistepScheduler"


@pytest.mark.parametrize(
    ("scheduler", "sampler", "cls"),
    [
        ({}, "pndm", PNDM),
        ({"steps_offset": 0}, "pndm", PNDM),
        ({"steps_offset": 0}, "ddim", DDIM),
        ({"steps_offset": 0}, "dpmpp_2m", DPM),
        ({"steps_offset": 0, "timestep_spacing": "leading"}, "dpmpp_2m", DPM),
        ({"_class_name": DDIM}, "ddim", DDIM),
        ({"_class_name": DDIM, "clip_sample": True, "steps_offset": 1}, "ddim", DDIM),
        ({"_class_name": DDIM, "clip_sample": True}, "dpmpp_2m", DPM),
    ],
)
def test_schedulers_of_2022(copy: Copy, scheduler: dict[str, Any], sampler: str, cls: str) -> None:
    """diffusers' pipeline of Stable Diffusion mends two options of its scheduler when it is made."""
    directory = copy(SD)
    own = old_sd(directory, **scheduler).scheduler
    want = own if type(own).__name__ == cls else getattr(diffusers, cls).from_config(own.config)
    want.set_timesteps(20)
    made = job(directory, SD, sampler=sampler, steps=20, m=10)
    assert [call.timestep for call in made.sampler.calls] == pytest.approx(want.timesteps.tolist())


@pytest.mark.parametrize(("version", "side"), [("0.2.2", 64), ("0.8.1", 64), ("0.9.0", 32), (None, 32)])
def test_a_unet_of_2022_with_another_sample_size(copy: Copy, version: str | None, side: int) -> None:
    """diffusers takes a size below 64 for a slip where the U-Net is older than 0.9. It is the size of pictures."""
    directory = copy(SD)
    change_json(directory / "unet" / "config.json", sample_size=32, _diffusers_version=version or ...)
    pipe = load_tiny(directory, SD)
    assert pipe.unet.config.sample_size == side
    made = job(directory, SD)
    assert (made.size.height, made.size.width) == (side * pipe.vae_scale_factor,) * 2


def drawn(variant: str, directory: Path, bundle: Path, like: Path) -> tuple[Tensor, Tensor]:
    """Final latents of an export of ``directory`` (every component, one denoising graph), and of diffusers' pipeline of
    ``like``."""
    exported = export_plain(family_settings(variant, directory, bundle, steps=5))
    start = latent_noise(variant)
    request = Request(
        prompt="a large red circle",
        negative_prompt="a photo",
        steps=5,
        guidance_scale=Bundle.open(exported).manifest.guidance_scale,
        latents=start,
    )
    eager = load_tiny(like, variant)
    scheduler = diffusers.DPMSolverMultistepScheduler.from_config(eager.scheduler.config)
    with Pipeline.open(exported, threads=1) as pipe:
        got = pipe("a large red circle", negative_prompt="a photo", initial_latents=start.numpy()).latents
    return torch.from_numpy(got), plain_latents(eager, request, scheduler)


def test_a_whole_checkpoint_of_2022_draws_as_it_did(whole: Copy, copy: Copy, tmp_path: Path) -> None:
    """Everything at once, through a whole export, as diffusers draws from today's checkpoint."""
    directory = copy(SD)
    rewrite(directory / "vae", lambda tensors: old_vae(tensors, True))
    length = json.loads((directory / "text_encoder" / "config.json").read_text())["max_position_embeddings"]
    rewrite(
        directory / "text_encoder",
        lambda tensors: {
            **{f"text_model.{name.removeprefix('text_model.')}": value for name, value in tensors.items()},
            "text_model.embeddings.position_ids": torch.arange(length)[None],
        },
        TRANSFORMERS,
    )
    change_json(
        directory / "model_index.json",
        _diffusers_version="0.2.2",
        feature_extractor=...,
        safety_checker=...,
        requires_safety_checker=...,
    )
    (directory / "tokenizer" / "tokenizer.json").unlink()
    got, want = drawn(SD, directory, tmp_path / "bundle", whole(SD))
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
    for component in ("unet", "vae", "text_encoder"):
        same(read(directory, SD, component), read(whole(SD), SD, component))


@pytest.mark.slow
def test_pixart_of_2023_draws_what_diffusers_draws(copy: Copy, tmp_path: Path) -> None:
    """Its transformer, its autoencoder and its configurations, through a whole export."""
    directory = copy(PIXART)
    as_transformer_2d(directory, {})
    rewrite(directory / "vae", lambda tensors: old_vae(tensors, False))
    got, want = drawn(PIXART, directory, tmp_path / "bundle", directory)
    assert (got - want).abs().max() < 1e-4 * want.abs().max()
