"""What an export is asked to do, and a checkpoint's odd files, end in one line before any work."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import family_settings
from tests.export.checkpoints.leaves import bounded
from tests.tiny_families import FAMILY_VARIANTS, make_tiny
from tgate_engine.errors import ExportError, TgateError
from tgate_export.families import MODELS
from tgate_export.job import ExportSettings, prepare
from tgate_export.lora import Lora

VARIANT = "sd15_a"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny(tmp_path_factory.mktemp("whole") / "checkpoint", VARIANT)


@pytest.fixture
def copied(whole: Path, tmp_path: Path) -> Path:
    shutil.copytree(whole, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def refusal(root: Path, **more: Any) -> str:
    settings = replace(family_settings(VARIANT, root, root.parent / "bundle"), fidelity_interval=None, **more)
    with pytest.raises(TgateError) as caught:
        prepare(settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"sampler": ""}, "no sampler ''"),
        ({"components": ("denoiser", "denoiser")}, "each once"),
        ({"components": ()}, "got none"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"weights": "mine"}, "unknown weights 'mine'"),
        ({"method": "toca"}, "unknown method 'toca'; choose one of tgate"),
        ({"method": "deepcache", "m": 3}, "--m 3 would change nothing: method deepcache has no gate"),
        ({"method": "deepcache", "k": 2}, "--k 2 would change nothing: method deepcache reuses no self-attention"),
        ({"method": "tgate+deepcache", "cache_interval": 1}, "caches nothing at n = 25, m = 10"),
        ({"method": "tgate+deepcache", "forecast_interval": 2}, "don't go together"),
        ({"method": "deepcache", "cache_branch": 9}, "--cache-branch must be from 0 to 3, got 9"),
        ({"cache_branch": 1}, "--cache-branch 1 would change nothing: method tgate makes no shallow call"),
        ({"cache_interval": 3}, "--cache-interval 3 would change nothing: method tgate makes no shallow call"),
        ({"method": "guidance_delta", "guidance_scale": 1.0}, "exported without them"),
        ({"method": "guidance_delta", "k": 2}, "--k 2 would change nothing"),
        ({"batches": [(0, 2)]}, "got 0:2"),
        ({"batches": [(4, 1)]}, "got 4:1"),
        ({"batches": [(1, 4), (8, 8), (4, 6)]}, "--batch ranges may not overlap"),
        ({"sizes": [(64, 64)]}, "give --size, or --height and --width, not both"),
        ({"height": None, "width": None, "sizes": [(64, 64), (96, 64), (64, 64)]}, "--size names 64x64 more than once"),
        ({"height": None, "width": None, "sizes": [(64, 64), (60, 64)]}, "the width must be a multiple of 8"),
    ],
)
def test_settings_that_mean_nothing_are_refused(whole: Path, settings: dict[str, Any], said: str) -> None:
    assert said in refusal(whole, **settings)


def test_what_a_job_is_made_of(whole: Path, tmp_path: Path) -> None:
    """Settings that are left out are the model's; a further size changes latents, not the network or the plan."""
    own = FAMILY_VARIANTS[VARIANT]
    height, width = (side * own.vae_factor for side in own.latents[1:])
    sizes = [(width, height), (height, width)]
    job = prepare(ExportSettings(model="sd15", checkpoint=str(whole), sizes=sizes, batches=[(1, 2)]))
    model = MODELS["sd15"]
    assert (job.method_settings.steps, job.method_settings.gate) == (model.steps, model.gate)
    assert (job.sampler.name, job.sampler.steps, job.guidance_scale) == (model.sampler, 25, model.guidance_scale)
    assert [str(size) for size in job.sizes] == ["96x64", "64x96"]
    assert job.latents == own.latents == (4, 8, 12)
    other = job.at(job.sizes[1])
    assert other.latents == (4, 12, 8)
    assert (other.sites, other.sampler, other.variants) == (job.sites, job.sampler, job.variants)
    assert {site.kind for site in job.sites} == {"self", "cross"}
    assert [v.name for v in job.variants] == ["full", "reuse_self", "reuse_cross", "unguided"]
    assert job.batches == ((1, 2),)


