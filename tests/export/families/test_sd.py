"""Stable Diffusion as published: sizes, conditioning, what it takes from its pipeline."""

from __future__ import annotations

from tests.export.families.published import published
from tgate_export.families.base import Size


def test_sd15_is_conditioned_by_its_text_alone() -> None:
    model, checkpoint = published("sd15")
    size = model.family.default_size(checkpoint)
    assert str(size) == "512x512"
    assert model.family.latents(checkpoint, Size(width=768, height=512)) == (4, 64, 96)
    (text,) = model.family.conditioning(checkpoint, size)
    assert (text.shape, text.attended) == ((77, 768), True)
    assert not model.family.zero_negative(checkpoint), "a request without a negative prompt has the empty one's text"


def test_sd21_is_wider_and_larger() -> None:
    model, checkpoint = published("sd21")
    assert str(model.family.default_size(checkpoint)) == "768x768"
    (text,) = model.family.conditioning(checkpoint, Size(width=768, height=768))
    assert text.shape == (77, 1024)
