"""What a checkpoint's feature extractor says of how pictures are prepared, and what of it is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from tgate_engine.errors import ExportError
from tgate_export.checkpoints.directory import DirectoryCheckpoint
from tgate_export.pictures import ClipPicture, check_processor, normalisation

PUBLISHED: dict[str, Any] = {
    "crop_size": 224,
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "image_mean": [0.4, 0.5, 0.6],
    "image_std": [0.2, 0.3, 0.4],
    "resample": 3,
    "size": 224,
}
"""Its keys as checkpoints of SD 1.5 have them."""


def checkpoint(folder: Path, own: Any = None, *, nested: bool = False) -> DirectoryCheckpoint:
    (folder / "feature_extractor").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    if own is not None:
        name, content = (
            ("processor_config.json", {"image_processor": own})
            if nested
            else (
                "preprocessor_config.json",
                own,
            )
        )
        (folder / "feature_extractor" / name).write_text(json.dumps(content))
    return DirectoryCheckpoint(folder)


def test_mean_and_deviation(tmp_path: Path) -> None:
    assert normalisation(checkpoint(tmp_path / "none")) == ([*OPENAI_CLIP_MEAN], [*OPENAI_CLIP_STD])
    for nested in (False, True):
        own = checkpoint(tmp_path / str(nested), PUBLISHED, nested=nested)
        assert normalisation(own) == ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])


def test_one_that_belongs_to_the_encoder(tmp_path: Path) -> None:
    for i, own in enumerate([None, {}, PUBLISHED, {**PUBLISHED, "size": {"shortest_edge": 224}}]):
        check_processor(checkpoint(tmp_path / str(i), own), 224)
    wide = {"size": {"shortest_edge": 336}, "crop_size": {"height": 336, "width": 336}}
    check_processor(checkpoint(tmp_path / "wide", wide), 336)
    check_processor(checkpoint(tmp_path / "absent"), 336)  # diffusers makes one of the encoder's size


@pytest.mark.parametrize(
    ("own", "side", "says"),
    [
        (PUBLISHED, 336, "has size = 224, and the IP-Adapter's image encoder is shown pictures of 336"),
        ({"size": 336}, 336, "has crop_size = None"),
        ({**PUBLISHED, "crop_size": {"height": 224, "width": 200}}, 224, "has crop_size = {'height': 224"),
        ({**PUBLISHED, "resample": 2}, 224, "has resample = 2"),
        ({**PUBLISHED, "do_center_crop": False}, 224, "has do_center_crop = False"),
        ({**PUBLISHED, "do_normalize": False}, 224, "has do_normalize = False"),
        ({**PUBLISHED, "rescale_factor": 1.0}, 224, "has rescale_factor = 1.0"),
    ],
)
def test_one_that_prepares_them_otherwise(tmp_path: Path, own: dict[str, Any], side: int, says: str) -> None:
    with pytest.raises(ExportError) as caught:
        check_processor(checkpoint(tmp_path / "odd", own), side)
    assert says in str(caught.value)


def test_what_is_no_extractor(tmp_path: Path) -> None:
    odd = checkpoint(tmp_path / "odd", [1], nested=True)
    with pytest.raises(ExportError, match=r"has image_processor = \[1\]; an object is wanted"):
        check_processor(odd, 224)
    for key, value in {"image_mean": [0.1], "image_std": [0, 1, 1]}.items():
        with pytest.raises(ExportError, match=f"has {key} = .*three finite numbers are wanted"):
            normalisation(checkpoint(tmp_path / key, {key: value}))


@pytest.mark.parametrize(
    ("height", "width", "side"), [(480, 832, 224), (832, 480, 224), (30, 47, 32), (224, 224, 224), (333, 224, 224)]
)
def test_a_picture_is_prepared_as_clips_processor_does_it(height: int, width: int, side: int) -> None:
    """To the bit, at the ends of all colours too."""
    drawn = np.random.default_rng(height)
    pixels = drawn.integers(0, 256, (height, width, 3), np.uint8)
    pixels[: height // 2] = np.where(drawn.random((height // 2, width, 1)) > 0.5, 255, 0)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
    processor = CLIPImageProcessor(
        size={"shortest_edge": side}, crop_size={"height": side, "width": side}, image_mean=mean, image_std=std
    )
    wanted = processor(images=Image.fromarray(pixels), return_tensors="pt").pixel_values
    got = ClipPicture(height, width, side, mean, std)(torch.from_numpy(pixels)[None])
    assert got.shape == (1, 3, side, side)
    assert (got - wanted).abs().max() < 1e-6  # a level of a colour is a hundredth
