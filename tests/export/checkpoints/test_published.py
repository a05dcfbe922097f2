"""Published configurations, and random weights that are the same every time."""

from __future__ import annotations

import pytest
import torch

from tests.export.families.published import published
from tgate_engine.errors import ExportError
from tgate_export.checkpoints.published import facts
from tgate_export.families import EMBEDDED, MODELS


@pytest.mark.parametrize("name", [name for name, model in MODELS.items() if model.checkpoint != EMBEDDED])
def test_every_model_that_is_downloaded_has_its_configurations(name: str) -> None:
    model, checkpoint = published(name)
    family = model.family
    assert checkpoint.licence()
    for component in (family.denoiser, family.decoder, *family.text_components, *family.image_parts(checkpoint)):
        assert checkpoint.config(component)


def test_random_weights_depend_on_their_name_alone() -> None:
    (_, first), (_, second) = published("sd15"), published("sd15")
    key = "conv_in.weight"
    values = first.tensors("unet").read(key)
    assert torch.equal(values, second.tensors("unet").read(key))
    assert values.std().item() == pytest.approx((4 * 9) ** -0.5, rel=0.05), "as wide as its fan-in allows"
    assert not torch.equal(values[0], values[1])


def test_a_model_without_configurations_is_named() -> None:
    with pytest.raises(ExportError, match="no published configuration of 'mini-sdxl' is carried"):
        facts("mini-sdxl")
