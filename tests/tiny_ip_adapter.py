"""Small IP-Adapters with random weights, as published: a file, and the folder of CLIP's vision model beside it."""

from __future__ import annotations

import math
from pathlib import Path

import diffusers
import safetensors.torch
import torch
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

FILE, ENCODER = "ip-adapter.safetensors", "image_encoder"
_HIDDEN, _PROJECTED, _RESAMPLED = 24, 20, 32
_HEAD = 64
"""Of a resampler, whatever its width."""


def save_ip_adapter(checkpoint: Path, folder: Path, *, plus: bool, side: int = 32, queries: int = 6) -> Path:
    """Write one for a checkpoint's U-Net into ``folder``, and return the file; the same one for the same arguments.
    ``side``: pixels that its encoder takes. ``queries``: tokens of a Plus one."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(checkpoint / "unet")
    width = int(unet.config["cross_attention_dim"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5 + plus)
        _encoder(side).save_pretrained(folder / ENCODER)
        tensors = _resampler(width, queries) if plus else _linear(width)
        number = 1
        for name in unet.attn_processors:
            if name.endswith("attn2.processor"):
                inner = unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
                for which in "kv":
                    tensors[f"ip_adapter.{number}.to_{which}_ip.weight"] = 2 * _drawn(inner, width)
                number += 2
    safetensors.torch.save_file(tensors, folder / FILE)
    return folder / FILE


def _encoder(side: int) -> CLIPVisionModelWithProjection:
    config = CLIPVisionConfig(
        hidden_size=_HIDDEN,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=side,
        patch_size=side // 2,
        projection_dim=_PROJECTED,
    )
    encoder = CLIPVisionModelWithProjection(config)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter) / math.sqrt(parameter[0].numel()))
    return encoder.eval()


def _drawn(outputs: int, inputs: int) -> Tensor:
    return torch.randn(outputs, inputs) / math.sqrt(inputs)


def _norm(name: str, width: int) -> dict[str, Tensor]:
    return {f"{name}.weight": 1 + 0.2 * torch.randn(width), f"{name}.bias": 0.2 * torch.randn(width)}


def _linear(width: int) -> dict[str, Tensor]:
    """Four tokens of the embedding."""
    weights = {"proj.weight": _drawn(4 * width, _PROJECTED), "proj.bias": 0.5 * torch.randn(4 * width)}
    return {f"image_proj.{name}": tensor for name, tensor in (weights | _norm("norm", width)).items()}


def _resampler(width: int, queries: int) -> dict[str, Tensor]:
    """Queries that attend to the hidden states and to themselves, in four layers."""
    tensors = {
        "latents": torch.randn(1, queries, _RESAMPLED),
        "proj_in.weight": _drawn(_RESAMPLED, _HIDDEN),
        "proj_in.bias": 0.2 * torch.randn(_RESAMPLED),
        "proj_out.weight": _drawn(width, _RESAMPLED),
        "proj_out.bias": 0.2 * torch.randn(width),
        **_norm("norm_out", width),
    }
    for i in range(4):
        tensors |= {
            **_norm(f"layers.{i}.0.norm1", _RESAMPLED),
            **_norm(f"layers.{i}.0.norm2", _RESAMPLED),
            f"layers.{i}.0.to_q.weight": _drawn(_HEAD, _RESAMPLED),
            f"layers.{i}.0.to_kv.weight": _drawn(2 * _HEAD, _RESAMPLED),
            f"layers.{i}.0.to_out.weight": _drawn(_RESAMPLED, _HEAD),
            **_norm(f"layers.{i}.1.0", _RESAMPLED),
            f"layers.{i}.1.1.weight": _drawn(4 * _RESAMPLED, _RESAMPLED),
            f"layers.{i}.1.3.weight": _drawn(_RESAMPLED, 4 * _RESAMPLED),
        }
    return {f"image_proj.{name}": tensor for name, tensor in tensors.items()}
