"""PixArt: a diffusion transformer with a T5 text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import transformers
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_engine.manifest import Conditioning
from tgate_export.checkpoints import Checkpoint
from tgate_export.families.base import ConditioningInput, Family, Size, Texts, side
from tgate_export.families.facts import PIXART
from tgate_export.families.t5 import T5Text, end_token, t5_conditioning

TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
"""Tokens of a prompt, by pipeline: what diffusers' pipelines encode unless told otherwise."""

_NOT_CONDITIONED = {"resolution": None, "aspect_ratio": None}


class PixArt(Family):
    """PixArt-alpha (arXiv 2310.00426) and PixArt-Sigma (arXiv 2403.04692), in diffusers layout.

    The network may predict a variance beside the noise; samplers do not use it, and the graphs drop it.
    """

    facts = PIXART
    pipeline_classes = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    classes: Mapping[str, type[nn.Module]] = {
        "transformer": diffusers.PixArtTransformer2DModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.T5EncoderModel,
    }
    aliases: Mapping[str, tuple[str, ...]] = {"PixArtTransformer2DModel": ("Transformer2DModel",)}  # until 2024
    denoiser = "transformer"
    text_components = ("text_encoder",)
    tokenizers = ("tokenizer",)
    tokenizer_class = transformers.T5Tokenizer
    lower_prompts = True

    def check(self, checkpoint: Checkpoint) -> None:
        super().check(checkpoint)
        raw = checkpoint.config("transformer")
        if raw.get("num_vector_embeds") is not None:
            raise ExportError(
                f"{checkpoint.where}: the transformer has num_vector_embeds = {raw['num_vector_embeds']}, PixArt has "
                "none; this checkpoint is of another architecture"
            )
        config = self.config(checkpoint, "transformer")
        channels, outputs = config["in_channels"], config["out_channels"]
        if outputs not in (channels, 2 * channels):
            raise ExportError(
                f"{checkpoint.where}: the transformer gives {outputs} channels; samplers take {channels}, or twice as "
                "many where it predicts a variance"
            )
        sized = self._takes_size(checkpoint)
        pipeline = str(checkpoint.model_index["_class_name"])
        if sized and (pipeline != "PixArtAlphaPipeline" or config["sample_size"] != 128):
            raise ExportError(
                f"{checkpoint.where}: the transformer takes the size (use_additional_conditions), which {pipeline} "
                f"does not tell one of sample_size = {config['sample_size']}; set use_additional_conditions to false "
                "if it was trained without"
            )

    def _takes_size(self, checkpoint: Checkpoint) -> bool:
        """Where the config does not say, diffusers goes by the size of the 1024-pixel models."""
        config = self.config(checkpoint, "transformer")
        stated = config["use_additional_conditions"]
        return bool(config["sample_size"] == 128 if stated is None else stated)

    def denoise(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        guidance: Tensor,
        conditioning: Mapping[str, Tensor],
    ) -> Tensor:
        sizes = {name: conditioning[name] for name in _NOT_CONDITIONED if name in conditioning}
        output: Tensor = denoiser(
            latents,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_attention_mask=conditioning["prompt_mask"],
            timestep=timesteps,
            added_cond_kwargs=sizes or _NOT_CONDITIONED,
            return_dict=False,
        )[0]
        return output[:, : latents.shape[1]]

    def conditioning(self, checkpoint: Checkpoint, size: Size) -> Sequence[ConditioningInput]:
        """The text and its mask; in the 1024-pixel models also the size and its aspect."""
        text = t5_conditioning(self, checkpoint, self.token_length(checkpoint, 0), negative_mask="own")
        if not self._takes_size(checkpoint):
            return text
        rows = {"resolution": (float(size.height), float(size.width)), "aspect_ratio": (size.height / size.width,)}
        return (
            *text,
            *(
                ConditioningInput(Conditioning(name=name, source="constant"), (len(row),), False, value=row)
                for name, row in rows.items()
            ),
        )

    def text(self, encoders: Sequence[nn.Module], clip_skip: int = 0) -> nn.Module:
        return T5Text(*encoders)

    def token_length(self, checkpoint: Checkpoint, index: int) -> int:
        return TOKENS[str(checkpoint.model_index["_class_name"])]

    def end_token(self, checkpoint: Checkpoint, index: int) -> int | None:
        return end_token(self, checkpoint, self.text_components[index])

    def size_multiple(self, checkpoint: Checkpoint) -> int:
        return self.pixels(checkpoint) * int(self.config(checkpoint, "transformer")["patch_size"])

    def default_size(self, checkpoint: Checkpoint) -> Size:
        height, width = side(checkpoint, "transformer", self.config(checkpoint, "transformer")["sample_size"])
        return Size(height=height * self.pixels(checkpoint), width=width * self.pixels(checkpoint))

    def encode_with(self, pipe: Any, prompt: str, negative: str, clip_skip: int) -> tuple[Texts, Texts]:
        length = TOKENS[type(pipe).__name__]
        encoded = pipe.encode_prompt(
            prompt, negative_prompt=negative, device="cpu", clean_caption=False, max_sequence_length=length
        )
        positive, mask, other, other_mask = encoded
        return (
            {"prompt_embeds": positive, "prompt_mask": mask.float()},
            {"prompt_embeds": other, "prompt_mask": other_mask.float()},
        )

    def call(self, pipe: Any, conditioning: Texts, guidance_scale: float, guidance_rescale: float) -> dict[str, Any]:
        return {
            "negative_prompt": None,
            "prompt_embeds": conditioning["prompt_embeds.positive"],
            "prompt_attention_mask": conditioning["prompt_mask.positive"],
            "negative_prompt_embeds": conditioning.get("prompt_embeds.negative"),
            "negative_prompt_attention_mask": conditioning.get("prompt_mask.negative"),
            "guidance_scale": guidance_scale,
            "use_resolution_binning": False,
        }
