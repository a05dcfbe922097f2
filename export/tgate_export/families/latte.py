"""Latte: a video transformer whose blocks attend over space and over time in turns, with a T5 text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import diffusers
import transformers
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_export.checkpoints import Checkpoint
from tgate_export.families.base import ConditioningInput, Family, Size, block_attention, vae_factor
from tgate_export.families.t5 import T5Text, attention_bias, t5_conditioning
from tgate_export.gating import AttentionSite

TOKENS = 120
"""Tokens of a prompt: what diffusers' pipeline encodes."""


class Latte(Family):
    """Latte (arXiv 2401.03048) and Open-Sora-Plan v1.0, which has its structure, in diffusers layout.

    Latents are [C, F, h, w]. Spatial blocks have self- and cross-attention, temporal blocks self-attention alone.
    """

    name = "latte"
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
    frames_axis = 2

    def attention(self, denoiser: nn.Module) -> tuple[AttentionSite, ...]:
        """Block by block: the spatial one, then the temporal one."""
        sites = block_attention(denoiser)
        return tuple(sorted(sites, key=lambda site: (int(site.module.split(".")[1]), site.module.startswith("temp"))))

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
        return t5_conditioning(checkpoint, self.token_length(checkpoint, 0), negative_mask="same")

    def text(self, encoders: Sequence[nn.Module]) -> nn.Module:
        return T5Text(*encoders)

    def token_length(self, checkpoint: Checkpoint, index: int) -> int:
        return TOKENS

    def size_multiple(self, checkpoint: Checkpoint) -> int:
        return vae_factor(checkpoint.config("vae")) * int(checkpoint.config("transformer")["patch_size"])

    def check_size(self, checkpoint: Checkpoint, size: Size) -> None:
        """The network knows as many places in time as it was trained with, or none for a picture."""
        super().check_size(checkpoint, size)
        frames = int(checkpoint.config("transformer")["video_length"])
        if size.frames not in (1, frames):
            raise ExportError(f"--frames must be {frames}, or 1 for a picture, for this model; got {size.frames}")

    def default_size(self, checkpoint: Checkpoint) -> Size:
        config = checkpoint.config("transformer")
        side = int(config["sample_size"]) * vae_factor(checkpoint.config("vae"))
        return Size(height=side, width=side, frames=int(config["video_length"]))
