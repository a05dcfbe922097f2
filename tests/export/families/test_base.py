"""What every family shares: sizes and their checks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from tests.export.families.published import published
from tgate_engine.errors import ExportError
from tgate_export.checkpoints import Checkpoint
from tgate_export.families.base import Size, side


def test_a_size_is_written_as_requests_name_it() -> None:
    assert str(Size(width=832, height=1216)) == "832x1216"


@pytest.mark.parametrize(
    ("width", "height", "words"), [(832, 1210, "height .* 1208 and 1216"), (4, 8, "width .* got 4")]
)
def test_a_size_that_the_network_cannot_make(width: int, height: int, words: str) -> None:
    model, checkpoint = published("sdxl")
    with pytest.raises(ExportError, match=words):
        model.family.check_size(checkpoint, Size(width=width, height=height))


@pytest.mark.parametrize(("sample", "pair"), [(64, (64, 64)), ([72, 128], (72, 128))])
def test_a_networks_own_size(sample: object, pair: tuple[int, int]) -> None:
    assert side(published("sdxl")[1], "unet", sample) == pair


@pytest.mark.parametrize("sample", [None, "64", [64], [0, 64], 64.0])
def test_a_networks_own_size_that_is_none(sample: object) -> None:
    with pytest.raises(ExportError, match="which names no size of latents; give --size WIDTHxHEIGHT"):
        side(published("sdxl")[1], "unet", sample)


def test_a_decoder_that_shifts_its_latents_is_refused() -> None:
    model, checkpoint = published("sd15")
    assert model.family.scaling(checkpoint).scale == pytest.approx(0.18215)
    real = model.family.config

    def shifted(of: Checkpoint, component: str) -> Mapping[str, Any]:
        return {**real(of, component), "shift_factor": 0.1}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.family, "config", shifted)
        with pytest.raises(ExportError, match=r"has shift_factor = 0.1, which StableDiffusionPipeline ignores"):
            model.family.scaling(checkpoint)