@pytest.mark.parametrize("size", [0, -8])
def test_a_size_of_nothing_is_refused(whole: Path, size: int) -> None:
    with pytest.raises(ExportError, match=r"the width must be a multiple of 8"):
        prepare(ExportSettings(model="sd15", checkpoint=str(whole), width=size))


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("model_index.json", {"scheduler": ["diffusers", "Foo"]}, "scheduler is Foo"),
        ("model_index.json", {"scheduler": ["diffusers", 5]}, "a library and a class are wanted"),
        ("model_index.json", {"scheduler": "EulerDiscreteScheduler"}, "a library and a class are wanted"),
        ("model_index.json", {"unet": [None, None]}, "there is no unet"),
        ("model_index.json", {"scheduler": [None, None]}, "there is no scheduler"),
        ("vae/config.json", {"shift_factor": "x"}, "shift_factor"),
        ("vae/config.json", {"latents_mean": "abc", "latents_std": "abc"}, "latents_mean"),
        ("vae/config.json", {"up_block_types": ["UpDecoderBlock2D"]}, "up_block_types"),
        ("unet/config.json", {"sample_size": [8]}, ""),
        ("unet/config.json", {"quantization_config": "int8"}, "int8"),
        (
            "unet/config.json",
            {"block_out_channels": "text"},
            "unet/config.json has block_out_channels = 'text' (text); a list is wanted",
        ),
        ("text_encoder/config.json", {"is_causal": False}, "is_causal"),
        ("text_encoder/config.json", {"model_type": "t5"}, "model_type"),
    ],
)
def test_files_that_say_something_odd_are_refused(copied: Path, file: str, changes: dict[str, Any], said: str) -> None:
    path = copied / file
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")
    if changes == {"sample_size": [8]}:  # which only matters where no size is asked for
        with pytest.raises(ExportError, match="give --size WIDTHxHEIGHT"):
            prepare(ExportSettings(model="sd15", checkpoint=str(copied)))
        return
    assert said in refusal(copied)


