"""What SD and SDXL share: latents, and a network of other channels."""

from __future__ import annotations

import diffusers
import pytest
import torch

from tests.export.families.published import published
from tgate_engine.errors import ExportError
from tgate_export.attention import AttentionSite, Kind
from tgate_export.families.base import Size
from tgate_export.families.unet import deep_module, finest_modules


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


def sites(network: torch.nn.Module) -> list[AttentionSite]:
    """As a call would show them where attn1 attends to the picture, attn2 to the text."""
    kinds: dict[str, Kind] = {"attn1": "self", "attn2": "cross"}
    names = (name for name, _ in network.named_modules())
    return [AttentionSite(name, kinds[name[-5:]]) for name in names if name[-5:] in kinds]


def test_the_self_attention_of_the_finest_level() -> None:
    """Stable Diffusion's attends to the latents' own grid, two layers on the way down and three up; SDXL's first one
    has no attention, and the next five blocks of two. Their middle is at the last level."""
    finest = {}
    for name in ("sd15", "sdxl"):
        model, checkpoint = published(name)
        finest[name] = model.family.finest(checkpoint, sites(model.family.skeleton(checkpoint, "unet")))
    block = "attentions.{}.transformer_blocks.{}.attn1"
    assert list(finest["sd15"]) == [
        *(f"down_blocks.0.{block.format(i, 0)}" for i in range(2)),
        *(f"up_blocks.3.{block.format(i, 0)}" for i in range(3)),
    ]
    assert list(finest["sdxl"]) == [
        *(f"down_blocks.1.{block.format(i, j)}" for i in range(2) for j in range(2)),
        *(f"up_blocks.1.{block.format(i, j)}" for i in range(3) for j in range(2)),
    ]
    for name in ("pixart-alpha", "svd"):
        model, checkpoint = published(name)
        assert model.family.finest(checkpoint, []) == ()


def test_attention_that_is_no_blocks_first_layer_is_merged_nowhere() -> None:
    middle = diffusers.UNet2DConditionModel(
        block_out_channels=(8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=8,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    assert finest_modules(middle, sites(middle)) == ("mid_block.attentions.0.transformer_blocks.0.attn1",)
    odd = [AttentionSite("mid_block.attentions.0.transformer_blocks.0.attn2", "self")]
    assert finest_modules(middle, [*sites(middle), *odd]) == ()
    assert finest_modules(middle, []) == ()


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
