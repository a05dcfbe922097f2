"""Stable Diffusion 1 and 2: a U-Net with one CLIP text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import transformers
from packaging.version import InvalidVersion, Version
from torch import Tensor, nn

from tgate_engine.manifest import Conditioning
from tgate_export.checkpoints import Checkpoint
from tgate_export.families.base import ConditioningInput, Size, Texts
from tgate_export.families.facts import SD
from tgate_export.families.unet import TextUNet, beside_mask, inpainting_call, masked
from tgate_export.ip_adapter import attended, inputs_of
from tgate_export.schedulers import options_of

_SIZED = Version("0.9.0.dev0")
"""The version of diffusers from which on checkpoints say their size; the pipeline knows what earlier ones meant."""


class StableDiffusion(TextUNet):
    """Stable Diffusion 1.x and 2.x (arXiv 2112.10752), in diffusers layout. The sampler knows what they predict."""

    facts = SD
    pipeline_classes = ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline")
    inpainting_class = "StableDiffusionInpaintPipeline"
    picture_pipeline = "StableDiffusionImg2ImgPipeline"
    classes: Mapping[str, type[nn.Module]] = {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModel,
    }
    addition = None
    text_components = ("text_encoder",)
    tokenizers = ("tokenizer",)

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
        text = attended(conditioning["prompt_embeds"], conditioning)
        latents = beside_mask(latents, conditioning)
        return self.predict(denoiser, latents, timesteps, guidance, text, residuals=residuals)

    def look(
        self,
        net: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        conditioning: Mapping[str, Tensor],
        pictures: Tensor,
    ) -> Sequence[Tensor]:
        return self.residuals(net, latents, timesteps, conditioning["prompt_embeds"], pictures)

    def conditioning(self, checkpoint: Checkpoint, size: Size) -> Sequence[ConditioningInput]:
        """The text, with an IP-Adapter a picture and, of an inpainting model, what lies around the mask."""
        shape = (self.token_length(checkpoint, 0), int(self.config(checkpoint, "text_encoder")["hidden_size"]))
        text = ConditioningInput(Conditioning(name="prompt_embeds", source="text"), shape, attended=True)
        return (text, *inputs_of(checkpoint), *masked(self, checkpoint, size))

    def text(self, encoders: Sequence[nn.Module], clip_skip: int = 0) -> nn.Module:
        return _Text(encoders[0], clip_skip)

    def negative_text(self, clip_skip: int) -> tuple[str, ...]:
        return ("prompt_embeds",) if clip_skip else ()

    def scheduler_config(self, checkpoint: Checkpoint, size: Size) -> Mapping[str, Any]:
        """The pipeline sets two options of its scheduler itself, whatever the checkpoint says; that for inpainting one.

        Where the checkpoint does not state one, it stays what diffusers calls a default, which other classes of
        scheduler replace by their own.
        """
        config = dict(super().scheduler_config(checkpoint, size))
        own = options_of(config.get("_class_name"))
        if config.get("clip_sample") is True and not self.inpaints(checkpoint):
            config["clip_sample"] = False
        if "steps_offset" not in config and "steps_offset" in own:
            config["_use_default_values"] = ["steps_offset"]
        if "_use_default_values" in config or "steps_offset" in config:
            config["steps_offset"] = 1
        return config

    def rescales_guidance(self, checkpoint: Checkpoint) -> bool:
        return not self.inpaints(checkpoint)

    def default_size(self, checkpoint: Checkpoint) -> Size:
        """Before diffusers 0.9 no checkpoint said its size: the pipeline takes 64 latent pixels for less than that."""
        size, config = super().default_size(checkpoint), self.config(checkpoint, "unet")
        try:
            old = Version(Version(str(config.get("_diffusers_version"))).base_version) < _SIZED
        except InvalidVersion:
            old = False
        if old and isinstance(config["sample_size"], int) and config["sample_size"] < 64:
            return Size(height=64 * self.pixels(checkpoint), width=64 * self.pixels(checkpoint))
        return size

    def encode_with(self, pipe: Any, prompt: str, negative: str, clip_skip: int) -> tuple[Texts, Texts]:
        encoder = pipe.text_encoder
        if not hasattr(encoder, "text_model"):  # where diffusers looks for the last norm; transformers 5 took it away
            object.__setattr__(encoder, "text_model", encoder)
        positive, other = pipe.encode_prompt(prompt, "cpu", 1, True, negative, clip_skip=clip_skip or None)
        return {"prompt_embeds": positive}, {"prompt_embeds": other}

    def call(self, pipe: Any, conditioning: Texts, guidance_scale: float, guidance_rescale: float) -> dict[str, Any]:
        around = inpainting_call(conditioning, pipe.vae_scale_factor)
        return {
            "prompt_embeds": conditioning["prompt_embeds.positive"],
            "negative_prompt_embeds": conditioning.get("prompt_embeds.negative"),
            "guidance_scale": guidance_scale,
            **({} if around else {"guidance_rescale": guidance_rescale}),
            **around,
        }


class _Text(nn.Module):
    """Ids [B, T] to ``prompt_embeds`` [B, T, C]: the encoder's last layer, normalised.

    With ``clip_skip``, an earlier layer, normalised as the last one is; the last one is given beside it, since the
    pipeline skips no layers of a negative prompt.
    """

    def __init__(self, encoder: nn.Module, clip_skip: int) -> None:
        super().__init__()
        self.text_encoder = encoder
        self._clip_skip = clip_skip

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        if not self._clip_skip:
            return (self.text_encoder(ids).last_hidden_state,)
        encoded = self.text_encoder(ids, output_hidden_states=True)
        encoder: Any = getattr(self.text_encoder, "text_model", self.text_encoder)
        skipped = encoder.final_layer_norm(encoded.hidden_states[-(self._clip_skip + 1)])
        return skipped, encoded.last_hidden_state
