"""LTX-Video: a video transformer over space and time at once, with T5's text and an autoencoder that packs tightly."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_export.checkpoints import Checkpoint
from tgate_export.families.base import ConditioningInput, Family, Scaling, Size, Texts
from tgate_export.families.facts import LTX
from tgate_export.families.t5 import T5Text, end_token, t5_conditioning
from tgate_export.recipes import FLOW_EULER
from tgate_export.schedulers import MU, PIPELINE_SIGMAS, size_shift

TOKENS = 128
"""Tokens of a prompt: what diffusers' pipeline encodes."""

PIXELS, TOGETHER = 32, 8
"""Pixels a side of a latent pixel, and frames of a latent frame but for the first: the pipeline takes these for granted
where it has no autoencoder at hand, and the network is told places in pixels and seconds."""

FPS = 25
"""Frames a second, diffusers' default, which the network is told by how far frames lie apart."""

DEFAULT_SIZE = Size(height=480, width=704, frames=161)
"""What the pipeline's documentation draws, whatever the checkpoint says."""

_STATISTICS = ("latents_mean", "latents_std")


class Ltx(Family):
    """LTX-Video (arXiv 2501.00103), text to video, in diffusers layout.

    Latents are [C, F, h, w], the first of F for one frame and each further one for eight. The pipeline holds them as
    one row of places, [F * h * w, C].
    """

    facts = LTX
    pipeline_classes = ("LTXPipeline",)
    classes: Mapping[str, type[nn.Module]] = {
        "transformer": diffusers.LTXVideoTransformer3DModel,
        "vae": diffusers.AutoencoderKLLTXVideo,
        "text_encoder": transformers.T5EncoderModel,
    }
    denoiser = "transformer"
    text_components = ("text_encoder",)
    tokenizers = ("tokenizer",)
    tokenizer_class = transformers.T5Tokenizer
    frames_argument = "num_frames"
    frames_axis = 2
    decodes_frames_together = True
    fps = FPS

    def build(self, checkpoint: Checkpoint, component: str) -> nn.Module:
        """The latents' mean and deviation are tensors of the checkpoint, which diffusers keeps as buffers. A decoder
        that is told a timestep is told 0, as the pipeline does unless asked otherwise, and then adds no noise.
        """
        module = super().build(checkpoint, component)
        if component == "vae":
            vae: Any = module
            for name in _STATISTICS:
                vae.register_parameter(name, nn.Parameter(vae._buffers.pop(name), requires_grad=False))
            vae._keep_in_fp32_modules = list(_STATISTICS)
            if vae.config["timestep_conditioning"]:
                vae.decode = _at_no_time(vae.decode)
        return module

    def check(self, checkpoint: Checkpoint) -> None:
        super().check(checkpoint)
        config = self.config(checkpoint, "transformer")
        if config["out_channels"] not in (None, config["in_channels"]):
            raise ExportError(
                f"{checkpoint.where}: the transformer takes {config['in_channels']} channels and gives "
                f"{config['out_channels']}; samplers want as many"
            )
        for key in ("patch_size", "patch_size_t"):
            if config[key] != 1:
                raise ExportError(
                    f"{checkpoint.where}: the transformer has {key} = {config[key]}; LTX-Video has 1, its autoencoder "
                    "packs places, and the pipeline tells the network of no others"
                )
        width = int(config["num_attention_heads"]) * int(config["attention_head_dim"])
        if config["cross_attention_dim"] != width:
            raise ExportError(
                f"{checkpoint.where}: the transformer has cross_attention_dim = {config['cross_attention_dim']}, and "
                f"its text is projected to {width} channels, num_attention_heads times attention_head_dim; they must "
                "agree"
            )
        text = int(self.config(checkpoint, "text_encoder")["d_model"])
        if config["caption_channels"] != text:
            raise ExportError(
                f"{checkpoint.where}: the transformer has caption_channels = {config['caption_channels']}, the "
                f"text_encoder gives {text} (d_model); they must agree"
            )
        named = super().scheduler_config(checkpoint, DEFAULT_SIZE).get("_class_name")
        if named != FLOW_EULER:
            raise ExportError(
                f"{checkpoint.where}: the scheduler is {named}; {self.pipeline_classes[0]} hands it noise levels and "
                f"their shift, which {FLOW_EULER} takes"
            )

    def check_decoder(self, checkpoint: Checkpoint) -> None:
        config = self.config(checkpoint, "vae")
        for key, wanted in (("in_channels", 3), ("out_channels", 3), ("patch_size_t", 1)):
            if config[key] != wanted:
                raise ExportError(
                    f"{checkpoint.where}: vae/config.json has {key} = {config[key]}, LTX-Video has {wanted}; this "
                    "checkpoint is of another architecture"
                )
        if any(config["decoder_inject_noise"]):
            raise ExportError(
                f"{checkpoint.where}: vae/config.json has decoder_inject_noise = "
                f"{list(config['decoder_inject_noise'])}, as LTX-Video 0.9.1 has: its decoder draws noise in its "
                "layers, which no graph does; 0.9.0, and models whose decoder draws none, can be exported"
            )
        levels = len(config["decoder_block_out_channels"])
        for key, wanted in (
            ("decoder_spatio_temporal_scaling", levels),
            ("decoder_layers_per_block", levels + 1),
            ("upsample_residual", levels),
            ("upsample_factor", levels),
        ):
            if len(config[key]) != wanted:
                raise ExportError(
                    f"{checkpoint.where}: vae/config.json has {len(config[key])} {key} and {levels} "
                    f"decoder_block_out_channels; {wanted} are wanted"
                )
        vae: Any = self.skeleton(checkpoint, "vae")
        doubled = 2 ** sum(map(bool, config["decoder_spatio_temporal_scaling"]))
        stated = (vae.spatial_compression_ratio, vae.temporal_compression_ratio)
        makes = (config["patch_size"] * doubled, doubled)
        if {stated, makes} != {(PIXELS, TOGETHER)}:
            raise ExportError(
                f"{checkpoint.where}: vae/config.json makes {stated[0]} pixels and {stated[1]} frames one of the "
                f"latents, its decoder {makes[0]} and {makes[1]} of it; LTX-Video has {PIXELS} and {TOGETHER}"
            )

    def denoise(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        guidance: Tensor,
        conditioning: Mapping[str, Tensor],
    ) -> Tensor:
        output: Tensor = denoiser(
            hidden_states=self.as_pipeline(latents),
            encoder_hidden_states=conditioning["prompt_embeds"],
            timestep=timesteps,
            encoder_attention_mask=conditioning["prompt_mask"],
            video_coords=_places(*latents.shape[2:]),
            return_dict=False,
        )[0]
        return self.from_pipeline(output, latents.shape)

    def as_pipeline(self, latents: Tensor) -> Tensor:
        return latents.flatten(2).transpose(1, 2)

    def from_pipeline(self, latents: Tensor, shape: Sequence[int]) -> Tensor:
        return latents.transpose(1, 2).unflatten(2, tuple(shape[2:]))

    def conditioning(self, checkpoint: Checkpoint, size: Size) -> Sequence[ConditioningInput]:
        """The text and its mask, which cross-attention alone takes."""
        return t5_conditioning(self, checkpoint, TOKENS, negative_mask="own")

    def text(self, encoders: Sequence[nn.Module], clip_skip: int = 0) -> nn.Module:
        return T5Text(*encoders, masked=False)

    def token_length(self, checkpoint: Checkpoint, index: int) -> int:
        return TOKENS

    def end_token(self, checkpoint: Checkpoint, index: int) -> int | None:
        return end_token(self, checkpoint, self.text_components[index])

    def pixels(self, checkpoint: Checkpoint) -> int:
        return PIXELS

    def latents(self, checkpoint: Checkpoint, size: Size) -> tuple[int, ...]:
        channels, _, height, width = super().latents(checkpoint, size)
        return channels, (size.frames - 1) // TOGETHER + 1, height, width

    def scaling(self, checkpoint: Checkpoint) -> Scaling:
        return Scaling(scale=self._scaling_factor(checkpoint), stored=True)

    def scheduler_config(self, checkpoint: Checkpoint, size: Size) -> Mapping[str, Any]:
        """With what the pipeline hands over: noise levels from 1 to 1/n, and, where they are shifted by the size, how
        far."""
        config = {**super().scheduler_config(checkpoint, size), PIPELINE_SIGMAS: True}
        if not config.get("use_dynamic_shifting"):
            return config
        return {**config, MU: size_shift(config, math.prod(self.latents(checkpoint, size)[1:]))}

    def check_size(self, checkpoint: Checkpoint, size: Size) -> None:
        super().check_size(checkpoint, size)
        if (size.frames - 1) % TOGETHER:
            below = (size.frames - 1) // TOGETHER * TOGETHER + 1
            raise ExportError(
                f"--frames must be 1 more than a multiple of {TOGETHER} for this model, got {size.frames}; the nearest "
                f"are {below} and {below + TOGETHER}"
            )

    def default_size(self, checkpoint: Checkpoint) -> Size:
        return DEFAULT_SIZE

    def default_frames(self, checkpoint: Checkpoint) -> int:
        return DEFAULT_SIZE.frames

    def encode_with(self, pipe: Any, prompt: str, negative: str, clip_skip: int) -> tuple[Texts, Texts]:
        positive, mask, other, other_mask = pipe.encode_prompt(
            prompt, negative, max_sequence_length=TOKENS, device="cpu"
        )
        return (
            {"prompt_embeds": positive, "prompt_mask": mask.float()},
            {"prompt_embeds": other, "prompt_mask": other_mask.float()},
        )

    def call(self, pipe: Any, conditioning: Texts, guidance_scale: float, guidance_rescale: float) -> dict[str, Any]:
        return {
            "prompt_embeds": conditioning["prompt_embeds.positive"],
            "prompt_attention_mask": conditioning["prompt_mask.positive"],
            "negative_prompt_embeds": conditioning.get("prompt_embeds.negative"),
            "negative_prompt_attention_mask": conditioning.get("prompt_mask.negative"),
            "guidance_scale": guidance_scale,
            "guidance_rescale": guidance_rescale,
            "frame_rate": FPS,
        }


def _places(frames: int, height: int, width: int) -> Tensor:
    """Where each of the latents' places lies: seconds, and pixels from the top and the left, [1, 3, F * h * w]."""
    counts, scales = (frames, height, width), (TOGETHER / FPS, PIXELS, PIXELS)
    sides = [torch.arange(count, dtype=torch.float32) * scale for count, scale in zip(counts, scales, strict=True)]
    one, other, third = sides[0].view(-1, 1, 1), sides[1].view(-1, 1), sides[2]
    return torch.stack([side.expand(counts) for side in (one, other, third)]).flatten(1).unsqueeze(0)


def _at_no_time(decode: Any) -> Any:
    """An autoencoder's ``decode`` with timestep 0 where none is given."""

    def decoded(latents: Tensor, timestep: Tensor | None = None, **options: Any) -> Any:
        return decode(latents, torch.zeros(latents.shape[0]) if timestep is None else timestep, **options)

    return decoded