def test_weights_twice_over_are_refused(copied: Path) -> None:
    """diffusers reads the shards, transformers the single file: what is left over from an earlier save is not told."""
    index = {"weight_map": {"conv_in.weight": "diffusion_pytorch_model-00001-of-00001.safetensors"}}
    (copied / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    assert "remove what is left over" in refusal(copied)


@pytest.mark.parametrize(
    ("variant", "options", "said"),
    [
        ("sd15_a", {"clip_skip": 2}, r"--clip-skip must be from 1 to 1"),
        ("sd15_a", {"clip_skip": -1}, r"--clip-skip must be from 1 to 1"),
        ("sd15_a", {"guidance_rescale": 1.5}, r"--guidance-rescale must be from 0 to 1"),
        ("sd15_a", {"guidance_rescale": float("nan")}, r"--guidance-rescale must be from 0 to 1"),
        ("sd15_a", {"guidance_rescale": 0.5, "guidance_scale": 1.0}, r"would change nothing"),
        ("lcm_sdxl", {"guidance_rescale": 0.5}, r"would change nothing"),
        ("pixart_alpha_a", {"clip_skip": 1}, r"--clip-skip is for models with CLIP"),
        ("pixart_alpha_a", {"guidance_rescale": 0.5}, r"does not rescale guidance"),
    ],
)
def test_options_that_mean_nothing_are_refused(
    tmp_path: Path, variant: str, options: dict[str, Any], said: str
) -> None:
    root = make_tiny(tmp_path / "checkpoint", variant)
    with pytest.raises(ExportError, match=said):
        prepare(family_settings(variant, root, tmp_path / "bundle", **options))


def test_forecasts_of_a_sampler_that_draws_noise_are_refused_before_any_work(tmp_path: Path) -> None:
    root = make_tiny(tmp_path / "checkpoint", "sd15_a")
    settings = replace(
        family_settings("sd15_a", root, tmp_path / "bundle", sampler="lcm", steps=8, m=4, forecast_interval=2),
        fidelity_interval=1,
    )
    with pytest.raises(TgateError, match="sampler lcm draws noise in every step, and none can be left out"):
        prepare(settings)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"steps": 10**9}, "steps .n. must be from 1 to 1000"),
        ({"steps": 10**400}, "steps .n. must be"),
        ({"steps": 0}, "steps .n. must be"),
        ({"m": 2**63}, "gate step m must be between 1"),
        ({"k": 2**63}, "self_interval must be at most"),
        ({"warm_up": 2**63}, "warm_up must be at most"),
        ({"fidelity_interval": 2**63}, "fidelity_interval must be at most"),
        ({"method": "deepcache", "cache_interval": 2**63}, "cache_interval must be at most"),
        ({"method": "deepcache", "cache_branch": 2**63}, "--cache-branch must be at most 256"),
        ({"guidance_scale": float("nan")}, "guidance scale must be a finite number"),
        ({"guidance_scale": float("inf")}, "guidance scale must be a finite number"),
        ({"guidance_scale": 1e308}, "guidance scale must be a finite number"),
        ({"sizes": [(999999, 999999)]}, "--size must be at most 16384, got 999999"),
        ({"height": 10**400}, "--size must be at most 16384"),
        ({"frames": 10**9}, "--frames must be at most 1024"),
        ({"clip_skip": 10**9}, "--clip-skip must be at most 256"),
        ({"batches": [(1, 10**9)]}, "--batch takes"),
        ({"model": "x" * 10**5}, "unknown model"),
        ({"dtype": "x\n" * 10**5}, "unknown dtype"),
        ({"weights": "x\n"}, "unknown weights"),
        ({"components": ["x\n" * 10**5]}, "--components"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_absurd_numbers_are_refused_before_a_checkpoint_is_opened(settings: dict[str, Any], said: str) -> None:
    """There is none, and nothing says so."""
    with bounded(), pytest.raises(TgateError, match=said) as caught:
        prepare(ExportSettings(**{"model": "sd15", "checkpoint": "/nowhere", **settings}))
    line = str(caught.value)
    assert "\n" not in line
    assert "nowhere" not in line
    assert len(line) < 600


def test_a_pipeline_of_no_family_is_refused_before_a_lora_is_read(copied: Path, tmp_path: Path) -> None:
    """Its name would be looked up in diffusers."""
    (tmp_path / "none.safetensors").touch()
    index = json.loads((copied / "model_index.json").read_text("utf-8"))
    for name in ("utils", "__builtins__", ["StableDiffusionPipeline"], None):
        (copied / "model_index.json").write_text(json.dumps(index | {"_class_name": name}), "utf-8")
        assert "wanted is a StableDiffusionPipeline" in refusal(copied, loras=[Lora(tmp_path / "none.safetensors")])


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        (
            "model_index.json",
            {"unet": ["my_unet", "UNet2DConditionModel"]},
            "code of the checkpoint's own is never run",
        ),
        ("model_index.json", {"unet": [None, "UNet2DConditionModel"]}, "code of the checkpoint's own is never run"),
        ("model_index.json", {"auto_map": {"a": "b.C"}}, "auto_map"),
        ("unet/config.json", {"auto_map": {"a": "b.C"}}, "auto_map"),
        (
            "unet/config.json",
            {"_class_name": ["UNet2DConditionModel"]},
            "_class_name = ['UNet2DConditionModel'] (a list)",
        ),
        ("unet/config.json", {"_class_name": "a.b\n"}, "the name of a class is wanted"),
        ("text_encoder/config.json", {"auto_map": {"a": "b.C"}}, "auto_map"),
        ("text_encoder/config.json", {"attn_implementation": "a/b"}, "attn_implementation"),
        ("scheduler/scheduler_config.json", {"_class_name": {}}, "_class_name"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 10**7}, "num_train_timesteps = 10000000"),
        ("scheduler/scheduler_config.json", {"beta_start": "text"}, "beta_start = 'text'"),
        ("scheduler/scheduler_config.json", {"trained_betas": [0.1] * 20_000}, "trained_betas"),
        ("scheduler/scheduler_config.json", {"solver_order": 10**7}, "solver_order = 10000000"),
    ],
    ids=str,
)
def test_files_of_a_stranger_are_refused(copied: Path, file: str, changes: dict[str, Any], said: str) -> None:
    config = json.loads((copied / file).read_text("utf-8")) | changes
    (copied / file).write_text(json.dumps(config), "utf-8")
    line = refusal(copied)
    assert said in line
    assert "\n" not in line
