"""What SD and SDXL share: latents, and a network of other channels."""

from __future__ import annotations

import pytest

from tests.export.families.published import published
from tgate_export.families.base import Size


@pytest.mark.parametrize(("model", "channels"), [("sd15", 4), ("sdxl", 4), ("ssd-1b", 4)])
def test_latents_are_an_eighth_of_the_pixels(model: str, channels: int) -> None:
    model_of, checkpoint = published(model)
    assert model_of.family.latents(checkpoint, Size(width=832, height=1216)) == (channels, 152, 104)
    model_of.family.check(checkpoint)


def test_guidance_above_one_takes_both_halves() -> None:
    model, checkpoint = published("sdxl")
    assert model.family.guidance(checkpoint, 5.0) == "classifier-free"
    assert model.family.guidance(checkpoint, 1.0) == "none"
    model, checkpoint = published("lcm-sdxl")
    assert model.family.guidance(checkpoint, 8.0) == "embedded"
