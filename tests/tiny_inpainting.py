"""Small inpainting checkpoints, of U-Nets that take 9 channels, made from those that take 4."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from diffusers import UNet2DConditionModel


def save_inpainting(checkpoint: Path, target: Path) -> Path:
    """Write one made from ``checkpoint`` into ``target``: its U-Net is told of a mask and of a masked picture, as
    loudly as of the latents."""
    shutil.copytree(checkpoint, target)
    plain = UNet2DConditionModel.from_pretrained(checkpoint / "unet", torch_dtype=torch.float32)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        unet = UNet2DConditionModel.from_config({**plain.config, "in_channels": 9})
        weights = plain.state_dict()
        own = weights["conv_in.weight"]
        told = torch.randn(own.shape[0], 5, *own.shape[2:]) * own.std()
        unet.load_state_dict({**weights, "conv_in.weight": torch.cat([own, told], dim=1)})
    shutil.rmtree(target / "unet")
    unet.save_pretrained(target / "unet")
    index = json.loads((target / "model_index.json").read_text("utf-8"))
    index["_class_name"] = index["_class_name"].replace("Pipeline", "InpaintPipeline")
    (target / "model_index.json").write_text(json.dumps(index), "utf-8")
    return target
