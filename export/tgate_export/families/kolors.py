"""Kolors: SDXL's U-Net, whose text is ChatGLM's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig, ChatGLMModel
from diffusers.pipelines.kolors.tokenizer import ChatGLMTokenizer
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_engine.manifest import Conditioning
from tgate_export.checkpoints import Checkpoint
from tgate_export.families.base import ConditioningInput, Size, Texts
from tgate_export.families.facts import KOLORS
from tgate_export.families.unet import TIME_IDS, TextUNet, time_ids

TOKENS = 256
"""Tokens of a prompt: what diffusers' pipeline encodes. They are filled up at their beginning."""


class ChatGlm(ChatGLMModel):
    """Diffusers' class, which by itself makes real memory of weights even where they are to be fake."""

    def __init__(self, config: ChatGLMConfig) -> None:
        super().__init__(config, empty_init=False)

    def forward(self, *arguments: Any, **options: Any) -> Any:
        self.rotary_pos_emb.to(self.dtype)  # the angles are of this buffer's dtype, and meet what weights made
        return super().forward(*arguments, **options)


class Kolors(TextUNet):
    """Kolors, in diffusers layout: text of one language model, whose last but one layer is attended to, projected by
    the network to its width, and whose last token's last layer is the pooled text."""

    facts = KOLORS
    pipeline_classes = ("KolorsPipeline",)
    picture_pipeline = "KolorsImg2ImgPipeline"
    classes: Mapping[str, type[nn.Module]] = {
        "unet": diffusers.UNet2DConditionModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": ChatGlm,
    }
    aliases: Mapping[str, tuple[str, ...]] = {"ChatGlm": ("ChatGLMModel",)}
    addition = "text_time"
    text_components = ("text_encoder",)
    tokenizers = ("tokenizer",)
    tokenizer_class = ChatGLMTokenizer
    textual_inversions = False
    brought = ("configuration_chatglm", "modeling_chatglm", "tokenization_chatglm")

    def check(self, checkpoint: Checkpoint) -> None:
        super().check(checkpoint)
        unet, width = self.config(checkpoint, "unet"), self._text_width(checkpoint)
        projected = unet["encoder_hid_dim_type"] == "text_proj"
        key = "encoder_hid_dim" if projected else "cross_attention_dim"
        if unet[key] != width:
            raise ExportError(
                f"{checkpoint.where}: the unet has {key} = {unet[key]}, and attends to the text_encoder's text of "
                f"hidden_size = {width}; they do not belong together"
            )
        given = int(unet["addition_time_embed_dim"] or 0) * TIME_IDS + width
        if given != unet["projection_class_embeddings_input_dim"]:
            raise ExportError(
                f"{checkpoint.where}: the unet has projection_class_embeddings_input_dim = "
                f"{unet['projection_class_embeddings_input_dim']}, and is given {given} numbers: {TIME_IDS} sizes of "
                f"addition_time_embed_dim = {unet['addition_time_embed_dim']} and the text_encoder's "
                f"hidden_size = {width}"
            )

    def denoise(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        guidance: Tensor,
        conditioning: Mapping[str, Tensor],
    ) -> Tensor:
        added = {"text_embeds": conditioning["pooled"].float(), "time_ids": conditioning["time_ids"]}  # as SDXL's
        return self.predict(denoiser, latents, timesteps, guidance, conditioning["prompt_embeds"], added)

    def conditioning(self, checkpoint: Checkpoint, size: Size) -> Sequence[ConditioningInput]:
        """The text, the pooled text, and the size row."""
        width = self._text_width(checkpoint)
        text, pooled = (Conditioning(name=name, source="text") for name in ("prompt_embeds", "pooled"))
        return (
            ConditioningInput(text, (TOKENS, width), attended=True),
            ConditioningInput(pooled, (width,)),
            time_ids(size),
        )

    def _text_width(self, checkpoint: Checkpoint) -> int:
        return int(self.config(checkpoint, "text_encoder")["hidden_size"])

    def encode_with(self, pipe: Any, prompt: str, negative: str, clip_skip: int) -> tuple[Texts, Texts]:
        text, other, pooled, other_pooled = pipe.encode_prompt(
            prompt, device="cpu", negative_prompt=negative, max_sequence_length=TOKENS
        )
        return {"prompt_embeds": text, "pooled": pooled}, {"prompt_embeds": other, "pooled": other_pooled}

    def call(self, pipe: Any, conditioning: Texts, guidance_scale: float, guidance_rescale: float) -> dict[str, Any]:
        return {
            "prompt_embeds": conditioning["prompt_embeds.positive"],
            "negative_prompt_embeds": conditioning.get("prompt_embeds.negative"),
            "pooled_prompt_embeds": conditioning["pooled.positive"],
            "negative_pooled_prompt_embeds": conditioning.get("pooled.negative"),
            "guidance_scale": guidance_scale,
        }
