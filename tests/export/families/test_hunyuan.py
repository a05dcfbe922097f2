"""HunyuanDiT as published: two texts, its places, its pooler, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.embeddings import HunyuanDiTAttentionPool

from tests.export.families.published import published
from tests.tiny_flow import make_tiny_flow
from tgate_engine.errors import ExportError
from tgate_export.checkpoints.directory import DirectoryCheckpoint
from tgate_export.families import find_model
from tgate_export.families.base import Size
from tgate_export.families.hunyuan import _places, _Pool


def test_t5_is_read_outside_cross_attention_as_well() -> None:
    model, checkpoint = published("hunyuandit-1.2")
    size = model.family.default_size(checkpoint)
    assert size == Size(height=1024, width=1024)
    text, mask, text_2, mask_2 = model.family.conditioning(checkpoint, size)
    assert (text.shape, mask.shape, text_2.shape, mask_2.shape) == ((77, 1024), (77,), (256, 2048), (256,))
    assert [c.attended for c in (text, mask, text_2, mask_2)] == [True, True, False, True]


def test_the_pooler_is_diffusers() -> None:
    torch.manual_seed(4)
    pool = HunyuanDiTAttentionPool(6, 16, num_heads=4, output_dim=10)
    text = torch.randn(2, 6, 16)
    with torch.no_grad():
        want = pool(text)
        pool.__class__ = _Pool
        assert torch.allclose(pool(text), want, atol=1e-6)
    assert want.abs().max() > 0.01


def test_places_are_turned_by_angles_that_are_stretched_to_the_size() -> None:
    """Row by row, from 0 at the first place; one of 512 pixels and one of 1024 cover the same angles."""
    small, large = (_places(8, (side, side), 32) for side in (32, 64))
    for cos, sin in (small, large):
        assert torch.allclose(cos**2 + sin**2, torch.ones_like(cos), atol=1e-6)
        assert torch.equal(cos[0], torch.ones(8))
    assert torch.allclose(small[0][1], large[0][2], atol=1e-5)
    assert not torch.allclose(small[0][1], large[0][1])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"use_style_cond_and_image_meta_size": True}, "as HunyuanDiT 1.1 does; from 1.2 on"),
        ({"text_len": 80}, "text_len = 80 and text_len_t5 = 256; HunyuanDiTPipeline gives it 77 and 256"),
        ({"learn_sigma": False}, "learn_sigma = false"),
        ({"in_channels": 8}, "takes 8 channels, its latents have 4"),
    ],
)
def test_what_the_pipeline_would_not_do_is_refused(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    root = make_tiny_flow(tmp_path / "checkpoint", "hunyuan_a")
    file = root / "transformer" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")
    checkpoint = DirectoryCheckpoint(root)
    with pytest.raises(ExportError, match=said):
        find_model("hunyuandit-1.2").family.check(checkpoint)
