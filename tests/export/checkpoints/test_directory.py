"""Checkpoints as diffusers and transformers wrote them years ago, in halves, in shards and in the hub's cache.

Each is made of a small checkpoint of today. What is read is what diffusers' own loader reads from the same directory,
or where it reads nothing, what the checkpoint was made of. What is refused is refused in one line that names the file,
and a pickle is never opened.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.conftest import family_settings
from tests.hub import cached
from tests.oracle_families import Request, plain_latents
from tests.tiny_families import FAMILY_VARIANTS, latent_noise, load_tiny, make_tiny
from tests.tiny_models import make_tiny_sdxl
from tgate_cli.main import export_main
from tgate_engine.bundle import Bundle
from tgate_engine.errors import ExportError
from tgate_engine.report import Silent
from tgate_export.build import export
from tgate_export.checkpoints.directory import DirectoryCheckpoint
from tgate_export.families import find_model
from tgate_export.job import ExportSettings, Job, prepare
from tgate_export.modules import real_module
from tgate_runtime.pipeline import Pipeline

SD, PIXART, SDXL = "sd21_v", "pixart_alpha_1024", "sdxl"
MODELS = {SD: "sd21", PIXART: "pixart-alpha", SDXL: "sdxl"}
DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"
"""What the files of weights are called, by the library that wrote them."""

Copy = Callable[[str], Path]
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """Small checkpoints as they are written today. Read only."""

    @functools.cache
    def make(variant: str) -> Path:
        target = tmp_path_factory.mktemp(variant) / "checkpoint"
        return make_tiny_sdxl(target, "conv_projection") if variant == SDXL else make_tiny(target, variant)

    return make


@pytest.fixture
def copy(whole: Copy, tmp_path: Path) -> Copy:
    """The same, to be changed."""

    def make(variant: str) -> Path:
        target = tmp_path / variant
        shutil.copytree(whole(variant), target)
        return target

    return make


def rewrite(folder: Path, change: Callable[[Tensors], Tensors], stem: str = DIFFUSERS) -> None:
    """Write a component's one file of weights again, as old versions did: without metadata."""
    path = folder / f"{stem}.safetensors"
    tensors = change(load_file(path))
    path.unlink()
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


def change_json(path: Path, **changes: Any) -> None:
    """Set entries of a JSON file; None as a value is null, ``...`` leaves the entry out."""
    content = json.loads(path.read_text("utf-8")) | changes
    kept = {key: value for key, value in content.items() if value is not ...}
    path.write_text(json.dumps(kept, indent=2), "utf-8")


def read(directory: Path, variant: str, component: str, **options: Any) -> Tensors:
    """A component's weights and buffers as the exporter reads them."""
    checkpoint = DirectoryCheckpoint(directory, **options)
    return dict(real_module(find_model(MODELS[variant]).family, checkpoint, component).state_dict())


