"""HunyuanDiT: a diffusion transformer with long skips, whose text is BERT's and a T5's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
import transformers
from diffusers.models.embeddings import HunyuanDiTAttentionPool, get_2d_rotary_pos_embed
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from tgate_engine.errors import ExportError
from tgate_engine.manifest import Conditioning
from tgate_export.checkpoints import Checkpoint
from tgate_export.families.base import ConditioningInput, Family, Size, Texts, side
from tgate_export.families.facts import HUNYUAN
from tgate_export.quiet import quiet

TOKENS = (77, 256)
"""Tokens that BERT and T5 see of a prompt: what diffusers' pipeline gives them."""

BASE_SIDE = 512
"""Pixels: places of a picture of another size are stretched to those of this one."""


class HunyuanDiT(Family):
    """HunyuanDiT 1.2 (arXiv 2405.08748), in diffusers layout.

    Text enters through cross-attention, and T5's once more beside the timestep, pooled. The network predicts a variance
    beside the velocity; samplers do not use it, and the graphs drop it.
    """

    facts = HUNYUAN
    pipeline_classes = ("HunyuanDiTPipeline",)
    classes: Mapping[str, type[nn.Module]] = {
        "transformer": diffusers.HunyuanDiT2DModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.BertModel,
        "text_encoder_2": transformers.T5EncoderModel,
    }
    denoiser = "transformer"
    text_components = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")

    def tokenizer_kind(self, index: int) -> type[Any]:
        return (transformers.BertTokenizer, transformers.T5Tokenizer)[index]

    def build(self, checkpoint: Checkpoint, component: str) -> nn.Module:
        """With a pooler that calls its layers, where diffusers' reads their weights."""
        module = super().build(checkpoint, component)
        for part in module.modules() if component == "transformer" else ():
            if isinstance(part, HunyuanDiTAttentionPool):
                part.__class__ = _Pool
        return module

    def check(self, checkpoint: Checkpoint) -> None:
        super().check(checkpoint)
        config = self.config(checkpoint, "transformer")
        if config["use_style_cond_and_image_meta_size"]:
            raise ExportError(
                f"{checkpoint.where}: the transformer takes a style and the picture's size "
                "(use_style_cond_and_image_meta_size), as HunyuanDiT 1.1 does; from 1.2 on it can be exported"
            )
        lengths = (config["text_len"], config["text_len_t5"])
        if lengths != TOKENS:
            raise ExportError(
                f"{checkpoint.where}: the transformer has text_len = {lengths[0]} and text_len_t5 = {lengths[1]}; "
                f"{self.pipeline_classes[0]} gives it {TOKENS[0]} and {TOKENS[1]} tokens"
            )
        if not config["learn_sigma"]:
            raise ExportError(
                f"{checkpoint.where}: the transformer has learn_sigma = false; {self.pipeline_classes[0]} wants a "
                "variance beside what it predicts, and takes the first half"
            )
        if self.pixels(checkpoint) != 8:
            raise ExportError(
                f"{checkpoint.where}: the vae has {self.pixels(checkpoint)} pixels for each latent pixel, and "
                f"{self.pipeline_classes[0]} counts places by 8"
            )

    def denoise(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        guidance: Tensor,
        conditioning: Mapping[str, Tensor],
    ) -> Tensor:
        assert isinstance(denoiser, diffusers.HunyuanDiT2DModel)
        patch: Any = denoiser.config["patch_size"]
        grid = (int(latents.shape[-2]) // patch, int(latents.shape[-1]) // patch)
        output: Tensor = denoiser(
            latents,
            timesteps.to(latents.dtype),
            encoder_hidden_states=conditioning["prompt_embeds"],
            text_embedding_mask=conditioning["prompt_mask"],
            encoder_hidden_states_t5=conditioning["prompt_embeds_2"],
            text_embedding_mask_t5=conditioning["prompt_mask_2"],
            image_rotary_emb=_places(denoiser.inner_dim // denoiser.num_heads, grid, BASE_SIDE // 8 // patch),
            return_dict=False,
        )[0]
        return output[:, : latents.shape[1]]

    def conditioning(self, checkpoint: Checkpoint, size: Size) -> Sequence[ConditioningInput]:
        """BERT's text and T5's, each with its mask; T5's is read outside cross-attention as well."""
        config = self.config(checkpoint, "transformer")
        names = ("prompt_embeds", "prompt_mask", "prompt_embeds_2", "prompt_mask_2")
        text, mask, text_2, mask_2 = (Conditioning(name=name, source="text") for name in names)
        return (
            ConditioningInput(text, (TOKENS[0], int(config["cross_attention_dim"])), attended=True),
            ConditioningInput(mask, (TOKENS[0],), mask=True, attended=True),
            ConditioningInput(text_2, (TOKENS[1], int(config["cross_attention_dim_t5"]))),
            ConditioningInput(mask_2, (TOKENS[1],), mask=True, attended=True),
        )

    def size_multiple(self, checkpoint: Checkpoint) -> int:
        return self.pixels(checkpoint) * int(self.config(checkpoint, "transformer")["patch_size"])

    def default_size(self, checkpoint: Checkpoint) -> Size:
        height, width = side(checkpoint, "transformer", self.config(checkpoint, "transformer")["sample_size"])
        return Size(height=height * self.pixels(checkpoint), width=width * self.pixels(checkpoint))

    def encode_with(self, pipe: Any, prompt: str, negative: str, clip_skip: int) -> tuple[Texts, Texts]:
        halves: tuple[dict[str, Tensor], dict[str, Tensor]] = ({}, {})
        for index, (suffix, length) in enumerate(zip(("", "_2"), TOKENS, strict=True)):
            text, other, mask, other_mask = pipe.encode_prompt(
                prompt, "cpu", negative_prompt=negative, max_sequence_length=length, text_encoder_index=index
            )
            halves[0].update({f"prompt_embeds{suffix}": text, f"prompt_mask{suffix}": mask.float()})
            halves[1].update({f"prompt_embeds{suffix}": other, f"prompt_mask{suffix}": other_mask.float()})
        return halves

    def call(self, pipe: Any, conditioning: Texts, guidance_scale: float, guidance_rescale: float) -> dict[str, Any]:
        options: dict[str, Any] = {}
        for suffix in ("", "_2"):
            options[f"prompt_embeds{suffix}"] = conditioning[f"prompt_embeds{suffix}.positive"]
            options[f"prompt_attention_mask{suffix}"] = conditioning[f"prompt_mask{suffix}.positive"]
            options[f"negative_prompt_embeds{suffix}"] = conditioning.get(f"prompt_embeds{suffix}.negative")
            options[f"negative_prompt_attention_mask{suffix}"] = conditioning.get(f"prompt_mask{suffix}.negative")
        return options | {
            "guidance_scale": guidance_scale,
            "guidance_rescale": guidance_rescale,
            "use_resolution_binning": False,
        }


class _Pool(HunyuanDiTAttentionPool):
    """What it computes of a text [N, L, C]: attention of its mean to all of it, [N, P]."""

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x.mean(dim=1, keepdim=True), x], dim=1) + self.positional_embedding.to(x.dtype)
        projected = (self.q_proj(x[:, :1]), self.k_proj(x), self.v_proj(x))
        query, key, value = (y.unflatten(2, (self.num_heads, -1)).transpose(1, 2) for y in projected)
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        pooled: Tensor = self.c_proj(attended.transpose(1, 2).flatten(2)).squeeze(1)
        return pooled


def _places(width: int, grid: tuple[int, int], base: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines, [h * w, width] each, by which queries and keys are rotated: as the pipeline makes them."""
    with quiet():  # imported late: the module tells of libraries that nothing here needs
        from diffusers.pipelines.hunyuandit.pipeline_hunyuandit import get_resize_crop_region_for_grid
    with unset_fake_temporarily():  # numbers of the graph, not nodes
        crop = get_resize_crop_region_for_grid(grid, base)
        cos, sin = get_2d_rotary_pos_embed(width, crop, grid, device=torch.device("cpu"))
        numbers = cos.tolist(), sin.tolist()
    return torch.tensor(numbers[0]), torch.tensor(numbers[1])
