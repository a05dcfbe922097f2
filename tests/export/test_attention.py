"""Which modules are attention, and of which kind, is seen in a call and not read off names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from tests.conftest import family_settings
from tests.tiny_families import make_tiny, reshape_unet
from tgate_engine.errors import ExportError
from tgate_export.attention import observe
from tgate_export.job import prepare
from tgate_export.methods.tgate.cache import cache


class Attending(nn.Module):
    """Three attention modules, whose names say the opposite of what they attend to."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1 = Attention(8, cross_attention_dim=6, heads=2)
        self.attn2 = Attention(8, heads=2)
        self.unused = Attention(8, heads=2)
        self.last = Attention(8, cross_attention_dim=6, heads=2)

    def forward(self, states: Tensor, text: Tensor) -> Tensor:
        states = states + self.last(states, encoder_hidden_states=text)
        states = states + self.attn2(states)
        output: Tensor = self.attn1(states, text)
        return output


def test_modules_are_known_by_what_they_attend_to_in_the_order_they_run() -> None:
    module = Attending()
    sites = observe(module, lambda: module(torch.zeros(1, 3, 8), torch.zeros(1, 2, 6)))
    assert [(site.module, site.kind) for site in sites] == [("last", "cross"), ("attn2", "self"), ("attn1", "cross")]
    assert not any(part._forward_pre_hooks for part in module.modules())


@pytest.mark.parametrize(("images", "rows"), [(1, 6), (2, 3)])
def test_rows_are_those_of_one_image(images: int, rows: int) -> None:
    """A video's frames, or the places of one, come as rows."""
    module = Attending()
    sites = observe(module, lambda: module(torch.zeros(6, 3, 8), torch.zeros(6, 2, 6)), images=images)
    assert [site.rows for site in sites] == [rows] * 3


class Unprojected:
    """A processor that leaves the projection to the block."""

    def __call__(self, attention: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any) -> Tensor:
        return torch.relu(attention.to_q(hidden_states)) * attention.to_v(encoder_hidden_states).mean()


class Projecting(nn.Module):
    """A block that is told its own states as what they attend to, and projects what both kinds of attention give."""

    def __init__(self) -> None:
        super().__init__()
        self.attn1 = Attention(8, heads=2, processor=Unprojected())
        self.attn2 = Attention(8, cross_attention_dim=6, heads=2, processor=Unprojected())
        self.attn3 = Attention(8, heads=2)

    def forward(self, states: Tensor, text: Tensor) -> Tensor:
        both = self.attn1(states, encoder_hidden_states=states) + self.attn2(states, encoder_hidden_states=text)
        projected: Tensor = self.attn2.to_out[0](both)
        return projected + self.attn3(projected)


def test_a_block_that_projects_finds_its_projection_where_a_carry_stands() -> None:
    torch.manual_seed(0)
    block, states, text = Projecting(), torch.randn(1, 3, 8), torch.randn(1, 2, 6)
    sites = observe(block, lambda: block(states, text))
    assert [(site.module, site.kind, site.projects) for site in sites] == [
        ("attn1", "self", True),
        ("attn2", "cross", False),
        ("attn3", "self", True),
    ]
    assert not any(part._forward_pre_hooks or part._forward_hooks for part in block.modules())
    with torch.no_grad():
        want, kept = block(states, text), block.attn2(states, encoder_hidden_states=text)
        part, weights = cache(sites, reuses=(("cross", "all"),)), dict(block.named_parameters())
        with part.attached(block):
            assert {n for n in weights if n.startswith("attn2")} - dict(block.named_parameters()).keys() == {
                *(f"attn2.{name}.weight" for name in ("to_q", "to_k", "to_v"))
            }
            part.begin({"cross.0": kept}, 1, 1)
            assert torch.allclose(block(states, torch.full_like(text, torch.nan)), want, atol=1e-6)
    assert dict(block.named_parameters()).keys() == weights.keys()


def test_a_module_that_runs_twice_is_refused() -> None:
    module = Attention(8, heads=2)
    states = torch.zeros(1, 3, 8)
    with pytest.raises(ExportError, match="more than once"):
        observe(nn.ModuleDict({"a": module}), lambda: module(module(states)))
    assert not module._forward_pre_hooks


@pytest.mark.parametrize("options", [{"residual_connection": True}, {"added_kv_proj_dim": 8}, {"spatial_norm_dim": 8}])
def test_what_is_no_attention_of_a_transformer_block_is_refused(options: dict[str, Any]) -> None:
    module = Attention(32, heads=2, **options)
    with pytest.raises(ExportError, match="cannot be gated"):
        observe(nn.ModuleDict({"a": module}), lambda: module(torch.zeros(1, 3, 32)))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return make_tiny(tmp_path / "checkpoint", "sd15_a")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"down_block_types": ("AttnDownBlock2D", "DownBlock2D")}, "down_blocks.0.attentions.0"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block.attentions.0"),
    ],
)
def test_blocks_whose_attention_cannot_be_gated_are_refused(
    checkpoint: Path, tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    reshape_unet(checkpoint, **changes)
    with pytest.raises(ExportError, match=rf"{named}.*cannot be gated"):
        prepare(family_settings("sd15_a", checkpoint, tmp_path / "bundle"))


def test_a_text_of_another_width_than_the_network_wants_is_refused(
    checkpoint: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    reshape_unet(checkpoint, cross_attention_dim=20)
    with pytest.raises(ExportError, match="does not take what conditions it") as caught:
        prepare(family_settings("sd15_a", checkpoint, tmp_path / "bundle"))
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err


def test_modules_come_in_the_order_they_run(tmp_path: Path) -> None:
    """Carries are numbered by it."""
    root = make_tiny(tmp_path / "checkpoint", "sd15_b")
    job = prepare(family_settings("sd15_b", root, tmp_path / "bundle"))
    names = [site.module for site in job.sites]
    blocks = [name.split(".")[0] for name in names]
    assert blocks == sorted(blocks, key=("down_blocks", "mid_block", "up_blocks").index)
    assert all(site.kind == ("self" if site.module.endswith("attn1") else "cross") for site in job.sites)
