"""Stable Diffusion 3 and 3.5: a diffusion transformer whose attention is joint, with two CLIP encoders and a T5."""

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
from tgate_export.families.base import ConditioningInput, Family, Scaling, Size, Texts, side
from tgate_export.families.facts import SD3
from tgate_export.families.unet import check_clip
from tgate_export.schedulers import MU, size_shift

T5_TOKENS = 256
"""Tokens that T5 sees of a prompt: what diffusers' pipeline gives it."""


class StableDiffusion3(Family):
    """Stable Diffusion 3 and 3.5 (arXiv 2403.03206), in diffusers layout.

    Picture and text attend to each other in one attention, so there is no cross-attention to reuse: guidance and
    forecasts are what can be saved.
    """

    facts = SD3
    pipeline_classes = ("StableDiffusion3Pipeline",)
    classes: Mapping[str, type[nn.Module]] = {
        "transformer": diffusers.SD3Transformer2DModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.CLIPTextModelWithProjection,
        "text_encoder_2": transformers.CLIPTextModelWithProjection,
        "text_encoder_3": transformers.T5EncoderModel,
    }
    denoiser = "transformer"
    text_components = ("text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizers = ("tokenizer", "tokenizer_2", "tokenizer_3")

    def tokenizer_kind(self, index: int) -> type[Any]:
        return transformers.T5Tokenizer if index == 2 else transformers.CLIPTokenizer

    def check(self, checkpoint: Checkpoint) -> None:
        super().check(checkpoint)
        check_clip(self, checkpoint, self.text_components[:2])
        config = self.config(checkpoint, "transformer")
        first, second, third = (self.config(checkpoint, name) for name in self.text_components)
        if config["out_channels"] not in (None, config["in_channels"]):
            raise ExportError(
                f"{checkpoint.where}: the transformer takes {config['in_channels']} channels and gives "
                f"{config['out_channels']}; samplers want as many"
            )
        pooled = int(first["projection_dim"]) + int(second["projection_dim"])
        if config["pooled_projection_dim"] != pooled:
            raise ExportError(
                f"{checkpoint.where}: the transformer has pooled_projection_dim = {config['pooled_projection_dim']}, "
                f"and is given {pooled} numbers, the projection_dim of both CLIP encoders; they must agree"
            )
        width, clip = int(third["d_model"]), int(first["hidden_size"]) + int(second["hidden_size"])
        if clip > width:
            raise ExportError(
                f"{checkpoint.where}: both CLIP encoders give {clip} channels, text_encoder_3 gives {width}; they are "
                "put one behind the other, and the latter must be as wide"
            )

    def build(self, checkpoint: Checkpoint, component: str) -> nn.Module:
        """The table of places is a tensor of the checkpoint, which diffusers keeps as a buffer."""
        module = super().build(checkpoint, component)
        if component == "transformer":
            embed = module.get_submodule("pos_embed")
            table = embed._buffers.pop("pos_embed")
            assert table is not None  # whose size is a number in every configuration
            embed.register_parameter("pos_embed", nn.Parameter(table, requires_grad=False))
        return module

    def denoise(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        guidance: Tensor,
        conditioning: Mapping[str, Tensor],
    ) -> Tensor:
        output: Tensor = denoiser(
            hidden_states=latents,
            timestep=timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"],
            pooled_projections=conditioning["pooled"],
            return_dict=False,
        )[0]
        return output

    def conditioning(self, checkpoint: Checkpoint, size: Size) -> Sequence[ConditioningInput]:
        """CLIP's text, T5's after it, and the pooled text of both CLIP encoders."""
        first, second, third = (self.config(checkpoint, name) for name in self.text_components)
        length = self.token_length(checkpoint, 0) + T5_TOKENS
        text, pooled = (Conditioning(name=name, source="text") for name in ("prompt_embeds", "pooled"))
        return (
            ConditioningInput(text, (length, int(third["d_model"]))),
            ConditioningInput(pooled, (int(first["projection_dim"]) + int(second["projection_dim"]),)),
        )

    def text(self, encoders: Sequence[nn.Module], clip_skip: int = 0) -> nn.Module:
        return _Text(*encoders)

    def token_length(self, checkpoint: Checkpoint, index: int) -> int:
        """The pipeline cuts for both CLIP encoders where the first tokenizer would."""
        return T5_TOKENS if index == 2 else super().token_length(checkpoint, 0)

    def scaling(self, checkpoint: Checkpoint) -> Scaling:
        return self._scaling_shifted(checkpoint)

    def scheduler_config(self, checkpoint: Checkpoint, size: Size) -> Mapping[str, Any]:
        """Where noise levels are shifted by the size, with how far, as the pipeline computes it."""
        config = dict(super().scheduler_config(checkpoint, size))
        if not config.get("use_dynamic_shifting"):
            return config
        _, height, width = self.latents(checkpoint, size)
        patch = int(self.config(checkpoint, "transformer")["patch_size"])
        return {**config, MU: size_shift(config, (height // patch) * (width // patch))}

    def size_multiple(self, checkpoint: Checkpoint) -> int:
        return self.pixels(checkpoint) * int(self.config(checkpoint, "transformer")["patch_size"])

    def check_size(self, checkpoint: Checkpoint, size: Size) -> None:
        super().check_size(checkpoint, size)
        most = int(self.config(checkpoint, "transformer")["pos_embed_max_size"]) * self.size_multiple(checkpoint)
        if max(size.height, size.width) > most:
            raise ExportError(f"sides of at most {most} pixels are wanted (pos_embed_max_size); got {size}")

    def default_size(self, checkpoint: Checkpoint) -> Size:
        height, width = side(checkpoint, "transformer", self.config(checkpoint, "transformer")["sample_size"])
        return Size(height=height * self.pixels(checkpoint), width=width * self.pixels(checkpoint))

    def encode_with(self, pipe: Any, prompt: str, negative: str, clip_skip: int) -> tuple[Texts, Texts]:
        text, other, pooled, other_pooled = pipe.encode_prompt(
            prompt, None, None, device="cpu", negative_prompt=negative, max_sequence_length=T5_TOKENS
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


class _Text(nn.Module):
    """Ids of the three tokenizers [B, T] to ``prompt_embeds`` [B, T1 + T3, C3] and ``pooled`` [B, P1 + P2].

    CLIP's penultimate layers lie side by side, filled up with zeros to T5's width; T5's last layer lies after them,
    its padding not masked.
    """

    def __init__(self, first: nn.Module, second: nn.Module, third: nn.Module) -> None:
        super().__init__()
        self.text_encoder = first
        self.text_encoder_2 = second
        self.text_encoder_3 = third

    def forward(self, ids: Tensor, ids_2: Tensor, ids_3: Tensor) -> tuple[Tensor, Tensor]:
        first = self.text_encoder(ids, output_hidden_states=True)
        second = self.text_encoder_2(ids_2, output_hidden_states=True)
        third = self.text_encoder_3(ids_3).last_hidden_state
        clip = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        clip = nn.functional.pad(clip, (0, third.shape[-1] - clip.shape[-1]))
        # T5's last layer may be float32 beside encoders of fewer digits.
        text = torch.cat([clip, third.to(clip.dtype)], dim=-2)
        return text, torch.cat([first.text_embeds, second.text_embeds], dim=-1)
