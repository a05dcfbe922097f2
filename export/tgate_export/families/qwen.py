"""Qwen-Image: a diffusion transformer whose attention is joint, with Qwen2.5-VL's text and one frame of a video's
autoencoder."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
import transformers
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d, QwenImageUpsample
from diffusers.models.transformers.transformer_qwenimage import QwenDoubleStreamAttnProcessor2_0, QwenEmbedRope
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig, Qwen2_5_VLVisionConfig

from tgate_engine.errors import ExportError
from tgate_engine.manifest import Conditioning
from tgate_export.checkpoints import Checkpoint
from tgate_export.checkpoints.configs import check_config
from tgate_export.families.base import ConditioningInput, Scaling, Size, Texts
from tgate_export.families.facts import QWEN
from tgate_export.families.packed import PATCH, Packed
from tgate_export.quiet import quiet

TOKENS = 512
"""Tokens of a prompt: what diffusers' pipeline keeps, the instruction before it not counted."""

DEFAULT_SIZE = Size(height=1328, width=1328)
"""Its authors'; no configuration names one, and the pipeline's own is another model's."""

_OTHERS = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")
"""Switches of the transformers that edit pictures, or draw in layers: none of them is the pipeline's."""


class QwenImage(Packed):
    """Qwen-Image (arXiv 2508.02324), text to image, in diffusers layout.

    Picture and text attend to each other in one attention, so there is no cross-attention to reuse. A prompt lies in a
    conversation that diffusers' pipeline writes, and is encoded by that pipeline itself (``tgate embed``): of any
    length there, and here filled up with zeros that are masked, which comes to the same. Guided output is brought back
    to the length that the prompt's half has at each place.
    """

    facts = QWEN
    pipeline_classes = ("QwenImagePipeline",)
    classes: Mapping[str, type[nn.Module]] = {
        "transformer": diffusers.QwenImageTransformer2DModel,
        "vae": diffusers.AutoencoderKLQwenImage,
        "text_encoder": transformers.Qwen2_5_VLForConditionalGeneration,
    }
    denoiser = "transformer"
    text_components = ("text_encoder",)
    tokenizers = ("tokenizer",)
    tokenizer_class = transformers.Qwen2Tokenizer
    decodes_frames_together = True

    def build(self, checkpoint: Checkpoint, component: str) -> nn.Module:
        """With rotations by real numbers in place of complex ones, and a decoder of one frame, which doubles pictures
        by "nearest": the same as "nearest-exact", whose graph holds tables of places."""
        if component == "text_encoder":
            where, config = f"{checkpoint.where}: {component}/config.json", checkpoint.config(component)
            # Those from before transformers 5 have the text's part among their own keys.
            for key, cls in (("text_config", Qwen2_5_VLTextConfig), ("vision_config", Qwen2_5_VLVisionConfig)):
                own = config.get(key)
                known = own if isinstance(own, Mapping) else {}
                check_config(where, cls, {**config, **known} if key == "text_config" else known)
        with quiet():  # transformers speaks of keys that it has moved
            module = super().build(checkpoint, component)
        for name, part in list(module.named_modules()):
            if isinstance(part, QwenEmbedRope):
                module.set_submodule(name, _Places(part))
                module._keep_in_fp32_modules = [name]  # diffusers has them in complex64, whatever the network's dtype
            elif isinstance(getattr(part, "processor", None), QwenDoubleStreamAttnProcessor2_0):
                part.processor = _Attention()
            elif isinstance(part, QwenImageUpsample):
                part.mode = "nearest"
            elif isinstance(part, QwenImageCausalConv3d) and name.startswith(("decoder.", "post_quant_conv")):
                part.__class__ = _Frame
        return module

    def check(self, checkpoint: Checkpoint) -> None:
        config, text = self.config(checkpoint, "transformer"), self.config(checkpoint, "text_encoder")["text_config"]
        for key in _OTHERS:
            if config[key]:
                raise ExportError(
                    f"{checkpoint.where}: the transformer has {key} = true, which {self.pipeline_classes[0]} does not "
                    "expect: it edits pictures, draws in layers or takes the guidance scale; give a checkpoint of "
                    "Qwen-Image, text to image"
                )
        outputs = config["patch_size"] ** 2 * (config["out_channels"] or config["in_channels"])
        self.check_channels(checkpoint, outputs)
        if config["joint_attention_dim"] != text["hidden_size"]:
            raise ExportError(
                f"{checkpoint.where}: the transformer has joint_attention_dim = {config['joint_attention_dim']}, the "
                f"text_encoder gives {text['hidden_size']} channels (hidden_size); they must agree"
            )
        self.check_decoder(checkpoint)

    def check_decoder(self, checkpoint: Checkpoint) -> None:
        config = self.config(checkpoint, "vae")
        if config["input_channels"] != 3:
            raise ExportError(
                f"{checkpoint.where}: vae/config.json has input_channels = {config['input_channels']}; pictures have 3 "
                "channels"
            )
        if len(config["temperal_downsample"]) != len(config["dim_mult"]) - 1:
            raise ExportError(
                f"{checkpoint.where}: vae/config.json has {len(config['dim_mult'])} dim_mult and "
                f"{len(config['temperal_downsample'])} temperal_downsample; one less is wanted"
            )

    def denoise(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        guidance: Tensor,
        conditioning: Mapping[str, Tensor],
    ) -> Tensor:
        height, width = (side // PATCH for side in latents.shape[-2:])
        output: Tensor = denoiser(
            hidden_states=self.as_pipeline(latents),
            timestep=timesteps / 1000,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_hidden_states_mask=conditioning["prompt_mask"],
            img_shapes=[[(1, height, width)]],
            return_dict=False,
        )[0]
        return self.from_pipeline(output, latents.shape)

    def lengths(self, output: Tensor) -> Tensor:
        """Of what the network gives for each place: over its channels and its 2x2 latent pixels."""
        squares = (output * output).unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))
        summed = squares.sum(dim=(1, 3, 5), keepdim=True).sqrt()
        return summed.expand(-1, -1, -1, PATCH, -1, PATCH).flatten(4).flatten(2, 3)

    def conditioning(self, checkpoint: Checkpoint, size: Size) -> Sequence[ConditioningInput]:
        """The text's states and its mask, each half's own."""
        width = int(self.config(checkpoint, "transformer")["joint_attention_dim"])
        text, mask = (Conditioning(name=name, source="text") for name in ("prompt_embeds", "prompt_mask"))
        return ConditioningInput(text, (TOKENS, width)), ConditioningInput(mask, (TOKENS,), mask=True)

    def latent_channels(self, checkpoint: Checkpoint) -> int:
        return int(self.config(checkpoint, "vae")["z_dim"])

    def pixels(self, checkpoint: Checkpoint) -> int:
        return int(2 ** len(self.config(checkpoint, "vae")["temperal_downsample"]))

    def vocabulary(self, checkpoint: Checkpoint, component: str) -> int:
        return int(self.config(checkpoint, component)["text_config"]["vocab_size"])

    def scaling(self, checkpoint: Checkpoint) -> Scaling:
        return self._scaling_by_channel(checkpoint)

    def default_size(self, checkpoint: Checkpoint) -> Size:
        return DEFAULT_SIZE

    def encode_with(self, pipe: Any, prompt: str, negative: str, clip_skip: int) -> tuple[Texts, Texts]:
        return _filled_up(pipe, prompt), _filled_up(pipe, negative)

    def call(self, pipe: Any, conditioning: Texts, guidance_scale: float, guidance_rescale: float) -> dict[str, Any]:
        return {
            "prompt_embeds": conditioning["prompt_embeds.positive"],
            "prompt_embeds_mask": conditioning["prompt_mask.positive"],
            "negative_prompt_embeds": conditioning.get("prompt_embeds.negative"),
            "negative_prompt_embeds_mask": conditioning.get("prompt_mask.negative"),
            "true_cfg_scale": guidance_scale,
        }


