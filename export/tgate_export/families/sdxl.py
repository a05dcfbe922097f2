"""The SDXL architecture: a U-Net with two CLIP text encoders and size conditioning."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_engine.manifest import Conditioning
from tgate_export.checkpoints import Checkpoint
from tgate_export.families.base import ConditioningInput, Scaling, Size, Texts
from tgate_export.families.facts import SDXL
from tgate_export.families.unet import TIME_IDS, TextUNet, beside_mask, inpainting_call, masked, time_ids
from tgate_export.ip_adapter import attended, inputs_of


class Sdxl(TextUNet):
    """Stable Diffusion XL and models of its structure (arXiv 2307.01952), in diffusers layout."""

    facts = SDXL
    pipeline_classes = ("StableDiffusionXLPipeline", "StableDiffusionXLInpaintPipeline")
    inpainting_class = "StableDiffusionXLInpaintPipeline"
    picture_pipeline = "StableDiffusionXLImg2ImgPipeline"
    classes: Mapping[str, type[nn.Module]] = {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
    }
    addition = "text_time"
    text_components = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")

    def check_pipeline(self, checkpoint: Checkpoint) -> None:
        entry = checkpoint.model_index.get("text_encoder")
        if isinstance(entry, (list, tuple)) and entry[1:] == [None]:
            raise ExportError(
                f"{checkpoint.where} is the SDXL refiner (it has no text_encoder), which finishes another model's "
                "pictures and cannot be exported; give the base model"
            )
        super().check_pipeline(checkpoint)

    def check(self, checkpoint: Checkpoint) -> None:
        super().check(checkpoint)
        if checkpoint.model_index.get("requires_aesthetics_score") and self.inpaints(checkpoint):
            raise ExportError(
                f"{checkpoint.where}: model_index.json has requires_aesthetics_score = true, as the SDXL refiner's; "
                "such networks cannot be exported"
            )
        unet, second = self.config(checkpoint, "unet"), self.config(checkpoint, "text_encoder_2")
        parts = (int(unet["addition_time_embed_dim"] or 0) * TIME_IDS, int(second["projection_dim"]))
        if sum(parts) != unet["projection_class_embeddings_input_dim"]:
            raise ExportError(
                f"{checkpoint.where}: the unet has projection_class_embeddings_input_dim = "
                f"{unet['projection_class_embeddings_input_dim']}, and is given {sum(parts)} numbers: {TIME_IDS} sizes "
                f"of addition_time_embed_dim = {unet['addition_time_embed_dim']} and text_encoder_2's "
                f"projection_dim = {parts[1]}; the SDXL refiner has 5 sizes, and cannot be exported"
            )
        lengths = [self.token_length(checkpoint, i) for i in range(len(self.tokenizers))]
        if len(set(lengths)) > 1:
            raise ExportError(
                f"{checkpoint.where}: the tokenizers cut prompts at {lengths[0]} and {lengths[1]} tokens, and SDXL "
                "joins both encoders' text token by token; set model_max_length of both tokenizer_config.json alike"
            )

    def denoise(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        guidance: Tensor,
        conditioning: Mapping[str, Tensor],
    ) -> Tensor:
        return self.steered(denoiser, latents, timesteps, guidance, conditioning, ())

    def steered(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        guidance: Tensor,
        conditioning: Mapping[str, Tensor],
        residuals: Sequence[Tensor],
    ) -> Tensor:
        text, added = attended(conditioning["prompt_embeds"], conditioning), _added(conditioning)
        latents = beside_mask(latents, conditioning)
        return self.predict(denoiser, latents, timesteps, guidance, text, added, residuals)

    def look(
        self,
        net: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Mapping[str, Tensor],
        pictures: Tensor,
    ) -> Sequence[Tensor]:
        text, added = conditioning["prompt_embeds"], _added(conditioning)
        return self.residuals(net, latents, timesteps, text, pictures, added)

    def conditioning(self, checkpoint: Checkpoint, size: Size) -> Sequence[ConditioningInput]:
        """Text and pooled text from both encoders, the size row, with an IP-Adapter a picture and, of an inpainting
        model, what lies around the mask."""
        first, second = (self.config(checkpoint, component) for component in self.text_components)
        width = int(first["hidden_size"]) + int(second["hidden_size"])
        text = Conditioning(name="prompt_embeds", source="text")
        pooled = Conditioning(name="pooled", source="text")
        return (
            ConditioningInput(text, (self.token_length(checkpoint, 0), width), attended=True),
            ConditioningInput(pooled, (int(second["projection_dim"]),)),
            time_ids(size),
            *inputs_of(checkpoint),
            *masked(self, checkpoint, size),
        )

    def text(self, encoders: Sequence[nn.Module], clip_skip: int = 0) -> nn.Module:
        return _Text(*encoders, clip_skip=clip_skip)

    def negative_text(self, clip_skip: int) -> tuple[str, ...]:
        return ("prompt_embeds",) if clip_skip else ()

    def scaling(self, checkpoint: Checkpoint) -> Scaling:
        """The pipeline normalises latents by channel where the decoder's config has means and deviations."""
        config = self.config(checkpoint, "vae")
        mean, std = config["latents_mean"], config["latents_std"]
        if mean is None or std is None:
            return super().scaling(checkpoint)
        if self.inpaints(checkpoint):
            raise ExportError(
                f"{checkpoint.where}: vae/config.json has latents_mean and latents_std, which {self.inpainting_class} "
                "goes by where it decodes and not where it encodes; set them to null"
            )
        channels = self.latent_channels(checkpoint)
        if len(mean) != channels or len(std) != channels or channels != 4:
            raise ExportError(
                f"{checkpoint.where}: vae/config.json has {len(mean)} latents_mean and {len(std)} latents_std for "
                f"{channels} channels; {self.pipeline_classes[0]} wants 4 of each"
            )
        if config["shift_factor"]:
            raise ExportError(
                f"{checkpoint.where}: vae/config.json has shift_factor = {config['shift_factor']}, which "
                f"{self.pipeline_classes[0]} ignores; set it to null to export what diffusers draws"
            )
        return Scaling(scale=self._scaling_factor(checkpoint), mean=tuple(map(float, mean)), std=tuple(map(float, std)))

    def zero_negative(self, checkpoint: Checkpoint) -> bool:
        """SDXL base: without a negative prompt, its text is zeros."""
        return bool(checkpoint.model_index.get("force_zeros_for_empty_prompt", True))

    def encode_with(self, pipe: Any, prompt: str, negative: str, clip_skip: int) -> tuple[Texts, Texts]:
        text, other, pooled, other_pooled = pipe.encode_prompt(
            prompt, device="cpu", negative_prompt=negative, clip_skip=clip_skip or None
        )
        return {"prompt_embeds": text, "pooled": pooled}, {"prompt_embeds": other, "pooled": other_pooled}

    def call(self, pipe: Any, conditioning: Texts, guidance_scale: float, guidance_rescale: float) -> dict[str, Any]:
        return {
            "prompt_embeds": conditioning["prompt_embeds.positive"],
            "negative_prompt_embeds": conditioning.get("prompt_embeds.negative"),
            "pooled_prompt_embeds": conditioning["pooled.positive"],
            "negative_pooled_prompt_embeds": conditioning.get("pooled.negative"),
            "guidance_scale": guidance_scale,
            "guidance_rescale": guidance_rescale,
            **inpainting_call(conditioning, pipe.vae_scale_factor),
        }


