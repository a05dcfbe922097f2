"""Wan as published: frames, sizes, the decoder's scale, where Wan 2.2 changes networks, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor

from tests.export.families.published import published
from tests.tiny_flow import make_tiny_flow
from tgate_engine.errors import ExportError, TgateError
from tgate_export.checkpoints.directory import DirectoryCheckpoint
from tgate_export.families import find_model
from tgate_export.families.base import Size
from tgate_export.families.wan import _Attention
from tgate_export.job import ExportSettings, prepare
from tgate_export.lora import Lora
from tgate_export.methods.late import Late
from tgate_export.sampling import compile_sampler


def test_a_latent_frame_is_one_frame_and_then_four() -> None:
    model, checkpoint = published("wan21-t2v-1.3b")
    family, size = model.family, model.family.default_size(checkpoint)
    assert (size, family.default_frames(checkpoint)) == (Size(height=480, width=832, frames=81), 81)
    assert family.latents(checkpoint, size) == (16, 21, 60, 104)
    (text,) = family.conditioning(checkpoint, size)
    assert (text.shape, text.attended) == ((512, 4096), True)
    scaling = family.scaling(checkpoint)
    assert (scaling.scale, len(scaling.mean), scaling.std[0]) == (1.0, 16, 2.8184)


@pytest.mark.parametrize(
    ("size", "said"),
    [
        (Size(height=480, width=832, frames=80), "1 more than a multiple of 4 for this model, got 80; .* 77 and 81"),
        (Size(height=480, width=840, frames=81), "the width must be a multiple of 16 pixels"),
        (Size(height=480, width=832, frames=5001), r"knows 1024 places a side \(rope_max_seq_len\)"),
    ],
)
def test_sizes_that_it_does_not_make(size: Size, said: str) -> None:
    model, checkpoint = published("wan21-t2v-1.3b")
    with pytest.raises(ExportError, match=said):
        model.family.check_size(checkpoint, size)


@pytest.mark.parametrize("rotated", [True, False])
def test_attention_is_diffusers(rotated: bool) -> None:
    torch.manual_seed(3)
    own = {"cross_attention_dim_head": None if rotated else 12, "processor": WanAttnProcessor()}
    module = WanAttention(dim=24, heads=2, dim_head=12, **own).eval()
    hidden, text = torch.randn(2, 10, 24), None if rotated else torch.randn(2, 7, 24)
    angles = torch.randn(1, 10, 1, 6).repeat_interleave(2, dim=-1)
    places = (angles.cos(), angles.sin()) if rotated else None
    with torch.no_grad():
        want = module(hidden, text, None, places)
        module.processor = _Attention()
        got = module(hidden, text, None, places)
    assert torch.allclose(got, want, atol=1e-6)
    assert got.abs().max() > 0.1


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        (
            "model_index.json",
            {"transformer_2": ["diffusers", "WanTransformer3DModel"]},
            r"has a second transformer \(transformer_2\) and no boundary_ratio",
        ),
        ("model_index.json", {"boundary_ratio": 0.875}, "boundary_ratio = 0.875 and no transformer_2"),
        ("model_index.json", {"expand_timesteps": True}, "expand_timesteps = True, as Wan 2.2 of 5 billion"),
        ("transformer/config.json", {"image_dim": 16}, "takes a picture beside the prompt"),
        ("transformer/config.json", {"patch_size": [2, 2, 2]}, r"patch_size = \[2, 2, 2\]"),
        ("transformer/config.json", {"out_channels": 8}, "takes 4 channels and gives 8"),
        ("vae/config.json", {"patch_size": 2}, "patch_size = 2, Wan 2.1 has None"),
        ("vae/config.json", {"scale_factor_temporal": 4}, "make 4 and 2; they must agree"),
        ("vae/config.json", {"latents_mean": [0.0]}, "1 latents_mean and 4 latents_std for 4 channels"),
    ],
)
def test_other_models_of_the_kind_are_refused(tmp_path: Path, file: str, changes: dict[str, Any], said: str) -> None:
    root = make_tiny_flow(tmp_path / "checkpoint", "wan_a")
    _change(root / file, changes)
    with pytest.raises(ExportError, match=said):
        _check(root)


def test_the_second_network_runs_below_its_share_of_the_noise() -> None:
    """By the authors' own noise levels, and by those of another shift."""
    model, checkpoint = published("wan22-t2v-a14b")
    family = model.family
    assert (family.late(checkpoint), family.denoisers(checkpoint)) == (875.0, ("transformer", "transformer_2"))
    config = family.scheduler_config(checkpoint, family.default_size(checkpoint))
    for shift, first in ((12.0, 26), (3.0, 13)):
        sampler = compile_sampler("unipc", {**config, "flow_shift": shift}, model.steps)
        late = Late(below=875.0).calls(sampler)
        assert late == (False,) * first + (True,) * (model.steps - first)
    one, checkpoint = published("wan21-t2v-14b")
    assert (one.family.late(checkpoint), one.family.denoisers(checkpoint)) == (None, ("transformer",))


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("model_index.json", {"boundary_ratio": 875}, "boundary_ratio = 875; a number between 0 and 1 is wanted"),
        ("model_index.json", {"boundary_ratio": True}, "boundary_ratio = True; a number between 0 and 1 is wanted"),
        ("model_index.json", {"boundary_ratio": "0.9"}, "boundary_ratio = '0.9'; a number between 0 and 1 is wanted"),
        ("model_index.json", {"transformer_2": [None, None]}, "boundary_ratio = 0.875 and no transformer_2"),
        ("model_index.json", {"transformer_2": ["diffusers", "UNet2DModel"]}, "transformer_2 is a UNet2DModel in"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 0}, "num_train_timesteps = 0; a whole number from"),
        (
            "transformer_2/config.json",
            {"num_layers": 1},
            "has num_layers = 2, transformer_2/config.json 1; both networks",
        ),
    ],
)
def test_two_networks_that_do_not_belong_together_are_refused(
    tmp_path: Path, file: str, changes: dict[str, Any], said: str
) -> None:
    root = make_tiny_flow(tmp_path / "checkpoint", "wan22_a")
    _change(root / file, changes)
    with pytest.raises(ExportError, match=said):
        _check(root)