def _filled_up(pipe: Any, prompt: str) -> Texts:
    """What the pipeline makes of a prompt, as long as it may be, and which of it counts."""
    states, _ = pipe.encode_prompt(prompt, device="cpu", max_sequence_length=TOKENS)
    length = states.shape[1]
    mask = torch.cat([torch.ones(1, length), torch.zeros(1, TOKENS - length)], dim=1)
    return {"prompt_embeds": nn.functional.pad(states, (0, 0, 0, TOKENS - length)), "prompt_mask": mask}


class _Places(nn.Module):
    """The angles by which queries and keys are turned at each place, as their cosines and sines.

    As :class:`diffusers.models.transformers.transformer_qwenimage.QwenEmbedRope` has them, which counts rows and
    columns from the middle of the picture, and the text's places from where the picture ends. One row of the table for
    each place, from the largest below zero on.
    """

    def __init__(self, rope: QwenEmbedRope) -> None:
        super().__init__()
        self._widths = [width // 2 for width in rope.axes_dim]
        self._zero = len(rope.neg_freqs)
        table = torch.cat([rope.neg_freqs, rope.pos_freqs])
        self.register_buffer("cos", table.real.clone(), persistent=False)
        self.register_buffer("sin", table.imag.clone(), persistent=False)

    def forward(
        self, shapes: Sequence[Sequence[tuple[int, int, int]]], max_txt_seq_len: int, device: object = None
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Cosines and sines [h * w, D/2] of the picture and [T, D/2] of the text."""
        ((_, height, width),) = shapes[0]
        after = self._zero + max(height // 2, width // 2)
        cos, sin = self.get_buffer("cos"), self.get_buffer("sin")
        return (
            (self._picture(cos, height, width), self._picture(sin, height, width)),
            (cos[after : after + max_txt_seq_len], sin[after : after + max_txt_seq_len]),
        )

    def _picture(self, table: Tensor, height: int, width: int) -> Tensor:
        frame, rows, columns = table.split(self._widths, dim=1)
        parts = (
            frame[self._zero].expand(height, width, -1),
            rows[self._around(height)].unsqueeze(1).expand(-1, width, -1),
            columns[self._around(width)].unsqueeze(0).expand(height, -1, -1),
        )
        return torch.cat(parts, dim=2).flatten(0, 1)

    def _around(self, side: int) -> slice:
        """As many rows of the table, from the middle of a side on to both its ends."""
        first = self._zero - (side - side // 2)
        return slice(first, first + side)


class _Attention:
    """What :class:`diffusers.models.transformers.transformer_qwenimage.QwenDoubleStreamAttnProcessor2_0` computes, with
    real numbers."""

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_mask: Tensor,
        image_rotary_emb: tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]],
        attention_mask: None = None,
    ) -> tuple[Tensor, Tensor]:
        def heads(x: Tensor) -> Tensor:
            return x.unflatten(2, (attention.heads, -1))  # [B, L, heads, width]

        picture, text = image_rotary_emb
        query = _turned(attention.norm_q(heads(attention.to_q(hidden_states))), *picture)
        key = _turned(attention.norm_k(heads(attention.to_k(hidden_states))), *picture)
        text_query = _turned(attention.norm_added_q(heads(attention.add_q_proj(encoder_hidden_states))), *text)
        text_key = _turned(attention.norm_added_k(heads(attention.add_k_proj(encoder_hidden_states))), *text)
        value, text_value = heads(attention.to_v(hidden_states)), heads(attention.add_v_proj(encoder_hidden_states))
        pairs = ((text_query, query), (text_key, key), (text_value, value))
        joint = [torch.cat(pair, dim=1).transpose(1, 2) for pair in pairs]
        # Of one element, so that passes see that every block's mask is the same.
        all_of_it = encoder_hidden_states_mask.new_ones((1, 1)).expand(*hidden_states.shape[:2])
        counts = torch.cat([encoder_hidden_states_mask, all_of_it], dim=1)[:, None, None]
        result = nn.functional.scaled_dot_product_attention(*joint, attn_mask=counts)
        length = encoder_hidden_states.shape[1]
        merged = result.transpose(1, 2).flatten(2)
        return attention.to_out[0](merged[:, length:]), attention.to_add_out(merged[:, :length])


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Pairs of neighbours of the last dimension of [B, L, heads, width], each turned by its place's angle."""
    one, other = x.float().unflatten(3, (-1, 2)).unbind(4)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.stack([one * cos - other * sin, one * sin + other * cos], dim=4).flatten(3).type_as(x)


def one_frame(convolution: Any, x: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """What a convolution that looks at frames gone by makes of a video of one, [B, C, 1, h, w], to the same with its
    own channels: what of it is not multiplied with zeros."""
    assert x.shape[2] == 1  # the pipeline decodes one frame
    assert cache_x is None
    padding = (convolution._padding[2], convolution._padding[0])
    frame = nn.functional.conv2d(x[:, :, 0], convolution.weight[:, :, -1], convolution.bias, padding=padding)
    return frame.unsqueeze(2)


class _Frame(QwenImageCausalConv3d):
    forward = one_frame
