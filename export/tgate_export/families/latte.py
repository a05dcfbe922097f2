"""Latte: a video transformer whose blocks attend over space and over time in turns, with a T5 text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import transformers
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_export.checkpoints import Checkpoint
from tgate_export.families.base import ConditioningInput, Family, Size, Texts, side
from tgate_export.families.facts import LATTE
from tgate_export.families.t5 import T5Text, attention_bias, end_token, t5_conditioning

TOKENS = 120
"""Tokens of a prompt: what diffusers' pipeline encodes."""


class Latte(Family):
    """Latte (arXiv 2401.03048) and Open-Sora-Plan v1.0, which has its structure, in diffusers layout.

    Latents are [C, F, h, w]. Spatial blocks have self- and cross-attention, temporal blocks self-attention alone.
    """

    facts = LATTE
    pipeline_classes = ("LattePipeline",)
    classes: Mapping[str, type[nn.Module]] = {
        "transformer": diffusers.LatteTransformer3DModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.T5EncoderModel,
    }
    denoiser = "transformer"
    text_components = ("text_encoder",)
    tokenizers = ("tokenizer",)
    tokenizer_class = transformers.T5Tokenizer
    lower_prompts = True
    frames_argument = "video_length"
    frames_axis = 2

    def check(self, checkpoint: Checkpoint) -> None:
        super().check(checkpoint)
        config = self.config(checkpoint, "transformer")
        channels, outputs = config["in_channels"], config["out_channels"]
        if outputs != 2 * channels:
            raise ExportError(
                f"{checkpoint.where}: the transformer gives {outputs} channels; {self.pipeline_classes[0]} wants "
                f"{2 * channels}, the noise and its variance, and takes the first half"
            )

    def denoise(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        guidance: Tensor,
        conditioning: Mapping[str, Tensor],
    ) -> Tensor:
        frames = latents.shape[2]
        # The network repeats the text for every frame, and expects the caller to have repeated the mask.
        bias = attention_bias(conditioning["prompt_mask"], latents)
        output: Tensor = denoiser(
            latents,
            timestep=timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_attention_mask=bias.unsqueeze(1).expand(-1, frames, -1, -1).flatten(0, 1),
            return_dict=False,
        )[0]
        return output[:, : latents.shape[1]]

    def conditioning(self, checkpoint: Checkpoint, size: Size) -> Sequence[ConditioningInput]:
        """The text, and the prompt's mask for both halves: the pipeline cuts both texts where the prompt ends."""
        return t5_conditioning(self, checkpoint, self.token_length(checkpoint, 0), negative_mask="same")

    def text(self, encoders: Sequence[nn.Module], clip_skip: int = 0) -> nn.Module:
        return T5Text(*encoders)

    def token_length(self, checkpoint: Checkpoint, index: int) -> int:
        return TOKENS

    def end_token(self, checkpoint: Checkpoint, index: int) -> int | None:
        return end_token(self, checkpoint, self.text_components[index])

    def size_multiple(self, checkpoint: Checkpoint) -> int:
        return self.pixels(checkpoint) * int(self.config(checkpoint, "transformer")["patch_size"])

    def check_size(self, checkpoint: Checkpoint, size: Size) -> None:
        """The network knows as many places in time as it was trained with, or none for a picture."""
        super().check_size(checkpoint, size)
        frames = self.default_frames(checkpoint)
        if size.frames not in (1, frames):
            raise ExportError(f"--frames must be {frames}, or 1 for a picture, for this model; got {size.frames}")

    def default_size(self, checkpoint: Checkpoint) -> Size:
        height, width = side(checkpoint, "transformer", self.config(checkpoint, "transformer")["sample_size"])
        return Size(height=height * self.pixels(checkpoint), width=width * self.pixels(checkpoint))

    def default_frames(self, checkpoint: Checkpoint) -> int:
        return int(self.config(checkpoint, "transformer")["video_length"])

    def encode_with(self, pipe: Any, prompt: str, negative: str, clip_skip: int) -> tuple[Texts, Texts]:
        encoded = []
        for text in (prompt, negative):
            states, _ = pipe.encode_prompt(text, False, device="cpu", clean_caption=False, mask_feature=False)
            mask = pipe.tokenizer(
                text.lower().strip(), padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt"
            ).attention_mask
            encoded.append({"prompt_embeds": states, "prompt_mask": mask.float()})
        return encoded[0], encoded[1]

    def call(self, pipe: Any, conditioning: Texts, guidance_scale: float, guidance_rescale: float) -> dict[str, Any]:
        end = int(conditioning["prompt_mask.positive"][0].sum())  # where the pipeline cuts both texts
        negative = conditioning.get("prompt_embeds.negative")
        return {
            "negative_prompt": None,  # an empty one unless told otherwise
            "prompt_embeds": conditioning["prompt_embeds.positive"][:, :end],
            "negative_prompt_embeds": None if negative is None else negative[:, :end],
            "guidance_scale": guidance_scale,
        }
