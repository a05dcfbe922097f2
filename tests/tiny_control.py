"""Small ControlNets with random weights for the small checkpoints of Stable Diffusion and SDXL."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image
from torch import nn


def make_control(checkpoint: Path, target: Path, *, pixels: int, seed: int, **config: Any) -> Path:
    """A ControlNet in ``target``, of the U-Net of ``checkpoint`` and with the U-Net's weights where both have them.

    ``pixels``: of a latent pixel. ``config``: keys of the configuration that are not the U-Net's. What a trained one
    has learned is drawn, large enough that a control picture moves the latents by far more than any tolerance.
    """
    unet = UNet2DConditionModel.from_pretrained(checkpoint / "unet", torch_dtype=torch.float32)
    steps = int(math.log2(pixels))
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        own = {"conditioning_embedding_out_channels": (4, *[8 + 4 * (seed % 2)] * steps), **config}
        net = ControlNetModel.from_unet(unet, conditioning_channels=own.pop("conditioning_channels", 3), **_kept(own))
        net.register_to_config(**own)
        for module, gain in ((net.controlnet_cond_embedding, 2.5), (net.controlnet_down_blocks, 0.5)):
            for block in module.modules():
                if isinstance(block, nn.Conv2d):
                    nn.init.normal_(block.weight, std=gain / block.weight[0].numel() ** 0.5)
                    nn.init.normal_(block.bias, std=0.1)
        nn.init.normal_(net.controlnet_mid_block.weight, std=0.5 / net.controlnet_mid_block.weight[0].numel() ** 0.5)
    net.save_pretrained(target)
    return target


def _kept(config: dict[str, Any]) -> dict[str, Any]:
    """What :meth:`ControlNetModel.from_unet` takes of it."""
    names = ("conditioning_embedding_out_channels", "controlnet_conditioning_channel_order")
    return {name: config[name] for name in names if name in config}


def control_picture(size: tuple[int, int], seed: int = 0) -> Image.Image:
    """RGB of that size: rough, so that every pixel matters."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))
