"""Sana as published: its text, its sizes, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.export.families.published import published
from tests.tiny_flow import make_tiny_flow
from tgate_engine.errors import ExportError
from tgate_export.checkpoints.directory import DirectoryCheckpoint
from tgate_export.embed import embed
from tgate_export.families import find_model
from tgate_export.families.base import Size
from tgate_export.schedulers import sampler_class


@pytest.mark.parametrize(("name", "side"), [("sana-1.6b", 1024), ("sana-1.6b-512", 512)])
def test_a_latent_pixel_is_32_pixels(name: str, side: int) -> None:
    model, checkpoint = published(name)
    size = model.family.default_size(checkpoint)
    assert size == Size(height=side, width=side)
    assert model.family.latents(checkpoint, size) == (32, side // 32, side // 32)
    assert model.family.scaling(checkpoint).scale == 0.41407
    model.family.check_size(checkpoint, Size(height=1216, width=832))
    with pytest.raises(ExportError, match="the width must be a multiple of 32 pixels for this model, got 840"):
        model.family.check_size(checkpoint, Size(height=1216, width=840))


def test_text_and_mask_are_of_300_tokens() -> None:
    model, checkpoint = published("sana-1.6b")
    text, mask = model.family.conditioning(checkpoint, Size(height=1024, width=1024))
    assert (text.shape, mask.shape) == ((300, 2304), (300,))
    assert (text.attended, mask.attended, mask.mask) == (True, True, True)
    assert text.conditioning.negative == mask.conditioning.negative == "own"


def test_its_sampler_takes_the_noise_levels_of_flow_matching() -> None:
    model, checkpoint = published("sana-1.6b")
    config = model.family.scheduler_config(checkpoint, Size(height=1024, width=1024))
    assert sampler_class("dpmpp_2m", config)[0] == "DPMSolverMultistepScheduler"
    assert sampler_class("euler", config) == ("FlowMatchEulerDiscreteScheduler", {"shift": 3.0})


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("transformer", {"guidance_embeds": True}, "takes the guidance scale .*take --model sana-sprint-1.6b"),
        ("transformer", {"out_channels": 12}, "gives 12 channels; samplers take 8, or twice as many"),
        ("transformer", {"in_channels": 12}, "takes 12 channels, its latents have 8"),
        ("transformer", {"cross_attention_dim": None}, "cross_attention_dim = null, and diffusers cannot run it"),
        ("vae", {"in_channels": 4}, "in_channels = 4; pictures have 3"),
        ("vae", {"scaling_factor": 0.0}, "scaling_factor = 0.0; latents are divided by it"),
    ],
)
def test_what_the_pipeline_would_not_do_is_refused(
    tmp_path: Path, part: str, changes: dict[str, Any], said: str
) -> None:
    root = make_tiny_flow(tmp_path / "checkpoint", "sana_a")
    file = root / part / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")
    with pytest.raises(ExportError, match=said):
        _check(root)


def test_a_tokenizer_of_another_encoder_is_refused(tmp_path: Path) -> None:
    root = make_tiny_flow(tmp_path / "checkpoint", "sana_a")
    file = root / "text_encoder" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | {"vocab_size": 300}), "utf-8")
    with pytest.raises(ExportError, match=r"text_encoder.*embed_tokens|tokens up to \d+, and the text_encoder knows"):
        embed("sana-1.6b", ["a"], tmp_path / "e.safetensors", checkpoint=str(root))
    assert not (tmp_path / "e.safetensors").exists()


def _check(root: Path) -> None:
    checkpoint, family = DirectoryCheckpoint(root), find_model("sana-1.6b").family
    family.check(checkpoint)
    family.scaling(checkpoint)
