"""FLUX.1: a diffusion transformer whose attention is joint and whose guidance is its own, with CLIP's and T5's text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
import transformers
from diffusers.models.embeddings import get_1d_rotary_pos_embed
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_engine.manifest import Conditioning, Guidance
from tgate_export.checkpoints import Checkpoint
from tgate_export.families.base import ConditioningInput, Scaling, Size, Texts
from tgate_export.families.facts import FLUX
from tgate_export.families.packed import PATCH, Packed
from tgate_export.families.unet import check_clip

T5_TOKENS, T5_TOKENS_FEW_STEPS = 512, 256
"""Tokens that T5 sees of a prompt: of FLUX.1-dev as diffusers' pipeline has it, and of FLUX.1-schnell at most."""

DEFAULT_SIZE = Size(height=1024, width=1024)
"""The pipeline's own, whatever the checkpoint says."""

_PLACES = 4096
"""Rows and columns whose angles are known; a picture of the largest side has as many."""


class Flux(Packed):
    """FLUX.1-dev and FLUX.1-schnell, in diffusers layout.

    Picture and text attend to each other, so there is no cross-attention to reuse; dev takes the guidance scale as an
    input and schnell takes none, so there are no halves, and no difference between them: calls can be forecast.
    """

    facts = FLUX
    pipeline_classes = ("FluxPipeline",)
    classes: Mapping[str, type[nn.Module]] = {
        "transformer": diffusers.FluxTransformer2DModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModel,
        "text_encoder_2": transformers.T5EncoderModel,
    }
    denoiser = "transformer"
    text_components = ("text_encoder", "text_encoder_2")
    tokenizers = ("tokenizer", "tokenizer_2")

    def tokenizer_kind(self, index: int) -> type[Any]:
        return transformers.T5Tokenizer if index == 1 else transformers.CLIPTokenizer

    def build(self, checkpoint: Checkpoint, component: str) -> nn.Module:
        """With places whose angles are looked up: as diffusers computes them, in float64, engines have no kernels."""
        module = super().build(checkpoint, component)
        for name, part in list(module.named_children()):
            if isinstance(part, FluxPosEmbed):
                setattr(module, name, _Places(part))
                module._keep_in_fp32_modules = [name]  # as diffusers has them, whatever the network's dtype
        return module

    def check(self, checkpoint: Checkpoint) -> None:
        check_clip(self, checkpoint, self.text_components[:1])
        config = self.config(checkpoint, "transformer")
        clip, t5 = (self.config(checkpoint, name) for name in self.text_components)
        if config["patch_size"] != 1:
            raise ExportError(
                f"{checkpoint.where}: the transformer has patch_size = {config['patch_size']}; places are packed by "
                "the pipeline, and 1 is wanted"
            )
        self.check_channels(checkpoint, config["out_channels"] or config["in_channels"])
        for key, name, own in (
            ("joint_attention_dim", "text_encoder_2", t5["d_model"]),
            ("pooled_projection_dim", "text_encoder", clip["hidden_size"]),
        ):
            if config[key] != own:
                raise ExportError(
                    f"{checkpoint.where}: the transformer has {key} = {config[key]}, the {name} gives {own} channels; "
                    "they must agree"
                )
        self.check_decoder(checkpoint)

    def denoise(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        guidance: Tensor,
        conditioning: Mapping[str, Tensor],
    ) -> Tensor:
        assert isinstance(denoiser, diffusers.FluxTransformer2DModel)
        rows, columns = (range(side // PATCH) for side in latents.shape[-2:])
        places = [(0, row, column) for row in rows for column in columns]
        output: Tensor = denoiser(
            hidden_states=self.as_pipeline(latents),
            timestep=timesteps / 1000,
            guidance=guidance if denoiser.config["guidance_embeds"] else None,
            pooled_projections=conditioning["pooled"],
            encoder_hidden_states=conditioning["prompt_embeds"],
            txt_ids=torch.zeros(conditioning["prompt_embeds"].shape[1], 3, dtype=torch.int64, device=latents.device),
            img_ids=torch.tensor(places, device=latents.device),
            return_dict=False,
        )[0]
        return self.from_pipeline(output, latents.shape)

    def conditioning(self, checkpoint: Checkpoint, size: Size) -> Sequence[ConditioningInput]:
        """T5's text, its padding not masked, and CLIP's, pooled."""
        clip, t5 = (self.config(checkpoint, name) for name in self.text_components)
        text, pooled = (Conditioning(name=name, source="text") for name in ("prompt_embeds", "pooled"))
        return (
            ConditioningInput(text, (self.token_length(checkpoint, 1), int(t5["d_model"]))),
            ConditioningInput(pooled, (int(clip["hidden_size"]),)),
        )

    def text(self, encoders: Sequence[nn.Module], clip_skip: int = 0) -> nn.Module:
        return _Text(*encoders)

    def token_length(self, checkpoint: Checkpoint, index: int) -> int:
        if index == 0:
            return super().token_length(checkpoint, 0)
        return T5_TOKENS if self.config(checkpoint, "transformer")["guidance_embeds"] else T5_TOKENS_FEW_STEPS

    def guidance(self, checkpoint: Checkpoint, scale: float) -> Guidance:
        return "embedded" if self.config(checkpoint, "transformer")["guidance_embeds"] else "none"

    def scaling(self, checkpoint: Checkpoint) -> Scaling:
        return self._scaling_shifted(checkpoint)

    def default_size(self, checkpoint: Checkpoint) -> Size:
        return DEFAULT_SIZE

    def encode_with(self, pipe: Any, prompt: str, negative: str, clip_skip: int) -> tuple[Texts, Texts]:
        length = pipe.tokenizer_2.model_max_length  # the oracle sets it to token_length

        def encoded(text: str) -> Texts:
            states, pooled, _ = pipe.encode_prompt(text, None, device="cpu", max_sequence_length=length)
            return {"prompt_embeds": states, "pooled": pooled}

        return encoded(prompt), encoded(negative)

    def call(self, pipe: Any, conditioning: Texts, guidance_scale: float, guidance_rescale: float) -> dict[str, Any]:
        return {
            "prompt_embeds": conditioning["prompt_embeds.positive"],
            "pooled_prompt_embeds": conditioning["pooled.positive"],
            "guidance_scale": guidance_scale,
        }


class _Text(nn.Module):
    """Ids of both tokenizers [B, T] to ``prompt_embeds`` [B, T2, C2] and ``pooled`` [B, C1]."""

    def __init__(self, clip: nn.Module, t5: nn.Module) -> None:
        super().__init__()
        self.text_encoder = clip
        self.text_encoder_2 = t5

    def forward(self, ids: Tensor, ids_2: Tensor) -> tuple[Tensor, Tensor]:
        pooled: Tensor = self.text_encoder(ids).pooler_output
        states: Tensor = self.text_encoder_2(ids_2).last_hidden_state
        return states, pooled


class _Places(nn.Module):
    """What :class:`diffusers.models.transformers.transformer_flux.FluxPosEmbed` computes, looked up by place."""

    def __init__(self, rope: FluxPosEmbed) -> None:
        super().__init__()
        self._axes = range(len(rope.axes_dim))
        for axis, width in enumerate(rope.axes_dim):
            tables: Any = get_1d_rotary_pos_embed(
                width, torch.arange(_PLACES), rope.theta, use_real=True, freqs_dtype=torch.float64
            )
            for name, table in zip(("cos", "sin"), tables, strict=True):
                self.register_buffer(f"{name}{axis}", table, persistent=False)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Places [L, axes], int64, to their cosines and sines [L, D]."""
        cos, sin = (
            torch.cat(
                [nn.functional.embedding(ids[:, axis], self.get_buffer(f"{name}{axis}")) for axis in self._axes], dim=1
            )
            for name in ("cos", "sin")
        )
        return cos, sin
