"""Stable Diffusion 3 and 3.5 as published: three texts, joint attention, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.export.families.published import published
from tests.tiny_flow import make_tiny_flow
from tgate_engine.errors import ExportError
from tgate_export.checkpoints.directory import DirectoryCheckpoint
from tgate_export.families import find_model
from tgate_export.families.base import Size
from tgate_export.job import ExportSettings, prepare
from tgate_export.modules import real_module

SIZE = Size(height=1024, width=1024)


@pytest.mark.parametrize("name", ["sd3-medium", pytest.param("sd35-medium", marks=pytest.mark.slow)])
def test_texts_lie_one_behind_the_other(name: str) -> None:
    model, checkpoint = published(name)
    text, pooled = model.family.conditioning(checkpoint, SIZE)
    assert (text.shape, pooled.shape) == ((77 + 256, 4096), (768 + 1280,))
    assert model.family.default_size(checkpoint) == SIZE
    assert model.family.latents(checkpoint, SIZE) == (16, 128, 128)
    scaling = model.family.scaling(checkpoint)
    assert (scaling.scale, scaling.mean, scaling.std) == (1.5305, (0.0609,), (1.0,))


@pytest.mark.slow  # at its published size
def test_joint_attention_is_seen_and_the_papers_method_refused() -> None:
    settings = ExportSettings(model="sd35-medium", weights="none", components=("denoiser",))
    job = prepare(settings)
    assert job.method.name == "guidance_delta"
    kinds = [site.kind for site in job.sites]
    assert (kinds.count("joint"), kinds.count("self"), kinds.count("cross")) == (24, 13, 0)
    with pytest.raises(ExportError, match="method tgate reuses cross-attention, and sd35-medium has none of its own"):
        prepare(ExportSettings(model="sd35-medium", method="tgate", weights="none", components=("denoiser",)))


def test_the_table_of_places_is_the_checkpoints(tmp_path: Path) -> None:
    """Stored beside the weights, in a network whose own class would compute another."""
    root = make_tiny_flow(tmp_path / "checkpoint", "sd3_a")
    family, checkpoint = find_model("sd3-medium").family, DirectoryCheckpoint(root)
    stored = load_file(root / "transformer" / "diffusion_pytorch_model.safetensors")["pos_embed.pos_embed"]
    read = dict(real_module(family, checkpoint, "transformer").named_parameters())["pos_embed.pos_embed"]
    assert torch.equal(read, stored)
    size = Size(height=96, width=208)
    with pytest.raises(ExportError, match=r"sides of at most 192 pixels are wanted \(pos_embed_max_size\); got 208x96"):
        family.check_size(checkpoint, size)


def test_noise_levels_that_depend_on_the_size_want_one_size_a_bundle(tmp_path: Path) -> None:
    root = make_tiny_flow(tmp_path / "checkpoint", "sd3_b")
    family, checkpoint = find_model("sd35-medium").family, DirectoryCheckpoint(root)
    shifts = [family.scheduler_config(checkpoint, Size(height=side, width=side))["mu"] for side in (32, 64)]
    assert shifts[0] < shifts[1]
    sizes = [(32, 32), (64, 64)]
    settings = ExportSettings(model="sd35-medium", checkpoint=str(root), sizes=sizes, components=("denoiser",))
    with pytest.raises(ExportError, match="noise levels depend on the size"):
        prepare(settings)


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("transformer", {"pooled_projection_dim": 20}, "pooled_projection_dim = 20, and is given 24 numbers"),
        ("transformer", {"pos_embed_max_size": None}, "pos_embed_max_size = None"),
        ("transformer", {"out_channels": 8}, "takes 4 channels and gives 8"),
        ("vae", {"shift_factor": None}, "shift_factor = None.* wants a shift_factor"),
        ("vae", {"latents_mean": [0.0] * 4}, "latents_mean"),
        ("text_encoder", {"is_causal": False}, "is_causal = false"),
    ],
)
def test_what_the_pipeline_would_not_do_is_refused(
    tmp_path: Path, part: str, changes: dict[str, Any], said: str
) -> None:
    root = make_tiny_flow(tmp_path / "checkpoint", "sd3_a")
    file = root / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")
    with pytest.raises(ExportError, match=said):
        _check(root)


def _check(root: Path) -> None:
    checkpoint, family = DirectoryCheckpoint(root), find_model("sd3-medium").family
    family.check(checkpoint)
    family.scaling(checkpoint)
