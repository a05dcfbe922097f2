"""The SDXL architecture: a U-Net with two CLIP text encoders and size conditioning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import diffusers
import torch
import transformers
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_engine.manifest import Conditioning, Guidance
from tgate_export.checkpoints import Checkpoint
from tgate_export.families.base import ConditioningInput, Family, Size, unet_attention, vae_factor
from tgate_export.gating import AttentionSite

TIME_IDS = 6
"""Original height and width, crop top and left, target height and width."""


class Sdxl(Family):
    """Stable Diffusion XL and models of its structure (arXiv 2307.01952), in diffusers layout.

    A U-Net that was distilled to a consistency model takes the guidance scale as an input (arXiv 2310.04378,
    section 4.2) and has no second half.
    """

    name = "sdxl"
    pipeline_classes = ("StableDiffusionXLPipeline",)
    classes: Mapping[str, type[nn.Module]] = {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
    }
    denoiser = "unet"
    text_components = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")

    def check(self, checkpoint: Checkpoint) -> None:
        super().check(checkpoint)
        found = checkpoint.config("unet").get("addition_embed_type")
        if found != "text_time":
            raise ExportError(
                f"{checkpoint.where}: the unet has addition_embed_type = {found!r}, SDXL has 'text_time'; "
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
        # diffusers joins the pooled text to a float32 sinusoid; eager PyTorch promotes it, a graph must be told.
        added = {"text_embeds": conditioning["pooled"].float(), "time_ids": conditioning["time_ids"]}
        width = denoiser.config.time_cond_proj_dim
        output: Tensor = denoiser(
            latents,
            timesteps,
            timestep_cond=None if width is None else guidance_embedding(guidance, int(width)).to(latents.dtype),
            encoder_hidden_states=conditioning["prompt_embeds"],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return output

    def guidance(self, checkpoint: Checkpoint, scale: float) -> Guidance:
        if checkpoint.config("unet").get("time_cond_proj_dim") is not None:
            return "embedded"
        return super().guidance(checkpoint, scale)

    def conditioning(self, checkpoint: Checkpoint, size: Size) -> Sequence[ConditioningInput]:
        """Text and pooled text from both encoders, and the size row: no crop, original and target size the output's."""
        first, second = (checkpoint.config(component) for component in self.text_components)
        width = int(first["hidden_size"]) + int(second["hidden_size"])
        row = (float(size.height), float(size.width), 0.0, 0.0, float(size.height), float(size.width))
        ids = Conditioning(name="time_ids", source="constant", value=row)
        return (
            ConditioningInput(
                Conditioning(name="prompt_embeds", source="text"), (self.token_length(checkpoint, 0), width)
            ),
            ConditioningInput(Conditioning(name="pooled", source="text"), (int(second["projection_dim"]),)),
            ConditioningInput(ids, (TIME_IDS,), follows_dtype=False),
        )

    def text(self, encoders: Sequence[nn.Module]) -> nn.Module:
        return _SdxlText(*encoders)

    def default_size(self, checkpoint: Checkpoint) -> Size:
        side = int(checkpoint.config("unet")["sample_size"]) * vae_factor(checkpoint.config("vae"))
        return Size(height=side, width=side)

    def zero_negative(self, checkpoint: Checkpoint) -> bool:
        """SDXL base: without a negative prompt, its text is zeros."""
        return bool(checkpoint.model_index.get("force_zeros_for_empty_prompt", True))


def guidance_embedding(scale: Tensor, width: int) -> Tensor:
    """A guidance scale [N] as sines and cosines [N, width] of 1000 (scale - 1), as consistency models take it."""
    half = width // 2
    # Written down as numbers, so that no engine computes them in its own way: the angles go up to thousands.
    decay = [10000.0 ** (-i / (half - 1)) for i in range(half)]
    angles = (1000 * (scale - 1))[:, None] * torch.tensor(decay, dtype=torch.float32)[None]
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


class _SdxlText(nn.Module):
    """Ids of both tokenizers [B, T] to ``prompt_embeds`` [B, T, C1 + C2] and ``pooled`` [B, P].

    Both encoders give their penultimate layer; the pooled text is the second's projection.
    """

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.text_encoder = first
        self.text_encoder_2 = second

    def forward(self, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids_2, output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds
