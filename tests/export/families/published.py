"""A model's published configurations as a checkpoint without weights."""

from __future__ import annotations

from tgate_export.checkpoints import Checkpoint, open_checkpoint
from tgate_export.families import Model, find_model


def published(name: str) -> tuple[Model, Checkpoint]:
    """The model of that name, and its configurations."""
    model = find_model(name)
    family = model.family
    components = (family.denoiser, family.decoder, *family.text_components, *family.image_components)
    checkpoint = open_checkpoint(
        name, "", weights="none", components=components, build=family.build, elsewhere={}, prefer_half=False
    )
    return model, checkpoint
