"""Stable Video Diffusion as published: frames, the picture, guidance that grows over them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from tests.export.families.published import published
from tgate_engine.errors import ExportError
from tgate_export.checkpoints.directory import DirectoryCheckpoint
from tgate_export.families import MODELS
from tgate_export.families.base import Size


def test_a_picture_conditions_both_ways_and_its_half_goes_on() -> None:
    model, checkpoint = published("svd")
    family, size = model.family, Size(width=1024, height=576, frames=25)
    assert family.latents(checkpoint, size) == (25, 4, 72, 128)
    embedding, latents, ids = family.conditioning(checkpoint, size)
    assert (embedding.shape, embedding.attended, embedding.conditioning.negative) == ((1, 1024), True, "zeros")
    assert (latents.shape, latents.attended) == ((4, 72, 128), False)
    assert ids.value == (6.0, 127.0, 0.02)
    assert family.after_gate == "positive"


def test_guidance_grows_from_the_first_frame_to_the_last() -> None:
    ramp = published("svd")[0].family.guidance_ramp((5, 4, 72, 128))
    assert ramp is not None
    assert ramp.flatten().tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert ramp.shape == (1, 5, 1, 1, 1)


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("processor_config.json", {"image_processor": [1]}, "image_processor = [1]; an object is wanted"),
        ("processor_config.json", {"image_processor": {"image_mean": ["x", 1, 1]}}, "three finite numbers are wanted"),
        ("preprocessor_config.json", {"image_std": [0.5, 0, 0.5]}, "three finite numbers are wanted"),
        ("preprocessor_config.json", {"image_mean": {"0": 1}}, "three finite numbers are wanted"),
        ("preprocessor_config.json", {"auto_map": {"AutoImageProcessor": "evil.Processor"}}, "auto_map"),
    ],
)
def test_a_feature_extractor_of_a_stranger(tmp_path: Path, file: str, content: object, said: str) -> None:
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "feature_extractor").mkdir()
    (tmp_path / "feature_extractor" / file).write_text(json.dumps(content))
    with pytest.raises(ExportError, match=re.escape(said)):
        MODELS["svd"].family.image([torch.nn.Identity()] * 2, DirectoryCheckpoint(tmp_path), Size(height=8, width=8))
