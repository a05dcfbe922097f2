"""Which modules are gated is seen, not read off names; and guidance that is rescaled, in a step's own arithmetic."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.attention_processor import Attention
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from torch import Tensor, nn

from tests.conftest import family_settings
from tests.oracle_families import Request, tgate_latents
from tests.tiny_families import latent_noise, load_tiny, make_tiny
from tgate_engine.errors import ExportError
from tgate_engine.report import Silent
from tgate_engine.rows import GUIDANCE, INPUT_SCALE, OUTPUTS, STEP_ROW
from tgate_export.build import export
from tgate_export.gating import GatedStep, Variant, observe
from tgate_export.job import prepare
from tgate_export.schedulers import make_scheduler
from tgate_runtime.pipeline import Pipeline

TOLERANCE = 1e-4
PROMPT = "a large red circle"


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
def reshaped(tmp_path: Path) -> Callable[..., Path]:
    """A tiny SD 1.5 whose U-Net is another one: config keys changed, weights drawn so that attention matters."""

    def make(**changes: Any) -> Path:
        root = make_tiny(tmp_path / "checkpoint", "sd15_a")
        config = json.loads((root / "unet" / "config.json").read_text("utf-8")) | changes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            unet = diffusers.UNet2DConditionModel.from_config(config).eval()
            for name, parameter in unet.named_parameters():
                if name.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")):
                    nn.init.normal_(parameter, std=1.3 / math.sqrt(parameter.shape[1]))
        unet.save_pretrained(root / "unet")
        return root

    return make


def test_only_cross_attention_is_gated_as_the_package_gates_it(reshaped: Callable[..., Path], tmp_path: Path) -> None:
    """The module called attn1 attends to the text then: after the gate its mean is reused, and no text is left."""
    root = reshaped(only_cross_attention=True)
    pipe = load_tiny(root, "sd15_a")
    settings = family_settings("sd15_a", root, tmp_path / "bundle", steps=6, m=3, k=2, warm_up=0)
    job = prepare(settings)
    attending = {site.module for site in job.sites if site.kind == "cross"}
    assert any(name.endswith("attn1") for name in attending)
    bundle = export(settings, Silent())
    request = Request(
        prompt=PROMPT,
        negative_prompt="a photo",
        steps=6,
        guidance_scale=job.guidance_scale,
        latents=latent_noise("sd15_a"),
    )
    want = tgate_latents(pipe, request, make_scheduler("dpmpp_2m", job.scheduler), 3, 2, 2, 0)
    with Pipeline.open(bundle, threads=1) as opened:
        after = opened.session.manifest.graphs["reuse_cross"]
        got = opened(PROMPT, negative_prompt="a photo", initial_latents=latent_noise("sd15_a").numpy()).latents
    assert not [name for name in after.input_names() if name.startswith("prompt_embeds")]
    assert float((torch.from_numpy(got) - want).abs().max() / want.abs().max()) < TOLERANCE


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"down_block_types": ("AttnDownBlock2D", "DownBlock2D")}, "down_blocks.0.attentions.0"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block.attentions.0"),
    ],
)
def test_blocks_whose_attention_cannot_be_gated_are_refused(
    reshaped: Callable[..., Path], tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ExportError, match=rf"{named}.*cannot be gated"):
        prepare(family_settings("sd15_a", reshaped(**changes), tmp_path / "bundle"))


def test_a_text_of_another_width_than_the_network_wants_is_refused(
    reshaped: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ExportError, match="does not take what conditions it") as caught:
        prepare(family_settings("sd15_a", reshaped(cross_attention_dim=20), tmp_path / "bundle"))
    assert "\n" not in str(caught.value)
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("rescale", [0.0, 0.3, 1.0])
def test_rescaled_guidance_is_diffusers(rescale: float) -> None:
    """Output of one step, for a batch of two, against the function of diffusers' pipelines."""
    generator = torch.Generator().manual_seed(0)
    halves = torch.randn(4, 3, 5, 6, generator=generator)
    step = torch.zeros(2, STEP_ROW)
    step[:, INPUT_SCALE], step[:, GUIDANCE], step[:, OUTPUTS.start] = 1.0, torch.tensor([4.0, 7.5]), 1.0
    gated = GatedStep(
        nn.Identity(),
        lambda *_: halves,
        (),
        Variant(name="full", halves="both"),
        (),
        torch.float32,
        rescale=rescale,
    )
    inputs = {name: step if name == "step" else torch.zeros(2, 3, 5, 6) for name in gated.input_names}
    output = gated(*inputs.values())[1]
    negative, positive = halves.chunk(2)
    want = negative + torch.tensor([4.0, 7.5]).view(2, 1, 1, 1) * (positive - negative)
    if rescale:
        want = rescale_noise_cfg(want, positive, guidance_rescale=rescale)
    assert torch.allclose(output, want, atol=1e-6)


def test_the_methods_table_still_rules(tmp_path: Path) -> None:
    """Sites in the order they run: carries are numbered by it, and a plan reads what an earlier step wrote."""
    root = make_tiny(tmp_path / "checkpoint", "sd15_b")
    job = prepare(family_settings("sd15_b", root, tmp_path / "bundle"))
    names = [site.module for site in job.sites]
    blocks = [name.split(".")[0] for name in names]
    assert blocks == sorted(blocks, key=("down_blocks", "mid_block", "up_blocks").index)
    assert all(site.kind == ("self" if site.module.endswith("attn1") else "cross") for site in job.sites)
