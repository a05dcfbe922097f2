"""Stable Video Diffusion as published: frames, the picture, guidance that grows over them."""

from __future__ import annotations

import pytest

from tests.export.families.published import published
from tgate_export.families.base import Size


def test_a_picture_conditions_both_ways_and_its_half_goes_on() -> None:
    model, checkpoint = published("svd")
    family, size = model.family, Size(width=1024, height=576, frames=25)
    assert family.latents(checkpoint, size) == (25, 4, 72, 128)
    embedding, latents, ids = family.conditioning(checkpoint, size)
    assert (embedding.shape, embedding.attended, embedding.conditioning.negative) == ((1, 1024), True, "zeros")
    assert (latents.shape, latents.attended) == ((4, 72, 128), False)
    assert ids.value == (6.0, 127.0, 0.02)
    assert family.after_gate == "positive"


def test_guidance_grows_from_the_first_frame_to_the_last() -> None:
    ramp = published("svd")[0].family.guidance_ramp((5, 4, 72, 128))
    assert ramp is not None
    assert ramp.flatten().tolist() == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert ramp.shape == (1, 5, 1, 1, 1)