def same(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def job(directory: Path, variant: str, **more: Any) -> Job:
    return prepare(ExportSettings(model=MODELS[variant], checkpoint=str(directory), **more))


def refused(directory: Path, variant: str, **options: Any) -> str:
    """The one line of a checkpoint that is refused before any work starts."""
    with pytest.raises(ExportError) as caught:
        job(directory, variant, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    assert made.components == ("text", "denoiser", "decoder")


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


def test_a_whole_checkpoint_of_2022(family_bundle: Callable[[str], tuple[Path, Path]], tmp_path: Path) -> None:
    """Everything at once, through a whole export: the same weights and graphs as of today's checkpoint."""
    checkpoint, bundle = family_bundle(SD)
    directory = tmp_path / "old"
    shutil.copytree(checkpoint, directory)
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
    for name in ("tokenizer.json",):
        (directory / "tokenizer" / name).unlink()
    old = export(family_settings(SD, directory, tmp_path / "bundle"), Silent())
    assert (old / "weights.safetensors").read_bytes() == (bundle / "weights.safetensors").read_bytes()
    graphs = sorted(path.name for path in bundle.glob("*.onnx"))
    assert graphs == sorted(path.name for path in old.glob("*.onnx"))
    assert [name for name in graphs if (old / name).read_bytes() != (bundle / name).read_bytes()] == []
    ids = [Pipeline.open(path, threads=1, plans=["ungated"]) for path in (bundle, old)]
    start = latent_noise(SD).numpy()
    drawn = [pipe("a large red circle", plan="ungated", seed=1, initial_latents=start).latents for pipe in ids]
    assert (drawn[0] == drawn[1]).all()


@pytest.mark.slow
def test_pixart_of_2023_draws_what_diffusers_draws(copy: Copy, tmp_path: Path) -> None:
    """Its transformer, its autoencoder and its configurations, through a whole export."""
    directory = copy(PIXART)
    as_transformer_2d(directory, {})
    rewrite(directory / "vae", lambda tensors: old_vae(tensors, False))
    bundle = Bundle.open(export(family_settings(PIXART, directory, tmp_path / "bundle", steps=5), Silent()))
    eager, start = load_tiny(directory, PIXART), latent_noise(PIXART)
    request = Request(
        prompt="a large red circle",
        negative_prompt="a photo",
        steps=5,
        guidance_scale=bundle.manifest.guidance_scale,
        latents=start,
    )
    want = plain_latents(eager, request, eager.scheduler).numpy()
    with Pipeline.open(bundle, threads=1, plans=["ungated"]) as pipe:
        got = pipe("a large red circle", negative_prompt="a photo", plan="ungated", initial_latents=start.numpy())
    assert abs(got.latents - want).max() < 1e-4 * abs(want).max()


# --- pickles ------------------------------------------------------------------------------------


class Trap:
    """Whoever unpickles it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self.path,))


def trap(file: Path, sprung: Path) -> None:
    torch.save({"conv_in.weight": Trap(sprung)}, file)


def test_the_trap_works(tmp_path: Path) -> None:
    trap(tmp_path / "weights.bin", tmp_path / "sprung")
    torch.load(tmp_path / "weights.bin", weights_only=False)
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("component", "name"),
    [
        ("unet", "diffusion_pytorch_model.bin"),
        ("unet", "diffusion_pytorch_model.fp16.bin"),
        ("vae", "diffusion_pytorch_model.bin"),
        ("text_encoder", "pytorch_model.bin"),
        ("text_encoder", "pytorch_model-00001-of-00002.bin"),
        ("unet", "diffusion_pytorch_model.safetensors"),
        ("text_encoder", "model.safetensors"),
        ("unet", "model.ckpt"),
        ("unet", "model.pt"),
    ],
)
def test_a_pickle_is_refused_and_never_opened(
    copy: Copy, tmp_path: Path, capsys: pytest.CaptureFixture[str], component: str, name: str
) -> None:
    """Whatever it is called, and one that calls itself safetensors as well."""
    directory, sprung = copy(SD), tmp_path / "sprung"
    for file in (directory / component).glob("*.safetensors"):
        file.unlink()
    trap(directory / component / name, sprung)
    arguments = ["--model", MODELS[SD], "--checkpoint", str(directory), "--output", str(tmp_path / "bundle")]
    capsys.readouterr()
    assert export_main([*arguments, "--height", "64", "--width", "64", "--quiet"]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("tgate: error: ")
    assert str(directory / component) in lines[0]
    assert "safetensors" in lines[0]
    assert name in lines[0] or not name.endswith(".bin")
    assert not sprung.exists()
    assert not (tmp_path / "bundle").exists()


def test_a_pickle_beside_the_weights_is_left_alone(whole: Copy, copy: Copy, tmp_path: Path) -> None:
    directory, sprung = copy(SD), tmp_path / "sprung"
    for component in ("unet", "vae"):
        trap(directory / component / "diffusion_pytorch_model.bin", sprung)
    trap(directory / "text_encoder" / "pytorch_model.bin", sprung)
    for component in ("unet", "vae", "text_encoder"):
        same(read(directory, SD, component), read(whole(SD), SD, component))
    job(directory, SD)
    assert not sprung.exists()


def test_an_index_that_names_a_pickle(copy: Copy, tmp_path: Path) -> None:
    directory, sprung = copy(SD), tmp_path / "sprung"
    keys = load_file(directory / "unet" / f"{DIFFUSERS}.safetensors").keys()
    (directory / "unet" / f"{DIFFUSERS}.safetensors").unlink()
    trap(directory / "unet" / "part.bin", sprung)
    index = {"metadata": {}, "weight_map": dict.fromkeys(keys, "part.bin")}
    (directory / "unet" / f"{DIFFUSERS}.safetensors.index.json").write_text(json.dumps(index))
    assert "part.bin" in refused(directory, SD)
    assert not sprung.exists()


# --- halves -------------------------------------------------------------------------------------


def halves(folder: Path, stem: str = DIFFUSERS, *, alone: bool) -> Tensors:
    """Write the fp16 file of a component: other values than the full file's, so that they can be told apart."""
    tensors = load_file(folder / f"{stem}.safetensors")
    found = {name: (value * 0.5).half() if value.is_floating_point() else value for name, value in tensors.items()}
    save_file(found, folder / f"{stem}.fp16.safetensors", {"format": "pt"})
    if alone:
        (folder / f"{stem}.safetensors").unlink()
    return found


@pytest.mark.parametrize("prefer_half", [False, True], ids=["fp32", "fp16"])
@pytest.mark.parametrize("alone", [False, True], ids=["both", "alone"])
def test_the_fp16_variant(whole: Copy, copy: Copy, alone: bool, prefer_half: bool) -> None:
    """Read where it is wanted, or where there is nothing else."""
    directory = copy(SD)
    for component, stem in (("unet", DIFFUSERS), ("vae", DIFFUSERS), ("text_encoder", TRANSFORMERS)):
        halves(directory / component, stem, alone=alone)
    variant = "fp16" if prefer_half or alone else None
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(directory, variant=variant, dtype=torch.float32)
    for component in ("unet", "vae", "text_encoder"):
        got = read(directory, SD, component, prefer_half=prefer_half)
        same(got, getattr(pipe, component).state_dict())
        full = read(whole(SD), SD, component)
        assert any(not torch.equal(got[name], full[name]) for name in full) is (variant == "fp16")


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_the_dtype_of_an_export_chooses(copy: Copy, dtype: str) -> None:
    directory = copy(SD)
    half = halves(directory / "unet", alone=False)["conv_in.weight"]
    got = job(directory, SD, dtype=dtype).checkpoint.tensors("unet").read("conv_in.weight")
    if dtype == "fp32":
        assert got.dtype == torch.float32
        assert not torch.equal(got.half(), half)
    else:
        assert torch.equal(got, half)


@pytest.mark.parametrize("name", ["index.fp16.json", "fp16.index.json"])
@pytest.mark.parametrize("component", ["unet", "text_encoder"])
def test_shards_of_halves_under_both_names_of_their_index(copy: Copy, component: str, name: str) -> None:
    """Written by diffusers and transformers themselves, whose name for the index changed and changed back."""
    directory = copy(SD)
    module = getattr(load_tiny(directory, SD), component).half()
    stem = DIFFUSERS if component == "unet" else TRANSFORMERS
    shutil.rmtree(directory / component)
    module.save_pretrained(directory / component, variant="fp16", max_shard_size="30KB")
    (written,) = (directory / component).glob("*.index*.json")
    wanted = f"{stem}.safetensors.{name}" if name.startswith("index") else f"{stem}.fp16.safetensors.index.json"
    written.rename(directory / component / wanted)
    assert len(list((directory / component).glob("*.safetensors"))) > 1
    for prefer_half in (False, True):
        same(read(directory, SD, component, prefer_half=prefer_half), module.float().state_dict())


def test_weights_without_moving_averages_are_left_alone(whole: Copy, copy: Copy) -> None:
    """Stable Diffusion 1.5 has them beside its own, under names that look like a variant's."""
    directory = copy(SD)
    tensors = load_file(directory / "unet" / f"{DIFFUSERS}.safetensors")
    save_file(
        {name: value * 2 for name, value in tensors.items()}, directory / "unet" / f"{DIFFUSERS}.non_ema.safetensors"
    )
    for prefer_half in (False, True):
        same(read(directory, SD, "unet", prefer_half=prefer_half), read(whole(SD), SD, "unet"))
    (directory / "unet" / f"{DIFFUSERS}.safetensors").unlink()
    assert "no safetensors weights" in refused(directory, SD)


# --- shards -------------------------------------------------------------------------------------


def sharded(directory: Path) -> dict[str, Any]:
    """Cut the U-Net into shards, by diffusers. Gives their index."""
    unet = load_tiny(directory, SD).unet
    shutil.rmtree(directory / "unet")
    unet.save_pretrained(directory / "unet", max_shard_size="200KB")
    index: dict[str, Any] = json.loads(index_of(directory).read_text())
    assert len(set(index["weight_map"].values())) > 1
    return index


def index_of(directory: Path) -> Path:
    return directory / "unet" / f"{DIFFUSERS}.safetensors.index.json"


def test_shards_are_read(whole: Copy, copy: Copy) -> None:
    directory = copy(SD)
    sharded(directory)
    same(read(directory, SD, "unet"), read(whole(SD), SD, "unet"))
    same(read(directory, SD, "unet"), load_tiny(directory, SD).unet.state_dict())


def test_a_shard_that_is_missing(copy: Copy) -> None:
    directory = copy(SD)
    name = sorted(set(sharded(directory)["weight_map"].values()))[1]
    (directory / "unet" / name).unlink()
    assert name in refused(directory, SD)


def test_a_shard_that_is_cut_off(copy: Copy) -> None:
    directory = copy(SD)
    name = sorted(set(sharded(directory)["weight_map"].values()))[1]
    path = directory / "unet" / name
    path.write_bytes(path.read_bytes()[:-100])
    assert name in refused(directory, SD)


@pytest.mark.parametrize("place", ["../vae/{}", "{root}/vae/{}", "../../{}", "sub/{}"])
def test_an_index_that_names_another_directory(copy: Copy, place: str) -> None:
    """Even where a file of that name lies there."""
    directory = copy(SD)
    index = sharded(directory)
    name = sorted(set(index["weight_map"].values()))[0]
    there = place.format(name, root=directory)
    (directory / "unet" / "sub").mkdir()
    shutil.move(directory / "unet" / name, directory / "unet" / there)
    index["weight_map"] = {key: there if file == name else file for key, file in index["weight_map"].items()}
    index_of(directory).write_text(json.dumps(index))
    assert there in refused(directory, SD)


def test_one_tensor_in_two_shards(copy: Copy) -> None:
    """Which of them counts nothing says, and they may differ."""
    directory = copy(SD)
    first, second = sorted(set(sharded(directory)["weight_map"].values()))[:2]
    tensors = load_file(directory / "unet" / first)
    key = sorted(tensors)[0]
    other = load_file(directory / "unet" / second) | {key: tensors[key] + 1}
    save_file(other, directory / "unet" / second)
    line = refused(directory, SD)
    assert key in line
    assert first in line or second in line


@pytest.mark.parametrize(
    "content",
    ["{", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": null}'],
)
def test_an_index_that_is_none(copy: Copy, content: str) -> None:
    directory = copy(SD)
    sharded(directory)
    index_of(directory).write_text(content)
    assert str(index_of(directory)) in refused(directory, SD)


def test_a_tensor_that_no_shard_has(copy: Copy) -> None:
    """The index promises it."""
    directory = copy(SD)
    index = sharded(directory)
    name = index["weight_map"]["conv_in.weight"]
    tensors = load_file(directory / "unet" / name)
    del tensors["conv_in.weight"]
    save_file(tensors, directory / "unet" / name)
    with pytest.raises(ExportError, match=r"conv_in\.weight") as caught:
        read(directory, SD, "unet")
    assert "\n" not in str(caught.value)


# --- the hub's cache ----------------------------------------------------------------------------


def test_a_snapshot_of_links(whole: Copy, tmp_path: Path) -> None:
    """Given by its path, as ``huggingface-cli download`` prints it."""
    snapshot = cached(tmp_path, "owner/name", whole(SD))
    links = [path for path in snapshot.rglob("*") if path.is_symlink()]
    assert len(links) > 8
    assert not any(os.path.isabs(os.readlink(link)) for link in links)
    for component in ("unet", "vae", "text_encoder"):
        same(read(snapshot, SD, component), read(whole(SD), SD, component))
    made, want = job(snapshot, SD), job(whole(SD), SD)
    assert (made.conditioning, made.latents, made.sampler) == (want.conditioning, want.latents, want.sampler)


def test_shards_in_a_snapshot_of_links(whole: Copy, copy: Copy, tmp_path: Path) -> None:
    directory = copy(SD)
    sharded(directory)
    snapshot = cached(tmp_path, "owner/name", directory)
    same(read(snapshot, SD, "unet"), read(whole(SD), SD, "unet"))


LINKS = (
    "unet/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "text_encoder/model.safetensors",
    "scheduler/scheduler_config.json",
    "model_index.json",
)


@pytest.mark.parametrize("name", LINKS)
def test_a_link_that_points_nowhere(whole: Copy, tmp_path: Path, name: str) -> None:
    """A download that was broken off, or a cache that was cleaned: the line names the link, and says what it is."""
    snapshot = cached(tmp_path, "owner/name", whole(SD))
    (snapshot / name).resolve().unlink()
    assert (snapshot / name).is_symlink()
    line = refused(snapshot, SD)
    assert name in line
    assert "link" in line


def test_a_link_that_points_nowhere_does_not_choose_another_file(whole: Copy, copy: Copy, tmp_path: Path) -> None:
    """Were it passed over, halves would be exported as if they were the full weights."""
    directory = copy(SD)
    halves(directory / "unet", alone=False)
    snapshot = cached(tmp_path, "owner/name", directory)
    (snapshot / LINKS[0]).resolve().unlink()
    assert LINKS[0] in refused(snapshot, SD)


def test_families_have_these_variants() -> None:
    assert all(FAMILY_VARIANTS[name].model == MODELS[name] for name in (SD, PIXART))
