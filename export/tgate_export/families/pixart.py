"""PixArt: a diffusion transformer with a T5 text encoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import diffusers
import transformers
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_engine.manifest import Conditioning
from tgate_export.checkpoints import Checkpoint
from tgate_export.families.base import ConditioningInput, Family, Size, block_attention, vae_factor
from tgate_export.families.t5 import T5Text, t5_conditioning
from tgate_export.gating import AttentionSite

TOKENS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}
"""Tokens of a prompt, by pipeline: what diffusers' pipelines encode unless told otherwise."""

_NOT_CONDITIONED = {"resolution": None, "aspect_ratio": None}


class PixArt(Family):
    """PixArt-alpha (arXiv 2310.00426) and PixArt-Sigma (arXiv 2403.04692), in diffusers layout.

    The network may predict a variance beside the noise; samplers do not use it, and the graphs drop it.
    """

    name = "pixart"
    pipeline_classes = ("PixArtAlphaPipeline", "PixArtSigmaPipeline")
    classes: Mapping[str, type[nn.Module]] = {
        "transformer": diffusers.PixArtTransformer2DModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.T5EncoderModel,
    }
    denoiser = "transformer"
    text_components = ("text_encoder",)
    tokenizers = ("tokenizer",)
    tokenizer_class = transformers.T5Tokenizer
    lower_prompts = True

    def check(self, checkpoint: Checkpoint) -> None:
        super().check(checkpoint)
        config = checkpoint.config("transformer")
        found = config.get("norm_type", "ada_norm_single")
        if found != "ada_norm_single":
            raise ExportError(
                f"{checkpoint.where}: the transformer has norm_type = {found!r}, PixArt has 'ada_norm_single'; "
                "this checkpoint is of another architecture"
            )

    def attention(self, denoiser: nn.Module) -> tuple[AttentionSite, ...]:
        return block_attention(denoiser)

    def denoise(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        guidance: Tensor,
        conditioning: Mapping[str, Tensor],
    ) -> Tensor:
        sizes = {name: conditioning[name] for name in _NOT_CONDITIONED if name in conditioning}
        output: Tensor = denoiser(
            latents,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_attention_mask=conditioning["prompt_mask"],
            timestep=timesteps,
            added_cond_kwargs=sizes or _NOT_CONDITIONED,
            return_dict=False,
        )[0]
        return output[:, : latents.shape[1]]

    def conditioning(self, checkpoint: Checkpoint, size: Size) -> Sequence[ConditioningInput]:
        """The text and its mask; in the 1024-pixel models also the size and its aspect."""
        text = t5_conditioning(checkpoint, self.token_length(checkpoint, 0), negative_mask="own")
        config = checkpoint.config("transformer")
        wanted = config.get("use_additional_conditions")
        if not (config.get("sample_size") == 128 if wanted is None else wanted):
            return text
        rows = {"resolution": (float(size.height), float(size.width)), "aspect_ratio": (size.height / size.width,)}
        return (
            *text,
            *(
                ConditioningInput(Conditioning(name=name, source="constant", value=row), (len(row),), False)
                for name, row in rows.items()
            ),
        )

    def text(self, encoders: Sequence[nn.Module]) -> nn.Module:
        return T5Text(*encoders)

    def token_length(self, checkpoint: Checkpoint, index: int) -> int:
        return TOKENS[str(checkpoint.model_index["_class_name"])]

    def size_multiple(self, checkpoint: Checkpoint) -> int:
        return vae_factor(checkpoint.config("vae")) * int(checkpoint.config("transformer").get("patch_size", 2))

    def default_size(self, checkpoint: Checkpoint) -> Size:
        side = int(checkpoint.config("transformer")["sample_size"]) * vae_factor(checkpoint.config("vae"))
        return Size(height=side, width=side)
