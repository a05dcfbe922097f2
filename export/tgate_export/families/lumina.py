"""Lumina-Next: a diffusion transformer that adds what picture and text give each head, the text's by a learned gate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
import transformers
from diffusers.models.embeddings import LuminaPatchEmbed, get_2d_rotary_pos_embed_lumina
from diffusers.models.transformers.lumina_nextdit2d import LuminaNextDiTBlock
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from tgate_engine.errors import ExportError
from tgate_engine.manifest import Conditioning
from tgate_export.checkpoints import Checkpoint
from tgate_export.families.base import ConditioningInput, Family, Size, Texts, side
from tgate_export.families.facts import LUMINA

TOKENS = 256
"""Most tokens of a prompt: what diffusers' pipeline encodes. It has prompts as long as they are; graphs have one
length, the rest masked, which gives the same numbers."""

_PIXELS = 8
"""For each latent pixel, by which the pipeline counts whatever the autoencoder."""

_PLACES = 384
"""Rows and columns that the pipeline makes angles for."""

_TRAINED = 1000
"""Timesteps; the network's time goes from 0, noise, to 1."""

_GUIDED = 3
"""Channels that the pipeline guides. The others are the prompt's half's."""


class Lumina(Family):
    """Lumina-Next-SFT and Lumina-Next-T2I (arXiv 2406.18583), in diffusers layout.

    A block's self-attention and cross-attention give heads [N, L, heads, width], not yet projected; the text's are
    multiplied by the tangent of a gate, both are added, and one projection takes the sum. What is kept of
    cross-attention is what its module gives, before the gate: a number of each head, the same at every step.

    Text enters through cross-attention, and its mean once more beside the timestep. The network predicts a variance
    beside the velocity; samplers do not use it, and the graphs drop it. Time-aware scaling is the pipeline's default:
    a picture spans the angles that one of the network's own size does, at every timestep that a sampler takes.
    """

    facts = LUMINA
    pipeline_classes = ("LuminaPipeline", "LuminaText2ImgPipeline")
    renamed: Mapping[str, str] = {"LuminaText2ImgPipeline": "LuminaPipeline"}
    classes: Mapping[str, type[nn.Module]] = {
        "transformer": diffusers.LuminaNextDiT2DModel,
        "vae": diffusers.AutoencoderKL,
        "text_encoder": transformers.GemmaModel,
    }
    denoiser = "transformer"
    text_components = ("text_encoder",)
    tokenizers = ("tokenizer",)
    tokenizer_class = transformers.GemmaTokenizer

    def build(self, checkpoint: Checkpoint, component: str) -> nn.Module:
        """With angles as real numbers, where diffusers has complex ones, which graphs have no node for; and with a
        number of images that need not be known."""
        module = super().build(checkpoint, component)
        for part in module.modules() if component == "transformer" else ():
            if isinstance(part, LuminaNextDiTBlock):
                part.__class__ = _Block
                part.attn1.processor = part.attn2.processor = _Attention()
            if isinstance(part, LuminaPatchEmbed):
                part.__class__ = _Patches
        return module

    def check(self, checkpoint: Checkpoint) -> None:
        super().check(checkpoint)
        config = self.config(checkpoint, "transformer")
        if not config["learn_sigma"]:
            raise ExportError(
                f"{checkpoint.where}: the transformer has learn_sigma = false; {self.pipeline_classes[0]} wants a "
                "variance beside what it predicts, and takes the first half"
            )
        if self.pixels(checkpoint) != _PIXELS:
            raise ExportError(
                f"{checkpoint.where}: the vae has {self.pixels(checkpoint)} pixels for each latent pixel, and "
                f"{self.pipeline_classes[0]} counts places by {_PIXELS}"
            )
        heads, own = config["num_attention_heads"], config["num_kv_heads"]
        if own is not None and (own < 1 or heads % own):
            raise ExportError(
                f"{checkpoint.where}: the transformer has {heads} heads and num_kv_heads = {own}; each of these serves "
                "as many of those, so a divisor is wanted"
            )
        self._base(checkpoint)

    def _side(self, checkpoint: Checkpoint) -> int:
        """Pixels a side of the pictures that the network was trained on."""
        height, _ = side(checkpoint, "transformer", self.config(checkpoint, "transformer")["sample_size"])
        return height * _PIXELS

    def _base(self, checkpoint: Checkpoint) -> int:
        """Places of such a picture, as the pipeline counts them: attention is sharper over more."""
        places = int((self._side(checkpoint) // 16) ** 2)
        if places < 2:
            raise ExportError(
                f"{checkpoint.where}: the transformer has sample_size = {self._side(checkpoint) // _PIXELS}, a picture "
                f"of {places} places; {self.pipeline_classes[0]} divides by the logarithm of their number, and 4 is "
                "the least size"
            )
        return places

    def denoise(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        guidance: Tensor,
        conditioning: Mapping[str, Tensor],
    ) -> Tensor:
        assert isinstance(denoiser, diffusers.LuminaNextDiT2DModel)
        patch, trained = denoiser.patch_size, denoiser.sample_size * _PIXELS
        height, width = (int(length) for length in latents.shape[-2:])
        factor = math.sqrt(height * width * _PIXELS**2 / trained**2)
        rows, columns, head = height // patch, width // patch, denoiser.head_dim
        own = isinstance(denoiser.patch_embedder, _Patches)  # else it is diffusers'
        output: Tensor = denoiser(
            hidden_states=latents,
            timestep=1 - timesteps / _TRAINED,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_mask=conditioning["prompt_mask"],
            image_rotary_emb=_angles(head, rows, columns, factor) if own else _table(head, rows, columns, factor),
            cross_attention_kwargs={"base_sequence_length": (trained // 16) ** 2},
            return_dict=False,
        )[0]
        return -output[:, : latents.shape[1]]

    def conditioning(self, checkpoint: Checkpoint, size: Size) -> Sequence[ConditioningInput]:
        """The text and its mask, each half's own. Their mean conditions the network outside cross-attention."""
        width = int(self.config(checkpoint, "transformer")["cross_attention_dim"])
        text, mask = (Conditioning(name=name, source="text") for name in ("prompt_embeds", "prompt_mask"))
        return ConditioningInput(text, (TOKENS, width)), ConditioningInput(mask, (TOKENS,), mask=True)

    def guidance_ramp(self, latents: Sequence[int]) -> Tensor | None:
        """By channel: the first three are guided."""
        return torch.tensor([float(channel < _GUIDED) for channel in range(latents[0])]).reshape(1, -1, 1, 1)

    def scheduler_config(self, checkpoint: Checkpoint, size: Size) -> Mapping[str, Any]:
        config = super().scheduler_config(checkpoint, size)
        if config.get("num_train_timesteps", _TRAINED) != _TRAINED:
            raise ExportError(
                f"{checkpoint.where}: scheduler/scheduler_config.json has num_train_timesteps = "
                f"{config['num_train_timesteps']}; time is a part of {_TRAINED} for this network"
            )
        return config

    def size_multiple(self, checkpoint: Checkpoint) -> int:
        """The pipeline takes none but multiples of 16."""
        return math.lcm(2 * _PIXELS, _PIXELS * int(self.config(checkpoint, "transformer")["patch_size"]))

    def check_size(self, checkpoint: Checkpoint, size: Size) -> None:
        super().check_size(checkpoint, size)
        most = _PLACES * _PIXELS * int(self.config(checkpoint, "transformer")["patch_size"])
        if max(size.height, size.width) > most:
            raise ExportError(
                f"{self.pipeline_classes[0]} makes angles for {_PLACES} places a side, {most} pixels; {size} is larger"
            )

    def default_size(self, checkpoint: Checkpoint) -> Size:
        return Size(height=self._side(checkpoint), width=self._side(checkpoint))

    def encode_with(self, pipe: Any, prompt: str, negative: str, clip_skip: int) -> tuple[Texts, Texts]:
        positive, mask, other, other_mask = pipe.encode_prompt(prompt, negative_prompt=negative, device="cpu")
        return _filled_up(positive, mask), _filled_up(other, other_mask)

    def call(self, pipe: Any, conditioning: Texts, guidance_scale: float, guidance_rescale: float) -> dict[str, Any]:
        return {
            "prompt_embeds": conditioning["prompt_embeds.positive"],
            "prompt_attention_mask": conditioning["prompt_mask.positive"],
            "negative_prompt_embeds": conditioning.get("prompt_embeds.negative"),
            "negative_prompt_attention_mask": conditioning.get("prompt_mask.negative"),
            "guidance_scale": guidance_scale,
        }


def _filled_up(states: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """States [1, T, C] and mask [1, T] of at most :data:`TOKENS`, and what is left masked."""
    rest = TOKENS - states.shape[1]
    return {
        "prompt_embeds": nn.functional.pad(states, (0, 0, 0, rest)),
        "prompt_mask": nn.functional.pad(mask.float(), (0, rest)),
    }


class _Block(LuminaNextDiTBlock):
    """What it computes, the heads of both kinds of attention added side by side: of their sum by heads, transposed,
    OpenVINO 2026.4 dies."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor,
        image_rotary_emb: Tensor,
        encoder_hidden_states: Tensor,
        encoder_mask: Tensor,
        temb: Tensor,
        cross_attention_kwargs: Mapping[str, Any],
    ) -> Tensor:
        seen, gate_attention, scale, gate = self.norm1(hidden_states, temb)
        own = self.attn1(
            hidden_states=seen,
            encoder_hidden_states=seen,
            attention_mask=attention_mask,
            query_rotary_emb=image_rotary_emb,
            key_rotary_emb=image_rotary_emb,
            **cross_attention_kwargs,
        )
        text = self.attn2(
            hidden_states=seen,
            encoder_hidden_states=self.norm1_context(encoder_hidden_states),
            attention_mask=encoder_mask,
            query_rotary_emb=image_rotary_emb,
            key_rotary_emb=None,
            **cross_attention_kwargs,
        )
        each = self.gate.tanh().unsqueeze(1).expand(-1, self.head_dim).flatten()
        mixed = self.attn2.to_out[0](own.flatten(2) + text.flatten(2) * each)
        hidden_states = hidden_states + gate_attention.unsqueeze(1).tanh() * self.norm2(mixed)
        further = self.feed_forward(self.ffn_norm1(hidden_states) * (1 + scale.unsqueeze(1)))
        result: Tensor = hidden_states + gate.unsqueeze(1).tanh() * self.ffn_norm2(further)
        return result


class _Patches(LuminaPatchEmbed):
    """What it computes: patches [N, L, C], what of them is picture (all), one size for all, and their angles."""

    def forward(self, x: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor, list[tuple[int, int]], Tensor]:
        patch, (_, _, height, width) = self.patch_size, x.shape
        rows, columns = height // patch, width // patch
        patches = x.unflatten(3, (columns, patch)).unflatten(2, (rows, patch)).permute(0, 2, 4, 1, 3, 5)
        hidden = self.proj(patches.flatten(3)).flatten(1, 2)
        return hidden, torch.ones_like(hidden[..., 0]), [(height, width)], freqs_cis


class _Attention:
    """What :class:`diffusers.models.attention_processor.LuminaAttnProcessor2_0` computes, [N, L, heads, width]."""

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor,
        query_rotary_emb: Tensor,
        key_rotary_emb: Tensor | None,
        base_sequence_length: int,
    ) -> Tensor:
        query, key, value = (
            attention.to_q(hidden_states),
            attention.to_k(encoder_hidden_states),
            attention.to_v(encoder_hidden_states),
        )
        width = query.shape[-1] // attention.heads
        if attention.norm_q is not None:
            query, key = attention.norm_q(query), attention.norm_k(key)
        query, key, value = (x.unflatten(2, (-1, width)) for x in (query, key, value))
        query = _rotated(query, query_rotary_emb)
        if key_rotary_emb is None:  # the text's
            mask, scale = attention_mask.bool()[:, None, None], width**-0.5
        else:
            places = math.log(hidden_states.shape[1], base_sequence_length)
            key, mask, scale = _rotated(key, key_rotary_emb), None, math.sqrt(places) * attention.scale
        several = attention.heads // key.shape[2]
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        if several > 1:
            key, value = (x.repeat_interleave(several, dim=1) for x in (key, value))
        result = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
        return result.transpose(1, 2)


def _rotated(x: Tensor, angles: Tensor) -> Tensor:
    """Pairs of neighbours of [N, L, heads, width], turned by angles of their place, [L, width / 2, cosine and sine]."""
    cos, sin = angles[:, None].unbind(-1)
    one, other = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([one * cos - other * sin, one * sin + other * cos], dim=-1).flatten(-2).type_as(x)


def _angles(width: int, rows: int, columns: int, factor: float) -> Tensor:
    """Cosines and sines of the places, row by row, [rows * columns, width / 2, 2], as the pipeline makes them."""
    with unset_fake_temporarily():  # numbers of the graph, not nodes
        numbers = torch.view_as_real(_table(width, rows, columns, factor).flatten(0, 1)).tolist()
    return torch.tensor(numbers)


def _table(width: int, rows: int, columns: int, factor: float) -> Tensor:
    """As diffusers has them, complex, [rows, columns, width / 2]."""
    table: Tensor = get_2d_rotary_pos_embed_lumina(width, rows, columns, linear_factor=factor)
    return table
