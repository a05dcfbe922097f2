"""Wan: a video transformer over space and time at once, with UMT5's text and a causal video autoencoder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
import transformers
from diffusers.models.autoencoders.autoencoder_kl_wan import WanUpsample
from diffusers.models.transformers.transformer_wan import WanAttention
from diffusers.utils import is_ftfy_available
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_engine.manifest import Conditioning
from tgate_export.checkpoints import Checkpoint
from tgate_export.checkpoints.files import quoted
from tgate_export.families.base import ConditioningInput, Family, Scaling, Size, Texts
from tgate_export.families.facts import WAN

TOKENS = 512
"""Tokens of a prompt: what diffusers' pipeline encodes."""

DEFAULT_SIZE = Size(height=480, width=832, frames=81)
"""The pipeline's own, whatever the checkpoint says."""

_MOST_LEVELS = 1 << 20
"""Of noise; there are 1000 everywhere."""


class Wan(Family):
    """Wan 2.1 (arXiv 2503.20314) and Wan 2.2 of 14 billion parameters, text to video, in diffusers layout. Wan 2.2 has
    a second transformer for late steps, of the same structure.

    Latents are [C, F, h, w], the first of F for one frame and each further one for several. The autoencoder decodes
    one latent frame after the other, and keeps what its convolutions saw: its graph holds all of them in a row.
    """

    facts = WAN
    pipeline_classes = ("WanPipeline",)
    classes: Mapping[str, type[nn.Module]] = {
        "transformer": diffusers.WanTransformer3DModel,
        "vae": diffusers.AutoencoderKLWan,
        "text_encoder": transformers.UMT5EncoderModel,
    }
    denoiser = "transformer"
    late_denoiser = "transformer_2"
    late_guidance_argument = "guidance_scale_2"
    text_components = ("text_encoder",)
    tokenizers = ("tokenizer",)
    tokenizer_class = transformers.T5Tokenizer
    frames_argument = "num_frames"
    frames_axis = 2
    decodes_frames_together = True
    fps = 16

    def build(self, checkpoint: Checkpoint, component: str) -> nn.Module:
        """With attention that rotates queries and keys without writing into tensors, which graphs have no node for, and
        a decoder that doubles pictures by "nearest": the same as "nearest-exact", whose graph holds tables of places.
        """
        module = super().build(checkpoint, component)
        for part in module.modules():
            if isinstance(part, WanAttention):
                part.processor = _Attention()
            if isinstance(part, WanUpsample) and part.scale_factor == (2.0, 2.0):
                part.mode = "nearest"
        return module

    def check_pipeline(self, checkpoint: Checkpoint) -> None:
        super().check_pipeline(checkpoint)
        index = checkpoint.model_index
        if index.get("expand_timesteps"):
            raise ExportError(
                f"{checkpoint.where}: model_index.json has expand_timesteps = {quoted(index['expand_timesteps'])}, as "
                "Wan 2.2 of 5 billion parameters has, whose frames have timesteps of their own; Wan 2.1 and Wan 2.2 of "
                "14 billion parameters can be exported"
            )
        ratio, second = index.get("boundary_ratio"), index.get("transformer_2")
        there = isinstance(second, (list, tuple)) and any(part is not None for part in second)
        if there and ratio is None:
            raise ExportError(
                f"{checkpoint.where} has a second transformer (transformer_2) and no boundary_ratio in "
                "model_index.json, so that diffusers' pipeline never runs it; name the ratio (Wan 2.2 has 0.875), or "
                "remove the second transformer"
            )
        if ratio is not None and not there:
            raise ExportError(
                f"{checkpoint.where}: model_index.json has boundary_ratio = {quoted(ratio)} and no transformer_2, "
                "which would run below it; the checkpoint is incomplete"
            )
        if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, (int, float)) or not 0 < ratio < 1):
            raise ExportError(
                f"{checkpoint.where}: model_index.json has boundary_ratio = {quoted(ratio)}; a number between 0 and 1 "
                "is wanted"
            )

    def late(self, checkpoint: Checkpoint) -> float | None:
        ratio = checkpoint.model_index.get("boundary_ratio")
        if ratio is None:
            return None
        levels = checkpoint.scheduler_config().get("num_train_timesteps", 1000)
        if isinstance(levels, bool) or not isinstance(levels, int) or not 1 <= levels <= _MOST_LEVELS:
            raise ExportError(
                f"{checkpoint.where}: scheduler/scheduler_config.json has num_train_timesteps = {quoted(levels)}; a "
                f"whole number from 1 to {_MOST_LEVELS} is wanted"
            )
        return float(ratio) * levels

    def check(self, checkpoint: Checkpoint) -> None:
        self.check_networks(checkpoint)
        self.check_decoder(checkpoint)
        if self.late(checkpoint) is not None:
            first, second = (dict(self.config(checkpoint, name)) for name in self.denoisers(checkpoint))
            for key in first:
                if not key.startswith("_") and first[key] != second[key]:
                    raise ExportError(
                        f"{checkpoint.where}: transformer/config.json has {key} = {quoted(first[key])}, "
                        f"transformer_2/config.json {quoted(second[key])}; both networks must be of one structure"
                    )
        config = self.config(checkpoint, "transformer")
        if list(config["patch_size"])[:1] != [1] or len(config["patch_size"]) != 3:
            raise ExportError(
                f"{checkpoint.where}: the transformer has patch_size = {list(config['patch_size'])}; three numbers are "
                "wanted, the first of them 1"
            )

    def check_networks(self, checkpoint: Checkpoint) -> None:
        """Raises :class:`~tgate_engine.errors.ExportError` for networks that take or give something else."""
        super().check(checkpoint)
        config = self.config(checkpoint, "transformer")
        if config["out_channels"] not in (None, config["in_channels"]):
            raise ExportError(
                f"{checkpoint.where}: the transformer takes {config['in_channels']} channels and gives "
                f"{config['out_channels']}; samplers want as many"
            )
        if config["image_dim"] is not None or config["added_kv_proj_dim"] is not None:
            raise ExportError(
                f"{checkpoint.where}: the transformer takes a picture beside the prompt (image_dim, "
                "added_kv_proj_dim); that is another model's: --model wan21-i2v-14b"
            )

    def check_decoder(self, checkpoint: Checkpoint) -> None:
        check_causal(checkpoint, self.config(checkpoint, "vae"))

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
            return_dict=False,
        )[0]
        return output

    def conditioning(self, checkpoint: Checkpoint, size: Size) -> Sequence[ConditioningInput]:
        """The text alone, its padding zeros, which the network does not mask."""
        width = int(self.config(checkpoint, "transformer")["text_dim"])
        return (ConditioningInput(Conditioning(name="prompt_embeds", source="text"), (TOKENS, width), attended=True),)

    def latent_channels(self, checkpoint: Checkpoint) -> int:
        return int(self.config(checkpoint, "vae")["z_dim"])

    def pixels(self, checkpoint: Checkpoint) -> int:
        return int(self.config(checkpoint, "vae")["scale_factor_spatial"])

    def latents(self, checkpoint: Checkpoint, size: Size) -> tuple[int, ...]:
        channels, _, height, width = super().latents(checkpoint, size)
        return channels, (size.frames - 1) // self._together(checkpoint) + 1, height, width

    def _together(self, checkpoint: Checkpoint) -> int:
        """Frames of a latent frame, but for the first."""
        return int(self.config(checkpoint, "vae")["scale_factor_temporal"])

    def scaling(self, checkpoint: Checkpoint) -> Scaling:
        return self._scaling_by_channel(checkpoint)

    def size_multiple(self, checkpoint: Checkpoint) -> int:
        """The pipeline takes none but multiples of 16."""
        _, height, width = self.config(checkpoint, "transformer")["patch_size"]
        return math.lcm(16, self.pixels(checkpoint) * height, self.pixels(checkpoint) * width)

    def check_size(self, checkpoint: Checkpoint, size: Size) -> None:
        super().check_size(checkpoint, size)
        together = self._together(checkpoint)
        if (size.frames - 1) % together:
            below = (size.frames - 1) // together * together + 1
            raise ExportError(
                f"--frames must be 1 more than a multiple of {together} for this model, got {size.frames}; the nearest "
                f"are {below} and {below + together}"
            )
        most = int(self.config(checkpoint, "transformer")["rope_max_seq_len"])
        if max(self.latents(checkpoint, size)[1:]) > most:
            raise ExportError(f"the network knows {most} places a side (rope_max_seq_len); {size} is larger")

    def default_size(self, checkpoint: Checkpoint) -> Size:
        return DEFAULT_SIZE

    def default_frames(self, checkpoint: Checkpoint) -> int:
        return DEFAULT_SIZE.frames

    def encode_with(self, pipe: Any, prompt: str, negative: str, clip_skip: int) -> tuple[Texts, Texts]:
        if not is_ftfy_available():
            raise ExportError("diffusers' pipeline of Wan cleans prompts by ftfy, which is not here: pip install ftfy")
        positive, other = pipe.encode_prompt(prompt, negative, max_sequence_length=TOKENS, device="cpu")
        return {"prompt_embeds": positive}, {"prompt_embeds": other}

    def call(self, pipe: Any, conditioning: Texts, guidance_scale: float, guidance_rescale: float) -> dict[str, Any]:
        return {
            "prompt_embeds": conditioning["prompt_embeds.positive"],
            "negative_prompt_embeds": conditioning.get("prompt_embeds.negative"),
            "guidance_scale": guidance_scale,
        }


