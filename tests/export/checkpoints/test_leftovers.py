"""Tensors of a single file that are no weights: left out where they change nothing, refused where they do."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.export.checkpoints.ldm import Small, build, changed, marked, written
from tgate_engine.errors import ExportError
from tgate_export.checkpoints.single_file import SingleFileCheckpoint

__all__ = ["written"]  # a fixture


@pytest.mark.parametrize(
    ("model", "component", "key"),
    [
        pytest.param("sdxl", "unet", "model.diffusion_model.time_embedding.cond_proj.weight", id="LCM"),
        pytest.param(
            "sd15", "unet", "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k_ip.weight", id="IP"
        ),
        pytest.param("sd15", "vae", "first_stage_model.decoder.time_mix.weight", id="a decoder of videos"),
        pytest.param("sd15", "vae", "vae.decoder.conv_in.weight", id="a second autoencoder"),
        pytest.param("sd15", "text_encoder", "cond_stage_model.model.ln_final.bias", id="a second encoder"),
        pytest.param("sdxl", "text_encoder", "conditioner.embedders.0.model.ln_final.bias", id="the refiner's encoder"),
        pytest.param("sdxl", "text_encoder_2", "conditioner.embedders.1.model.adapter.bias", id="an adapter"),
    ],
)
def test_tensors_that_nothing_reads_are_refused(
    written: Callable[[str], tuple[Path, Small]], tmp_path: Path, model: str, component: str, key: str
) -> None:
    checkpoint = marked(written, tmp_path, model, {key: torch.zeros(2)})
    with pytest.raises(ExportError, match=re.escape(f"nothing in the model's {component} reads tensor {key!r};")):
        checkpoint.tensors(component)


def test_tensors_that_change_nothing_are_left_out(written: Callable[[str], tuple[Path, Small]], tmp_path: Path) -> None:
    further = {
        "cond_stage_model.model.transformer.resblocks.23.ln_1.bias": torch.zeros(2),
        "cond_stage_model.model.logit_scale": torch.tensor(4.6),
        "cond_stage_model.model.text_projection": torch.zeros(8, 10),
    }
    checkpoint = marked(written, tmp_path, "sd21", further)
    held = checkpoint.tensors("text_encoder").stored()
    modules = written("sd21")[1].modules
    assert {name.removeprefix("text_model.") for name in held} == {
        n for n, _ in modules["text_encoder"].named_parameters()
    }


QUANTISED = (
    *("weight_scale", "scale_weight", "scale_input", "comfy_quant", "SCB", "weight_format", "weight.absmax"),
    *("weight.quant_map", "weight.nested_absmax", "weight.quant_state.bitsandbytes__nf4", "qzeros", "g_idx"),
)


@pytest.mark.parametrize("leaf", QUANTISED)
def test_quantised_weights_are_refused_by_name(
    written: Callable[[str], tuple[Path, Small]], tmp_path: Path, leaf: str
) -> None:
    stem = "input_blocks.1.1.transformer_blocks.0.attn1.to_q"
    key = f"model.diffusion_model.{stem}.{leaf}"
    with pytest.raises(ExportError, match=rf"its unet is quantised: tensor '{re.escape(key)}' \(U8\).*; give the"):
        marked(written, tmp_path, "sd15", {key: torch.zeros(2, dtype=torch.uint8)})
    key = f"first_stage_model.decoder.mid.attn_1.q.{leaf}"
    checkpoint = marked(written, tmp_path, "sd15", {key: torch.zeros(2)})
    checkpoint.tensors("unet")
    with pytest.raises(ExportError, match=f"its vae is quantised: tensor '{re.escape(key)}'"):
        checkpoint.tensors("vae")


def test_whole_numbers_are_no_weights(written: Callable[[str], tuple[Path, Small]], tmp_path: Path) -> None:
    path, networks = written("sd15")
    key = "model.diffusion_model.time_embed.0.weight"
    bad = changed(path, tmp_path / "bad.safetensors", lambda d: {**d, key: (d[key] * 100).to(torch.int8)})
    with pytest.raises(ExportError, match=rf"tensor '{re.escape(key)}' of its unet is I8, and weights must be"):
        SingleFileCheckpoint(bad, "sd15", build, configs=networks)