def _added(conditioning: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """What conditions the networks outside cross-attention. diffusers joins the pooled text to a float32 sinusoid;
    eager PyTorch promotes it, a graph must be told."""
    return {"text_embeds": conditioning["pooled"].float(), "time_ids": conditioning["time_ids"]}


class _Text(nn.Module):
    """Ids of both tokenizers [B, T] to ``prompt_embeds`` [B, T, C1 + C2] and ``pooled`` [B, P].

    Both encoders give their penultimate layer, or with ``clip_skip`` one so many layers before it; the pooled text is
    the second's projection. The pipeline skips no layers of a negative prompt: its ``prompt_embeds`` come last.
    """

    def __init__(self, first: nn.Module, second: nn.Module, *, clip_skip: int) -> None:
        super().__init__()
        self.text_encoder = first
        self.text_encoder_2 = second
        self._clip_skip = clip_skip

    def forward(self, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, ...]:
        first = self.text_encoder(ids, output_hidden_states=True).hidden_states
        second = self.text_encoder_2(ids_2, output_hidden_states=True)

        def layer(skipped: int) -> Tensor:
            return torch.cat([first[-2 - skipped], second.hidden_states[-2 - skipped]], dim=-1)

        if not self._clip_skip:
            return layer(0), second.text_embeds
        return layer(self._clip_skip), second.text_embeds, layer(0)
