"""Stable Diffusion 1 and 2: a U-Net with one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import diffusers
import transformers
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_engine.manifest import Conditioning
from tgate_export.checkpoints import Checkpoint
from tgate_export.families.base import ConditioningInput, Family, Size, unet_attention, vae_factor
from tgate_export.gating import AttentionSite


class StableDiffusion(Family):
    """Stable Diffusion 1.x and 2.x (arXiv 2112.10752), in diffusers layout. The sampler knows what they predict."""

    name = "sd"
    pipeline_classes = ("StableDiffusionPipeline",)
    classes: Mapping[str, type[nn.Module]] = {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModel,
    }
    denoiser = "unet"
    text_components = ("text_encoder",)
    tokenizers = ("tokenizer",)

    def check(self, checkpoint: Checkpoint) -> None:
        super().check(checkpoint)
        config = checkpoint.config("unet")
        for key in ("addition_embed_type", "time_cond_proj_dim", "class_embed_type"):
            if config.get(key) is not None:
                raise ExportError(
                    f"{checkpoint.where}: the unet has {key} = {config[key]!r}, Stable Diffusion 1 and 2 have none; "
                    "this checkpoint is of another architecture"
                )

    def attention(self, denoiser: nn.Module) -> tuple[AttentionSite, ...]:
        return unet_attention(denoiser)

    def denoise(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        guidance: Tensor,
        conditioning: Mapping[str, Tensor],
    ) -> Tensor:
        output: Tensor = denoiser(
            latents, timesteps, encoder_hidden_states=conditioning["prompt_embeds"], return_dict=False
        )[0]
        return output

    def conditioning(self, checkpoint: Checkpoint, size: Size) -> Sequence[ConditioningInput]:
        """The text alone."""
        shape = (self.token_length(checkpoint, 0), int(checkpoint.config("text_encoder")["hidden_size"]))
        return (ConditioningInput(Conditioning(name="prompt_embeds", source="text"), shape),)

    def text(self, encoders: Sequence[nn.Module]) -> nn.Module:
        return _LastLayer(*encoders)

    def default_size(self, checkpoint: Checkpoint) -> Size:
        side = int(checkpoint.config("unet")["sample_size"]) * vae_factor(checkpoint.config("vae"))
        return Size(height=side, width=side)


class _LastLayer(nn.Module):
    """Ids [B, T] to ``prompt_embeds`` [B, T, C]: the encoder's last layer, normalised."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.text_encoder = encoder

    def forward(self, ids: Tensor) -> tuple[Tensor]:
        return (self.text_encoder(ids).last_hidden_state,)
