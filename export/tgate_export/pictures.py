"""How pictures are prepared for CLIP's vision models: what a checkpoint's feature extractor says of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from tgate_engine.errors import ExportError
from tgate_export.checkpoints import Checkpoint
from tgate_export.checkpoints.configs import check_code
from tgate_export.checkpoints.files import quoted

EXTRACTOR = "feature_extractor"
"""Where most checkpoints say how pictures are prepared."""


def normalisation(checkpoint: Checkpoint, folder: str = EXTRACTOR) -> tuple[list[float], list[float]]:
    """Mean and deviation by which pixels are normalised for CLIP: the feature extractor's, which has CLIP's defaults.
    The pipeline sets everything else about it. ``folder``: where the checkpoint has the extractor."""
    own = _extractor(checkpoint, folder)
    numbers = []
    for key, default in (("image_mean", OPENAI_CLIP_MEAN), ("image_std", OPENAI_CLIP_STD)):
        values = own.get(key)
        values = default if values is None else values
        fit = isinstance(values, (list, tuple)) and len(values) == 3
        if not fit or not all(
            isinstance(v, (int, float)) and math.isfinite(v) and (v or key != "image_std") for v in values
        ):
            raise ExportError(
                f"{checkpoint.where}: {folder}/preprocessor_config.json has {key} = {values!r}; "
                "three finite numbers are wanted, one for each colour"
            )
        numbers.append([float(value) for value in values])
    return numbers[0], numbers[1]


def check_processor(
    checkpoint: Checkpoint, side: int, folder: str = EXTRACTOR, whose: str = "the IP-Adapter's image encoder"
) -> None:
    """Raises :class:`ExportError` where the checkpoint has a feature extractor of its own, which diffusers would go
    by, that prepares pictures for another encoder or in another way than CLIP's is."""
    own = _extractor(checkpoint, folder)
    wanted: dict[str, tuple[object, ...]] = {
        "size": (side, {"shortest_edge": side}),
        "crop_size": (side, {"height": side, "width": side}),
        "resample": (3,),
        "rescale_factor": (1 / 255,),
        **dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize", "do_convert_rgb"), (True,)),
    }
    for key, values in wanted.items():
        value = own.get(key)
        if value is None and (key not in ("size", "crop_size") or not own or side == 224):
            continue
        if value not in values:
            raise ExportError(
                f"{checkpoint.where}: {folder}/preprocessor_config.json has {key} = {quoted(value)}, and {whose} is "
                f"shown pictures of {side} pixels a side as CLIP's are prepared; remove the {folder}, or give the "
                "encoder that belongs to it"
            )


def _extractor(checkpoint: Checkpoint, folder: str) -> Mapping[str, Any]:
    """Its configuration; empty where there is none."""
    nested = checkpoint.further(f"{folder}/processor_config.json") or {}
    own = nested.get("image_processor") or checkpoint.further(f"{folder}/preprocessor_config.json") or {}
    if not isinstance(own, Mapping):
        raise ExportError(
            f"{checkpoint.where}: {folder}/processor_config.json has image_processor = {quoted(own)}; an "
            "object is wanted"
        )
    check_code(f"{checkpoint.where}: {folder}", own)
    return own


class ClipPicture(nn.Module):
    """A picture, uint8 [1, H, W, 3], as CLIP's vision model is shown it: float32 [1, 3, S, S].

    Its shorter side is brought to S pixels, as Pillow does it bicubically, to the same whole numbers, and the middle of
    it is taken and normalised.
    """

    def __init__(self, height: int, width: int, side: int, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        short = min(height, width)
        for name, pixels in (("rows", height), ("columns", width)):
            weights = _bicubic(pixels, side if pixels == short else int(side * pixels / short))
            first = (len(weights) - side) // 2
            high = torch.floor(weights[first : first + side] / _LOW)  # so that no sum is beyond what float32 counts to
            low = weights[first : first + side] - high * _LOW
            self.register_buffer(f"{name}_high", high.float(), persistent=False)
            self.register_buffer(f"{name}_low", low.float(), persistent=False)
        self.register_buffer("mean", torch.tensor(mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, picture: Tensor) -> Tensor:
        pixels = picture.permute(0, 3, 1, 2).float()
        pixels = _weighted(pixels, self.get_buffer("columns_high"), self.get_buffer("columns_low"))
        across = _weighted(pixels.transpose(2, 3), self.get_buffer("rows_high"), self.get_buffer("rows_low"))
        return (across.transpose(2, 3) / 255 - self.mean) / self.std


_BITS, _LOW = 22, 1 << 11
"""Pillow's weights are whole numbers of so many bits, taken here in two parts, of which the lower one is below that."""


def _weighted(pixels: Tensor, high: Tensor, low: Tensor) -> Tensor:
    """Whole numbers [..., N] from 0 to 255, weighted [M, N] and rounded to such: [..., M]."""
    carried = torch.floor(pixels @ low.t() / _LOW)
    total = pixels @ high.t() + carried + (1 << (_BITS - 1)) // _LOW
    return torch.floor(total / ((1 << _BITS) // _LOW)).clamp(0, 255)


def _bicubic(count: int, wanted: int) -> Tensor:
    """By how much each of ``count`` pixels enters each of ``wanted`` ones, float64 [wanted, count]: whole numbers, 2 to
    the power of 22 together but for their rounding."""
    scale = count / wanted
    blur = max(scale, 1.0)
    weights = torch.zeros(wanted, count, dtype=torch.float64)
    if count == wanted:
        return torch.eye(count, dtype=torch.float64) * (1 << _BITS)
    for place in range(wanted):
        middle = (place + 0.5) * scale
        first, last = max(int(middle - 2 * blur + 0.5), 0), min(int(middle + 2 * blur + 0.5), count)
        far = ((torch.arange(first, last, dtype=torch.float64) - middle + 0.5) / blur).abs()
        near = (1.5 * far - 2.5) * far * far + 1
        beyond = ((-0.5 * far + 2.5) * far - 4) * far + 2
        own = torch.where(far < 1, near, torch.where(far < 2, beyond, 0.0))
        own = own / own.sum() * (1 << _BITS)
        weights[place, first:last] = torch.trunc(own + torch.where(own < 0, -0.5, 0.5))
    return weights
