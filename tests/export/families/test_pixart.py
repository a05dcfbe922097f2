"""PixArt as published: the mask, and the size that alpha is told."""

from __future__ import annotations

import pytest

from tests.export.families.published import published
from tgate_engine.errors import ExportError
from tgate_export.families.base import Size


def test_alpha_is_told_the_size_and_sigma_is_not() -> None:
    model, checkpoint = published("pixart-alpha")
    told = {c.conditioning.name: c.value for c in model.family.conditioning(checkpoint, Size(width=832, height=1216))}
    assert told == {
        "prompt_embeds": (),
        "prompt_mask": (),
        "resolution": (1216.0, 832.0),
        "aspect_ratio": (1216 / 832,),
    }
    model, checkpoint = published("pixart-sigma")
    names = [c.conditioning.name for c in model.family.conditioning(checkpoint, Size(width=1024, height=1024))]
    assert names == ["prompt_embeds", "prompt_mask"]
    assert model.family.token_length(checkpoint, 0) == 300


def test_patches_make_sizes_multiples_of_16() -> None:
    model, checkpoint = published("pixart-alpha")
    assert model.family.size_multiple(checkpoint) == 16
    model.family.check_size(checkpoint, Size(width=832, height=1216))
    with pytest.raises(ExportError, match="the width must be a multiple of 16 pixels for this model, got 840"):
        model.family.check_size(checkpoint, Size(width=840, height=1216))
