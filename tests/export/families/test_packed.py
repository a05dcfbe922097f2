"""Places of 2x2 latent pixels, and noise levels that pipelines hand over, as diffusers has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from tests.export.families.published import published
from tests.tiny_flow import make_tiny_flow
from tgate_engine.errors import ExportError
from tgate_export.checkpoints.directory import DirectoryCheckpoint
from tgate_export.families import find_model
from tgate_export.families.base import Size
from tgate_export.schedulers import make_scheduler, set_timesteps

PIPELINES = {"qwen-image": diffusers.QwenImagePipeline, "flux1-dev": diffusers.FluxPipeline}


@pytest.mark.parametrize("name", PIPELINES)
def test_latents_are_packed_as_the_pipeline_does(name: str) -> None:
    family, pipeline = find_model(name).family, PIPELINES[name]
    latents = torch.randn(2, 3, 4, 6, generator=torch.Generator().manual_seed(0))
    packed = pipeline._pack_latents(latents, *latents.shape)
    assert torch.equal(family.as_pipeline(latents), packed)
    assert torch.equal(family.from_pipeline(packed, latents.shape), latents)


@pytest.mark.parametrize(
    ("name", "size", "shift", "end"),
    [
        ("qwen-image", Size(height=1328, width=1328), 0.5 + 0.4 * (83 * 83 - 256) / (8192 - 256), 0.02),
        ("flux1-dev", Size(height=1024, width=512), 0.5 + 0.65 * (64 * 32 - 256) / (4096 - 256), None),
        ("flux1-schnell", Size(height=1024, width=1024), 0.0, None),
    ],
)
def test_noise_levels_are_shifted_by_the_size(name: str, size: Size, shift: float, end: float | None) -> None:
    """Against the formula: sigma / (sigma + exp(-mu) (1 - sigma)), stretched to end where it is told to."""
    model, checkpoint = published(name)
    config = model.family.scheduler_config(checkpoint, size)
    assert config.get("mu", 0.0) == pytest.approx(shift)
    scheduler = make_scheduler("euler", config)
    set_timesteps(scheduler, 20)
    shifted = 1 / (1 + np.exp(-shift) * (20 / np.arange(20, 0, -1) - 1))
    if end is not None:
        shifted = 1 - (1 - shifted) * (1 - end) / (1 - shifted[-1])
    np.testing.assert_allclose(scheduler.sigmas.numpy(), [*shifted, 0.0], atol=1e-6)


@pytest.mark.parametrize(("variant", "name"), [("qwen_a", "qwen-image"), ("flux_a", "flux1-dev")])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"in_channels": 12, "out_channels": 3}, "takes 12 channels and gives .* 16 both times are wanted"),
        ({"out_channels": 8}, "takes 16 channels and gives .* 16 both times are wanted"),
    ],
)
def test_other_channels_than_the_pipeline_packs_are_refused(
    tmp_path: Path, variant: str, name: str, changes: dict[str, Any], said: str
) -> None:
    root = make_tiny_flow(tmp_path / "checkpoint", variant)
    path = root / "transformer" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")
    with pytest.raises(ExportError, match=said):
        find_model(name).family.check(DirectoryCheckpoint(root))


def test_a_scheduler_that_takes_no_noise_levels_is_refused(tmp_path: Path) -> None:
    root = make_tiny_flow(tmp_path / "checkpoint", "flux_a")
    for file, changes in (
        ("model_index.json", {"scheduler": ["diffusers", "UniPCMultistepScheduler"]}),
        ("scheduler/scheduler_config.json", {"_class_name": "UniPCMultistepScheduler"}),
    ):
        path = root / file
        path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")
    with pytest.raises(
        ExportError, match="UniPCMultistepScheduler; FluxPipeline hands noise levels of its own to a Flow"
    ):
        find_model("flux1-dev").family.scheduler_config(DirectoryCheckpoint(root), Size(height=64, width=64))
