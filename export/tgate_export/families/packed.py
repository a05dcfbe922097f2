"""What families share whose pipeline packs 2x2 latent pixels into one place, and hands noise levels of its own to
Euler's scheduler."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from tgate_engine.errors import ExportError
from tgate_export.checkpoints import Checkpoint
from tgate_export.checkpoints.files import plain
from tgate_export.families.base import Family, Size
from tgate_export.recipes import FLOW_EULER
from tgate_export.schedulers import MU, PIPELINE_SIGMAS, size_shift

PATCH = 2
"""Latent pixels of a side that the pipeline packs into one place."""


class Packed(Family):
    """Latents are [C, h, w]; the pipeline's, [h/2 * w/2, 4 C], are made of them around the network."""

    def check_channels(self, checkpoint: Checkpoint, outputs: int) -> None:
        """``outputs``: numbers that the transformer gives for each place. Raises :class:`ExportError` where it takes or
        gives others than the pipeline packs."""
        inputs, channels = self.config(checkpoint, self.denoiser)["in_channels"], self.latent_channels(checkpoint)
        if inputs != channels * PATCH**2 or outputs != inputs:
            raise ExportError(
                f"{checkpoint.where}: the transformer takes {inputs} channels and gives {outputs}; its latents have "
                f"{channels}, and the pipeline packs {PATCH}x{PATCH} places of them into one: {channels * PATCH**2} "
                "both times are wanted"
            )

    def as_pipeline(self, latents: Tensor) -> Tensor:
        places = latents.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))  # [B, C, h/2, 2, w/2, 2]
        return places.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def from_pipeline(self, latents: Tensor, shape: Sequence[int]) -> Tensor:
        _, channels, height, width = shape
        places = latents.unflatten(2, (channels, PATCH, PATCH)).unflatten(1, (height // PATCH, width // PATCH))
        return places.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)

    def scheduler_config(self, checkpoint: Checkpoint, size: Size) -> Mapping[str, Any]:
        """With the noise levels that the pipeline hands to its scheduler, and how far they are shifted by the size."""
        config = dict(super().scheduler_config(checkpoint, size))
        if config.get("_class_name") != FLOW_EULER:
            raise ExportError(
                f"{checkpoint.where}: its scheduler is {plain(config.get('_class_name'))}; {self.pipeline_classes[0]} "
                f"hands noise levels of its own to a {FLOW_EULER}, and that is wanted"
            )
        config[PIPELINE_SIGMAS] = True
        if config.get("use_dynamic_shifting"):
            _, height, width = self.latents(checkpoint, size)
            config[MU] = size_shift(config, (height // PATCH) * (width // PATCH))
        return config

    def size_multiple(self, checkpoint: Checkpoint) -> int:
        return PATCH * self.pixels(checkpoint)
