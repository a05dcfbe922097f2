"""Latte as published: frames come after channels, and both halves share a mask."""

from __future__ import annotations

from tests.export.families.published import published
from tgate_export.families.base import Size


def test_frames_and_the_mask_that_both_halves_share() -> None:
    model, checkpoint = published("opensora")
    family, size = model.family, Size(width=512, height=512, frames=16)
    assert family.latents(checkpoint, size) == (4, 16, 64, 64)
    text, mask = family.conditioning(checkpoint, size)
    assert (text.shape, mask.shape, mask.mask) == ((120, 4096), (120,), True)
    assert mask.conditioning.negative == "same"
