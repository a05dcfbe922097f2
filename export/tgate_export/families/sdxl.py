"""The SDXL architecture: a U-Net with two CLIP text encoders and size conditioning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import diffusers
import torch
import transformers
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_engine.manifest import Conditioning
from tgate_export.checkpoint import Checkpoint
from tgate_export.families.base import ConditioningInput
from tgate_export.gating import AttentionSite

TIME_IDS = 6
"""Original height and width, crop top and left, target height and width."""


class Sdxl:
    """Stable Diffusion XL and models of its structure (arXiv 2307.01952), in diffusers layout."""

    name = "sdxl"
    pipeline_classes: tuple[str, ...] = ("StableDiffusionXLPipeline",)
    denoiser = "unet"
    decoder = "vae"
    text_components: tuple[str, ...] = ("text_encoder", "text_encoder_2")
    tokenizers: tuple[str, ...] = ("tokenizer", "tokenizer_2")

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises :class:`ExportError` where the checkpoint's configs are not of this architecture."""
        config = checkpoint.config("unet")
        vae = checkpoint.config("vae")
        for key, want in (("addition_embed_type", "text_time"), ("time_cond_proj_dim", None)):
            if config.get(key) != want:
                raise ExportError(
                    f"{checkpoint.root}: the unet has {key} = {config.get(key)!r}, SDXL has {want!r}; "
                    "this checkpoint is of another architecture"
                )
        if config.get("in_channels") != vae.get("latent_channels"):
            raise ExportError(
                f"{checkpoint.root}: the unet takes {config.get('in_channels')} channels, its latents have "
                f"{vae.get('latent_channels')}; inpainting and image-to-image checkpoints cannot be exported"
            )

    def build(self, checkpoint: Checkpoint, component: str) -> nn.Module:
        config = checkpoint.config(component)
        if component == "unet":
            module = diffusers.UNet2DConditionModel.from_config(config)
        elif component == "vae":
            module = diffusers.AutoencoderKL.from_config(config)
        else:
            cls = (
                transformers.CLIPTextModel if component == "text_encoder" else transformers.CLIPTextModelWithProjection
            )
            text_config = transformers.CLIPTextConfig.from_dict(config)
            text_config._attn_implementation = "sdpa"
            module = cls(text_config)
        module.eval()
        assert isinstance(module, nn.Module)
        return module

    def attention(self, denoiser: nn.Module) -> tuple[AttentionSite, ...]:
        """Every transformer block's ``attn1`` (self) and ``attn2`` (cross), in the order they run in a U-Net."""
        order = ("down_blocks", "mid_block", "up_blocks")
        names = [
            name
            for name, module in denoiser.named_modules()
            if name.endswith((".attn1", ".attn2")) and type(module).__name__ == "Attention"
        ]
        names.sort(key=lambda name: order.index(name.split(".")[0]))
        return tuple(AttentionSite(name, "self" if name.endswith("attn1") else "cross") for name in names)

    def denoise(
        self, denoiser: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        # diffusers joins the pooled text to a float32 sinusoid; eager PyTorch promotes it, a graph must be told.
        added = {"text_embeds": conditioning["pooled"].float(), "time_ids": conditioning["time_ids"]}
        output: Tensor = denoiser(
            latents,
            timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"],
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return output

    def conditioning(self, checkpoint: Checkpoint, height: int, width: int) -> Sequence[ConditioningInput]:
        """Text and pooled text from both encoders, and the size row: no crop, original and target size the output's."""
        first, second = (checkpoint.config(component) for component in self.text_components)
        length = checkpoint.token_length(self.tokenizers[0], self.text_components[0])
        width_text = int(first["hidden_size"]) + int(second["hidden_size"])
        sizes = (float(height), float(width), 0.0, 0.0, float(height), float(width))
        return (
            ConditioningInput(Conditioning(name="prompt_embeds", source="text"), (length, width_text), True),
            ConditioningInput(Conditioning(name="pooled", source="text"), (int(second["projection_dim"]),), True),
            ConditioningInput(Conditioning(name="time_ids", source="constant", value=sizes), (TIME_IDS,), False),
        )

    def text(self, encoders: Sequence[nn.Module]) -> nn.Module:
        return _SdxlText(*encoders)

    def size_multiple(self, checkpoint: Checkpoint) -> int:
        """The decoder's factor; the U-Net itself takes latents that do not halve evenly."""
        return checkpoint.vae_factor()

    def default_size(self, checkpoint: Checkpoint) -> int:
        return int(checkpoint.config("unet")["sample_size"]) * checkpoint.vae_factor()

    def zero_negative(self, checkpoint: Checkpoint) -> bool:
        """SDXL base: without a negative prompt, its text is zeros."""
        return bool(checkpoint.model_index.get("force_zeros_for_empty_prompt", True))


class _SdxlText(nn.Module):
    """Ids of both tokenizers [B, T] to ``prompt_embeds`` [B, T, C1 + C2] and ``pooled`` [B, P].

    Both encoders give their penultimate layer; the pooled text is the second's projection.
    """

    output_names = ("prompt_embeds", "pooled")

    def __init__(self, first: nn.Module, second: nn.Module) -> None:
        super().__init__()
        self.text_encoder = first
        self.text_encoder_2 = second

    def forward(self, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids_2, output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds
