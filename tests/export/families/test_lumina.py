"""Lumina-Next as published: its text, its places, its attention, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import Attention, LuminaAttnProcessor2_0
from diffusers.models.embeddings import LuminaPatchEmbed, get_2d_rotary_pos_embed_lumina
from safetensors.numpy import load_file

from tests.export.families.published import published
from tests.tiny_flow import load_tiny_flow, make_tiny_flow
from tgate_engine.errors import ExportError
from tgate_export.checkpoints.directory import DirectoryCheckpoint
from tgate_export.embed import embed
from tgate_export.families import find_model
from tgate_export.families.base import Size
from tgate_export.families.lumina import _angles, _Attention, _Patches


def test_its_text_is_read_outside_cross_attention_as_well() -> None:
    model, checkpoint = published("lumina-next")
    size = model.family.default_size(checkpoint)
    assert size == Size(height=1024, width=1024)
    text, mask = model.family.conditioning(checkpoint, size)
    assert (text.shape, mask.shape) == ((256, 2048), (256,))
    assert [(each.attended, each.mask) for each in (text, mask)] == [(False, False), (False, True)]
    assert model.family.scaling(checkpoint).scale == 0.13025
    assert model.family.pipeline(checkpoint) == "LuminaPipeline"


def test_three_channels_are_guided() -> None:
    ramp = find_model("lumina-next").family.guidance_ramp((4, 128, 128))
    assert ramp is not None
    assert (ramp.tolist(), ramp.shape) == ([[[[1.0]], [[1.0]], [[1.0]], [[0.0]]]], (1, 4, 1, 1))


@pytest.mark.parametrize("factor", [1.0, 1.7])
@pytest.mark.parametrize(("kv_heads", "norm"), [(1, "layer_norm_across_heads"), (4, None)])
def test_patches_and_both_kinds_of_attention_are_diffusers(factor: float, kv_heads: int, norm: str | None) -> None:
    """With more places than the network's own, whose attention is sharper, and a text of which a part is masked."""
    torch.manual_seed(2)
    table = get_2d_rotary_pos_embed_lumina(12, 384, 384, linear_factor=factor)
    patches = LuminaPatchEmbed(2, 4, 48)
    hidden, ones, sizes, complex_angles = patches(torch.randn(2, 4, 6, 10), table)
    torch.manual_seed(2)
    picture = (LuminaPatchEmbed(2, 4, 48), torch.randn(2, 4, 6, 10))
    picture[0].__class__ = _Patches
    angles = _angles(12, 3, 5, factor)
    got = picture[0](picture[1], angles)
    assert torch.allclose(got[0], hidden, atol=1e-6)
    assert (got[1].shape, got[2][0]) == (ones.shape, sizes[0])
    text, mask = torch.randn(2, 7, 20), torch.tensor([[1.0] * 7, [1.0] * 3 + [0.0] * 4])
    for attended, own, width, ours, theirs in (
        (hidden, ones, None, angles, complex_angles),
        (text, mask, 20, None, None),
    ):
        attention = Attention(
            query_dim=48,
            cross_attention_dim=width,
            dim_head=12,
            heads=4,
            kv_heads=kv_heads,
            qk_norm=norm,
            bias=False,
            processor=LuminaAttnProcessor2_0(),
        )
        options = {"encoder_hidden_states": attended, "attention_mask": own, "base_sequence_length": 9}
        with torch.no_grad():
            want = attention(hidden, query_rotary_emb=complex_angles, key_rotary_emb=theirs, **options)
            attention.processor = _Attention()
            again = attention(hidden, query_rotary_emb=angles, key_rotary_emb=ours, **options)
        assert torch.allclose(again, want, atol=1e-5)
        assert want.std() > 0.05


def test_a_negative_prompt_is_as_long_as_the_prompt_beside_it(tmp_path: Path) -> None:
    """diffusers cuts it there; so each of several prompts has one of its own."""
    root, file = make_tiny_flow(tmp_path / "checkpoint", "lumina_a"), tmp_path / "prompts.safetensors"
    prompts, negative = ["a", "a large red circle above a small blue square"], "a photo of a green circle, blurred"
    embed("lumina-next", prompts, file, checkpoint=str(root), negative_prompt=negative)
    rows = load_file(file)
    pipe = load_tiny_flow(root, "lumina_a")
    lengths = []
    for i, prompt in enumerate(prompts):
        wanted = [each.float().detach().numpy()[0] for each in pipe.encode_prompt(prompt, negative_prompt=negative)]
        for states, mask, half in ((0, 1, "positive"), (2, 3, "negative")):
            length = len(wanted[mask])
            np.testing.assert_allclose(rows[f"prompt_embeds.{half}"][i, :length], wanted[states], atol=1e-5)
            assert not rows[f"prompt_embeds.{half}"][i, length:].any()
            assert rows[f"prompt_mask.{half}"][i].tolist() == [*wanted[mask].tolist(), *[0.0] * (256 - length)]
        lengths.append(int(rows["prompt_mask.negative"][i].sum()))
    assert lengths[0] < lengths[1]


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("transformer", {"learn_sigma": False}, "learn_sigma = false; LuminaPipeline wants a variance"),
        ("transformer", {"in_channels": 8}, "takes 8 channels, its latents have 4"),
        ("transformer", {"num_kv_heads": 3}, "has 4 heads and num_kv_heads = 3.*a divisor is wanted"),
        ("transformer", {"sample_size": 3}, "sample_size = 3, a picture of 1 places.*4 is the least"),
        ("transformer", {"hidden_size": 40}, "the checkpoint is of another architecture, or damaged"),
        ("vae", {"shift_factor": 0.1}, "shift_factor = 0.1, which LuminaPipeline ignores"),
        ("scheduler", {"num_train_timesteps": 500}, "num_train_timesteps = 500; time is a part of 1000"),
    ],
)
def test_what_the_pipeline_would_not_do_is_refused(
    tmp_path: Path, part: str, changes: dict[str, Any], said: str
) -> None:
    root = make_tiny_flow(tmp_path / "checkpoint", "lumina_a")
    file = root / part / ("scheduler_config.json" if part == "scheduler" else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text("utf-8")) | changes), "utf-8")
    with pytest.raises(ExportError, match=said):
        _check(root)


def test_an_autoencoder_of_other_pixels_and_a_size_without_angles_are_refused(tmp_path: Path) -> None:
    model, checkpoint = published("lumina-next")
    model.family.check_size(checkpoint, Size(height=6144, width=1024))
    for size, said in (
        (Size(height=6160, width=64), "6144 pixels; 64x6160 is larger"),
        (Size(height=1032, width=64), "16"),
    ):
        with pytest.raises(ExportError, match=said):
            model.family.check_size(checkpoint, size)
    root = make_tiny_flow(tmp_path / "checkpoint", "lumina_a")
    file = root / "vae" / "config.json"
    config = json.loads(file.read_text("utf-8"))
    for key in ("block_out_channels", "down_block_types", "up_block_types"):
        config[key] = config[key][:3]
    file.write_text(json.dumps(config), "utf-8")
    with pytest.raises(ExportError, match="4 pixels for each latent pixel, and LuminaPipeline counts places by 8"):
        model.family.check(DirectoryCheckpoint(root))


def _check(root: Path) -> None:
    checkpoint, family = DirectoryCheckpoint(root), find_model("lumina-next").family
    family.check(checkpoint)
    family.scaling(checkpoint)
    family.scheduler_config(checkpoint, Size(height=64, width=96))
