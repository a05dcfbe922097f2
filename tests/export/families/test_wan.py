"""Wan 2.1 as published: frames, sizes, the decoder's scale, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor

from tests.export.families.published import published
from tests.tiny_flow import make_tiny_flow
from tgate_engine.errors import ExportError
from tgate_export.checkpoints.directory import DirectoryCheckpoint
from tgate_export.families import find_model
from tgate_export.families.base import Size
from tgate_export.families.wan import _Attention


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
        ("model_index.json", {"transformer_2": ["diffusers", "WanTransformer3DModel"]}, "has a second transformer"),
        ("model_index.json", {"boundary_ratio": 0.875}, "boundary_ratio = 0.875, as Wan 2.2 has"),
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
    path = root / file
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")
    with pytest.raises(ExportError, match=said):
        _check(root)


def _check(root: Path) -> None:
    checkpoint, family = DirectoryCheckpoint(root), find_model("wan21-t2v-1.3b").family
    family.check_pipeline(checkpoint)
    family.check(checkpoint)
    family.scaling(checkpoint)
