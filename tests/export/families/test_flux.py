"""FLUX.1 as published: texts, guidance that is the network's own, places, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.export.families.published import published
from tests.tiny_flow import make_tiny_flow
from tgate_engine.errors import ExportError, MethodError
from tgate_export.checkpoints.directory import DirectoryCheckpoint
from tgate_export.families import find_model
from tgate_export.families.base import Size
from tgate_export.families.flux import _Places
from tgate_export.job import ExportSettings, prepare
from tgate_export.modules import fake_module

FAMILY: Any = find_model("flux1-dev").family


@pytest.mark.parametrize(
    ("name", "tokens", "guidance"), [("flux1-dev", 512, "embedded"), ("flux1-schnell", 256, "none")]
)
def test_what_it_is_exported_as_where_nothing_is_said(name: str, tokens: int, guidance: str) -> None:
    model, checkpoint = published(name)
    size = FAMILY.default_size(checkpoint)
    text, pooled = FAMILY.conditioning(checkpoint, size)
    assert (text.shape, pooled.shape, FAMILY.token_length(checkpoint, 0)) == ((tokens, 4096), (768,), 77)
    assert (size, FAMILY.latents(checkpoint, size)) == (Size(height=1024, width=1024), (16, 128, 128))
    assert FAMILY.guidance(checkpoint, 3.5) == guidance
    scaling = FAMILY.scaling(checkpoint)
    assert (scaling.scale, scaling.mean) == (0.3611, (0.1159,))
    assert model.method == "forecast"


@pytest.mark.parametrize("variant", ["flux_a", "flux_b"])
def test_methods_that_want_cross_attention_or_two_halves_are_refused(tmp_path: Path, variant: str) -> None:
    root = make_tiny_flow(tmp_path / "checkpoint", variant)
    settings = ExportSettings(model="flux1-dev", checkpoint=str(root), components=("denoiser",), height=32, width=48)
    job = prepare(settings)
    assert (job.method.name, [graph.name for graph in job.variants]) == ("forecast", ["full"])
    assert {site.kind for site in job.sites} == {"joint", "self"}
    with pytest.raises(ExportError, match=r"method tgate reuses cross-attention, .*; take --method forecast$"):
        prepare(replace(settings, method="tgate"))
    with pytest.raises(MethodError, match="guidance_delta"):
        prepare(replace(settings, method="guidance_delta"))


def test_places_are_diffusers() -> None:
    rope = FluxPosEmbed(theta=10000, axes_dim=[4, 6, 8])
    ids = torch.tensor([(0, 0, 0), (0, 3, 5), (0, 127, 1), (0, 1023, 900)])
    for got, want in zip(_Places(rope)(ids), rope(ids), strict=True):
        assert torch.allclose(got, want, atol=1e-6)


def test_places_stay_in_float32_in_a_network_that_does_not(tmp_path: Path) -> None:
    checkpoint = DirectoryCheckpoint(make_tiny_flow(tmp_path / "checkpoint", "flux_a"))
    module = fake_module(FakeTensorMode(allow_non_fake_inputs=True), FAMILY, checkpoint, "transformer", torch.float16)
    assert {buffer.dtype for buffer in module.buffers()} == {torch.float32}
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float16}


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("model_index.json", {"_class_name": "FluxKontextPipeline"}, "holds a FluxKontextPipeline"),
        ("transformer/config.json", {"patch_size": 2}, "patch_size = 2; .* 1 is wanted"),
        ("transformer/config.json", {"joint_attention_dim": 20}, "text_encoder_2 gives 24 channels; they must agree"),
        ("transformer/config.json", {"pooled_projection_dim": 8}, "text_encoder gives 16 channels; they must agree"),
        ("vae/config.json", {"shift_factor": None}, "shift_factor = None.* FluxPipeline wants a shift_factor"),
        ("text_encoder/config.json", {"is_causal": False}, "is_causal = false"),
    ],
)
def test_other_models_of_the_kind_are_refused(tmp_path: Path, file: str, changes: dict[str, Any], said: str) -> None:
    root = make_tiny_flow(tmp_path / "checkpoint", "flux_a")
    path = root / file
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")
    with pytest.raises(ExportError, match=said):
        _check(root)


def _check(root: Path) -> None:
    checkpoint = DirectoryCheckpoint(root)
    FAMILY.check_pipeline(checkpoint)
    FAMILY.check(checkpoint)
    FAMILY.scaling(checkpoint)