def test_a_second_network_that_is_not_there_is_told(tmp_path: Path) -> None:
    root = make_tiny_flow(tmp_path / "checkpoint", "wan22_a")
    shutil.rmtree(root / "transformer_2")
    with pytest.raises(ExportError, match=r"transformer_2/config.json is missing; the checkpoint is incomplete"):
        _check(root)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"forecast_interval": 2}, "forecasts .every 2 steps. are not made of a model of two networks"),
        ({"method": "forecast", "k": None}, "forecasts .every 2 steps. are not made of a model of two networks"),
        ({"method": "deepcache", "m": None, "k": None}, "method deepcache keeps what a U-Net's last layers take"),
        ({"method": "tgate+deepcache", "k": None}, "method tgate.deepcache keeps what a U-Net's last layers take"),
        ({"method": "tome", "m": None, "k": None}, "method tome merges"),
        ({"method": "tgate+tome"}, "method tgate.tome merges"),
        ({"loras": True}, r"has two networks \(transformer, transformer_2\), and which of them .* is for is not known"),
        ({"guidance_scale": 1.0, "guidance_scale_2": 3.0}, "with --guidance-scale 1 there is no guidance"),
        ({"guidance_scale_2": -1.0}, "the guidance scale must be"),
    ],
)
def test_what_two_networks_do_not_take(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    root = make_tiny_flow(tmp_path / "checkpoint", "wan22_a")
    if options.get("loras"):
        (tmp_path / "x.safetensors").touch()
        options = {"loras": (Lora(tmp_path / "x.safetensors"),)}
    with pytest.raises(TgateError, match=said):
        prepare(_settings(root, tmp_path / "bundle", **options))
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("variant", "options", "said"),
    [
        ("wan_a", {"guidance_scale_2": 3.0}, "--guidance-scale-2 3 would change nothing: .* has one network"),
        ("wan22_a", {}, None),
    ],
)
def test_a_second_guidance_scale_is_the_second_networks(
    tmp_path: Path, variant: str, options: dict[str, Any], said: str | None
) -> None:
    root = make_tiny_flow(tmp_path / "checkpoint", variant)
    settings = _settings(root, tmp_path / "bundle", **options)
    if said is not None:
        with pytest.raises(ExportError, match=said):
            prepare(settings)
        return
    assert prepare(settings).late == Late(below=875.0, guidance=3.0, beside=4.0), "the model's own"
    assert prepare(replace(settings, guidance_scale_2=2.0)).late == Late(below=875.0, guidance=2.0, beside=4.0)
    job = prepare(replace(settings, guidance_scale=6.0, guidance_scale_2=2.0))
    ramps = {variant.name: job.ramp(variant) for variant in job.variants}
    assert ramps["full"] is None
    assert ramps["late_full"] == pytest.approx(1 / 5)
    unguided = prepare(replace(settings, guidance_scale=1.0))
    assert unguided.late is not None
    assert {unguided.ramp(variant) for variant in unguided.variants} == {None}


def _settings(root: Path, output: Path, **options: Any) -> ExportSettings:
    named = {"steps": 6, "m": 3, "k": 2, "height": 16, "width": 32, "frames": 5, "components": ("denoiser",)}
    return ExportSettings(**{"model": "wan22-t2v-a14b", "checkpoint": str(root), "output": output, **named, **options})


def _change(path: Path, changes: dict[str, Any]) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def _check(root: Path) -> None:
    checkpoint, family = DirectoryCheckpoint(root), find_model("wan21-t2v-1.3b").family
    family.check_pipeline(checkpoint)
    family.check(checkpoint)
    family.scaling(checkpoint)
    family.late(checkpoint)
