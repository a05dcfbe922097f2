"""How pictures are prepared for CLIP's vision models: what a checkpoint's feature extractor says of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from tgate_engine.errors import ExportError
from tgate_export.checkpoints import Checkpoint
from tgate_export.checkpoints.configs import check_code
from tgate_export.checkpoints.files import quoted


def normalisation(checkpoint: Checkpoint) -> tuple[list[float], list[float]]:
    """Mean and deviation by which pixels are normalised for CLIP: the feature extractor's, which has CLIP's defaults.
    The pipeline sets everything else about it."""
    own = _extractor(checkpoint)
    numbers = []
    for key, default in (("image_mean", OPENAI_CLIP_MEAN), ("image_std", OPENAI_CLIP_STD)):
        values = own.get(key)
        values = default if values is None else values
        fit = isinstance(values, (list, tuple)) and len(values) == 3
        if not fit or not all(
            isinstance(v, (int, float)) and math.isfinite(v) and (v or key != "image_std") for v in values
        ):
            raise ExportError(
                f"{checkpoint.where}: feature_extractor/preprocessor_config.json has {key} = {values!r}; "
                "three finite numbers are wanted, one for each colour"
            )
        numbers.append([float(value) for value in values])
    return numbers[0], numbers[1]


def check_processor(checkpoint: Checkpoint, side: int) -> None:
    """Raises :class:`ExportError` where the checkpoint has a feature extractor of its own, which diffusers would go
    by, that prepares pictures for another encoder or in another way than CLIP's is."""
    own = _extractor(checkpoint)
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
                f"{checkpoint.where}: feature_extractor/preprocessor_config.json has {key} = {quoted(value)}, and the "
                f"IP-Adapter's image encoder is shown pictures of {side} pixels a side as CLIP's are prepared; remove "
                "the feature_extractor, or give the encoder that belongs to it"
            )


def _extractor(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Its configuration; empty where there is none."""
    nested = checkpoint.further("feature_extractor/processor_config.json") or {}
    own = nested.get("image_processor") or checkpoint.further("feature_extractor/preprocessor_config.json") or {}
    if not isinstance(own, Mapping):
        raise ExportError(
            f"{checkpoint.where}: feature_extractor/processor_config.json has image_processor = {quoted(own)}; an "
            "object is wanted"
        )
    check_code(f"{checkpoint.where}: feature_extractor", own)
    return own
