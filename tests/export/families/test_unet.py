"""What SD and SDXL share: latents, and a network of other channels."""

from __future__ import annotations

import diffusers
import pytest

from tests.export.families.published import published
from tgate_engine.errors import ExportError
from tgate_export.families.base import Size
from tgate_export.families.unet import deep_module


@pytest.mark.parametrize(("model", "channels"), [("sd15", 4), ("sdxl", 4), ("ssd-1b", 4)])
def test_latents_are_an_eighth_of_the_pixels(model: str, channels: int) -> None:
    model_of, checkpoint = published(model)
    assert model_of.family.latents(checkpoint, Size(width=832, height=1216)) == (channels, 152, 104)
    model_of.family.check(checkpoint)


def test_guidance_above_one_takes_both_halves() -> None:
    model, checkpoint = published("sdxl")
    assert model.family.guidance(checkpoint, 5.0) == "classifier-free"
    assert model.family.guidance(checkpoint, 1.0) == "none"
    model, checkpoint = published("lcm-sdxl")
    assert model.family.guidance(checkpoint, 8.0) == "embedded"


def test_what_the_last_layers_take_of_those_below() -> None:
    """SDXL's way up has three blocks of three layers, two of which attend; branches are numbered as in DeepCache's
    package, from the end."""
    model, checkpoint = published("sdxl")
    branches = [model.family.deep(checkpoint, branch) for branch in range(9)]
    assert branches == [
        *("up_blocks.2.resnets.1", "up_blocks.2.resnets.0", "up_blocks.1"),
        *("up_blocks.1.attentions.1", "up_blocks.1.attentions.0", "up_blocks.0"),
        *("up_blocks.0.attentions.1", "up_blocks.0.attentions.0", "mid_block"),
    ]
    with pytest.raises(ExportError, match="--cache-branch must be from 0 to 8, got 9"):
        model.family.deep(checkpoint, 9)
    for name in ("sd15", "svd"):
        model, checkpoint = published(name)
        assert model.family.deep(checkpoint, 0) == "up_blocks.3.attentions.1"
    model, checkpoint = published("pixart-alpha")
    assert model.family.deep(checkpoint, 0) is None


def test_blocks_of_another_kind_have_no_known_layers() -> None:
    """Whose skip connections enter a block once, for instance: the last layer alone would see no latents."""
    _, checkpoint = published("sd15")
    options = {
        "block_out_channels": (8, 8),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "down_block_types": ("DownBlock2D", "DownBlock2D"),
    }
    plain = diffusers.UNet2DConditionModel(up_block_types=("UpBlock2D", "UpBlock2D"), **options)
    other = diffusers.UNet2DConditionModel(up_block_types=("UpBlock2D", "ResnetUpsampleBlock2D"), **options)
    assert deep_module(checkpoint, plain, 0) == "up_blocks.1.resnets.0"
    assert deep_module(checkpoint, plain, 3) == "mid_block"
    assert deep_module(checkpoint, other, 0) is None