def check_causal(checkpoint: Checkpoint, config: Mapping[str, Any]) -> None:
    """Raises :class:`~tgate_engine.errors.ExportError` for an autoencoder that is not Wan 2.1's."""
    for key, wanted in (("in_channels", 3), ("out_channels", 3), ("patch_size", None), ("is_residual", False)):
        if config[key] != wanted:
            raise ExportError(
                f"{checkpoint.where}: vae/config.json has {key} = {config[key]}, Wan 2.1 has {wanted}; this "
                "checkpoint is of another architecture"
            )
    halved = (2 ** (len(config["dim_mult"]) - 1), 2 ** sum(map(bool, config["temperal_downsample"])))
    stated = (config["scale_factor_spatial"], config["scale_factor_temporal"])
    if halved != stated or len(config["temperal_downsample"]) != len(config["dim_mult"]) - 1:
        raise ExportError(
            f"{checkpoint.where}: vae/config.json has scale_factor_spatial = {stated[0]} and "
            f"scale_factor_temporal = {stated[1]}, its levels (dim_mult, temperal_downsample) make {halved[0]} and "
            f"{halved[1]}; they must agree"
        )


class _Attention:
    """What :class:`diffusers.models.transformers.transformer_wan.WanAttnProcessor` computes, out of place."""

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        attended = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        picture: Tensor | None = None
        if attention.add_k_proj is not None:  # what a picture was made into lies before the text
            picture, attended = attended[:, :-TOKENS], attended[:, -TOKENS:]
        query = attention.norm_q(attention.to_q(hidden_states))
        key, value = attention.norm_k(attention.to_k(attended)), attention.to_v(attended)
        query, key, value = (x.unflatten(2, (attention.heads, -1)) for x in (query, key, value))  # [B, L, heads, width]
        if rotary_emb is not None:
            query, key = (_rotated(x, *rotary_emb) for x in (query, key))
        result = _attended(query, key, value, attention_mask)
        if picture is not None:
            key, value = attention.norm_added_k(attention.add_k_proj(picture)), attention.add_v_proj(picture)
            result = result + _attended(query, *(x.unflatten(2, (attention.heads, -1)) for x in (key, value)))
        projected: Tensor = attention.to_out[0](result)
        return projected


def _attended(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of [B, L, heads, width], its heads joined: [B, L, heads * width]."""
    query, key, value = (x.transpose(1, 2) for x in (query, key, value))
    result = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    return result.transpose(1, 2).flatten(2, 3)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of neighbours of the last dimension, each turned by its angle; ``cos`` and ``sin`` hold each twice."""
    one, other = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[..., 0::2], sin[..., 1::2]
    return torch.stack([one * cos - other * sin, one * sin + other * cos], dim=-1).flatten(-2).type_as(x)
