"""A small decoder beside the checkpoint's own, for pictures of unfinished latents: diffusers' AutoencoderTiny, TAESD
and its kind, which were distilled from the autoencoders of Stable Diffusion, SDXL, SD3 and FLUX.1."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import accelerate
from diffusers import AutoencoderTiny

from tgate_engine.errors import ExportError
from tgate_export.checkpoints import Checkpoint, Tensors
from tgate_export.checkpoints.configs import bounded_module, check_config
from tgate_export.checkpoints.directory import TensorFiles
from tgate_export.checkpoints.files import check_inside, present, quoted, read_json
from tgate_export.families.base import Family, Scaling
from tgate_export.libraries import refusing
from tgate_export.quiet import quiet
from tgate_export.storage import check_tensors

COMPONENT = "preview_decoder"
"""What its tensors and its graph are called beside those of the checkpoint."""

_WANTED = "--preview-decoder wants a directory of diffusers' AutoencoderTiny"


class PreviewDecoder:
    """A directory of an AutoencoderTiny: ``config.json`` and safetensors weights. ``where`` names it in messages."""

    def __init__(self, root: Path, *, prefer_half: bool = False) -> None:
        """Read the configuration and the names of the tensors. ``prefer_half``: of two files take the fp16 one. Raises
        :class:`ExportError` for what is no AutoencoderTiny."""
        path = root / "config.json"
        if not present(path):
            raise ExportError(f"{root} has no config.json; {_WANTED}")
        check_inside(root, path)
        self.root, self.where = root, str(root)
        self.config: Mapping[str, Any] = read_json(path)
        name = self.config.get("_class_name")
        if name != AutoencoderTiny.__name__:
            raise ExportError(f"{path} has _class_name = {quoted(name)}; {_WANTED}")
        check_config(str(path), AutoencoderTiny, self.config)
        self._files = TensorFiles.open(root, prefer_half)
        with accelerate.init_empty_weights(include_buffers=False):
            module = self.build()
        self.config = module.config  # with the class's defaults
        check_tensors(self, COMPONENT, module)

    @property
    def variant(self) -> str | None:
        """What diffusers calls the file that is read here."""
        return "fp16" if any(".fp16" in path.name for path in self._files.files.values()) else None

    def tensors(self, component: str) -> Tensors:
        """Those of :data:`COMPONENT`, all that there is."""
        return self._files

    def build(self) -> Any:
        """The module in evaluation mode, its weights uninitialised."""
        where = f"{self.where}/config.json"
        advice = "it is damaged: download it again"
        with quiet(), refusing(f"{where} makes no AutoencoderTiny", advice), bounded_module(where):
            return AutoencoderTiny.from_config(dict(self.config)).eval()

    def check(self, family: Family, checkpoint: Checkpoint) -> None:
        """Raises :class:`ExportError` where it does not decode what the family's denoiser makes of the checkpoint."""
        if family.frames_axis is not None or family.decodes_frames_together:
            raise ExportError(
                f"--preview-decoder: {family.name} decodes its latents as a video's, and an AutoencoderTiny decodes "
                "pictures; leave it out"
            )
        blocks, each = self.config["num_decoder_blocks"], self.config["upsampling_scaling_factor"]
        for what, got, wanted in (
            ("latents of {} channels", self.config["latent_channels"], family.latent_channels(checkpoint)),
            ("{} pixels a latent", each ** (len(blocks) - 1), family.pixels(checkpoint)),
            ("pictures of {} channels", self.config["out_channels"], 3),
        ):
            if got != wanted:
                raise ExportError(
                    f"{self.where} is for {what.format(got)}, and {checkpoint.where} has {wanted}; give the "
                    "AutoencoderTiny that was made for this model"
                )

    def scaling(self) -> Scaling:
        """What pipelines do to latents before such a decoder: they divide them by its own ``scaling_factor``, which is
        1 in those that are published, and not by the checkpoint's. Raises :class:`ExportError`."""
        scale, shift = self.config["scaling_factor"], self.config["shift_factor"]
        if not 0 < abs(scale) < math.inf or shift != 0:
            raise ExportError(
                f"{self.where}/config.json has scaling_factor = {scale} and shift_factor = {shift}; latents are "
                "divided by a number other than 0, and nothing is added to them: a shift_factor of 0 is wanted"
            )
        return Scaling(scale=float(scale))
