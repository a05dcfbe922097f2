"""Cosmos-Predict2, text to image: a transformer of videos that makes one frame,
with T5's text and Wan's autoencoder."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
import transformers
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanUpsample
from diffusers.models.transformers.transformer_cosmos import CosmosAttnProcessor2_0, CosmosRotaryPosEmbed
from diffusers.utils import is_torchvision_available
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily

from tgate_engine.errors import ExportError
from tgate_engine.manifest import Conditioning
from tgate_export.checkpoints import Checkpoint
from tgate_export.checkpoints.files import plain
from tgate_export.families.base import ConditioningInput, Family, Scaling, Size, Texts
from tgate_export.families.facts import COSMOS
from tgate_export.families.qwen import one_frame
from tgate_export.families.wan import check_causal
from tgate_export.quiet import quiet
from tgate_export.recipes import FLOW_EULER
from tgate_export.schedulers import PIPELINE_SCALES

TOKENS = 512
"""Tokens of a prompt: what diffusers' pipeline encodes."""

DEFAULT_SIZE = Size(height=768, width=1360)
"""The pipeline's own, whatever the checkpoint says."""

LEVELS: Mapping[str, Any] = {"sigma_max": 80.0, "sigma_min": 0.002, "sigma_data": 1.0, "final_sigmas_type": "sigma_min"}
"""What the pipeline writes into its scheduler's configuration, whatever the checkpoint says."""

_FIRST = ("img_context_dim_in", "controlnet_block_every_n", "use_crossattn_projection")
"""Switches of the transformers of Cosmos 2.5, which the pipeline does not expect."""


class Cosmos(Family):
    """Cosmos-Predict2, text to image (arXiv 2501.03575), in diffusers layout.

    Its noise is added to pictures, up to 80 times as strong as they are. Its pipeline scales what the network sees, and
    turns what it gives into what an Euler step of flow matching wants: both are linear, and so numbers of a step's row.
    Latents are [C, h, w]; the pipeline's are of one frame.
    """

    facts = COSMOS
    pipeline_classes = ("Cosmos2TextToImagePipeline",)
    classes: Mapping[str, type[nn.Module]] = {
        "transformer": diffusers.CosmosTransformer3DModel,
        "vae": diffusers.AutoencoderKLWan,
        "text_encoder": transformers.T5EncoderModel,
    }
    denoiser = "transformer"
    text_components = ("text_encoder",)
    tokenizers = ("tokenizer",)
    tokenizer_class = transformers.T5Tokenizer
    decodes_frames_together = True
    guidance_beyond = 1.0  # the pipeline adds the difference to the prompt's half, not to the other

    def build(self, checkpoint: Checkpoint, component: str) -> nn.Module:
        """With places as numbers, attention without a dispatcher, and a decoder of one frame, which doubles pictures by
        "nearest": the same as "nearest-exact", whose graph holds tables of places."""
        module = super().build(checkpoint, component)
        for name, part in module.named_modules():
            if isinstance(part, CosmosRotaryPosEmbed):
                part.__class__ = _Places
            elif isinstance(getattr(part, "processor", None), CosmosAttnProcessor2_0):
                part.processor = _Attention()
            elif isinstance(part, WanUpsample) and part.scale_factor == (2.0, 2.0):
                part.mode = "nearest"
            elif isinstance(part, WanCausalConv3d) and name.startswith(("decoder.", "post_quant_conv")):
                part.__class__ = _Frame
        return module

    def check(self, checkpoint: Checkpoint) -> None:
        super().check(checkpoint)
        config = self.config(checkpoint, "transformer")
        for key in _FIRST:
            if config[key]:
                raise ExportError(
                    f"{checkpoint.where}: the transformer has {key} = {config[key]}, as those of Cosmos 2.5 have; "
                    "give a checkpoint of Cosmos-Predict2, text to image"
                )
        if config["out_channels"] != config["in_channels"]:
            raise ExportError(
                f"{checkpoint.where}: the transformer takes {config['in_channels']} channels and gives "
                f"{config['out_channels']}; samplers want as many"
            )
        if len(config["patch_size"]) != 3 or config["patch_size"][0] != 1:
            raise ExportError(
                f"{checkpoint.where}: the transformer has patch_size = {list(config['patch_size'])}; three numbers are "
                "wanted, the first of them 1"
            )
        if config["extra_pos_embed_type"] is not None:
            raise ExportError(
                f"{checkpoint.where}: the transformer has extra_pos_embed_type = "
                f"{plain(config['extra_pos_embed_type'])}, as Cosmos 1.0 has; Cosmos-Predict2 has null"
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
        assert isinstance(denoiser, diffusers.CosmosTransformer3DModel)
        return _run(denoiser, latents.unsqueeze(2), timesteps.to(latents.dtype), conditioning["prompt_embeds"]).squeeze(
            2
        )

    def conditioning(self, checkpoint: Checkpoint, size: Size) -> Sequence[ConditioningInput]:
        """The text alone, its padding zeros, which the network does not mask."""
        width = int(self.config(checkpoint, "transformer")["text_embed_dim"])
        return (ConditioningInput(Conditioning(name="prompt_embeds", source="text"), (TOKENS, width), attended=True),)

    def latent_channels(self, checkpoint: Checkpoint) -> int:
        return int(self.config(checkpoint, "vae")["z_dim"])

    def pixels(self, checkpoint: Checkpoint) -> int:
        return int(self.config(checkpoint, "vae")["scale_factor_spatial"])

    def scaling(self, checkpoint: Checkpoint) -> Scaling:
        return self._scaling_by_channel(checkpoint)

    def as_pipeline(self, latents: Tensor) -> Tensor:
        return latents.unsqueeze(2)

    def from_pipeline(self, latents: Tensor, shape: Sequence[int]) -> Tensor:
        return latents.squeeze(2)

    def scheduler_config(self, checkpoint: Checkpoint, size: Size) -> Mapping[str, Any]:
        """With the noise levels' ends that the pipeline writes into it, and that it scales by them."""
        config = dict(super().scheduler_config(checkpoint, size))
        if config.get("_class_name") != FLOW_EULER:
            raise ExportError(
                f"{checkpoint.where}: its scheduler is {plain(config.get('_class_name'))}; {self.pipeline_classes[0]} "
                f"hands noise levels of its own to a {FLOW_EULER}, and that is wanted"
            )
        if config.get("use_karras_sigmas") is not True:
            raise ExportError(
                f"{checkpoint.where}: scheduler/scheduler_config.json has use_karras_sigmas = "
                f"{plain(config.get('use_karras_sigmas'))}; without it {self.pipeline_classes[0]} goes from no noise "
                "to noise, and true is wanted"
            )
        for key in ("use_dynamic_shifting", "shift_terminal", "invert_sigmas", "stochastic_sampling"):
            if config.get(key):
                raise ExportError(
                    f"{checkpoint.where}: scheduler/scheduler_config.json has {key} = {plain(config[key])}, and "
                    f"{self.pipeline_classes[0]} spaces noise levels itself; leave it out"
                )
        return {**config, **LEVELS, PIPELINE_SCALES: True}

    def size_multiple(self, checkpoint: Checkpoint) -> int:
        """The pipeline takes none but multiples of 16."""
        _, height, width = self.config(checkpoint, "transformer")["patch_size"]
        return math.lcm(16, self.pixels(checkpoint) * height, self.pixels(checkpoint) * width)

    def check_size(self, checkpoint: Checkpoint, size: Size) -> None:
        super().check_size(checkpoint, size)
        config = self.config(checkpoint, "transformer")
        most = max(length // patch for length, patch in zip(config["max_size"], config["patch_size"], strict=True))
        places = [
            length // patch
            for length, patch in zip(self.latents(checkpoint, size)[1:], config["patch_size"][1:], strict=True)
        ]
        if max(places) > most:
            raise ExportError(f"the network knows {most} places a side (max_size, patch_size); {size} is larger")

    def default_size(self, checkpoint: Checkpoint) -> Size:
        return DEFAULT_SIZE

    def no_negative(self) -> str:
        """The pipeline's own negative prompt."""
        with quiet():  # imported late: the module tells of libraries that nothing here needs
            from diffusers.pipelines.cosmos.pipeline_cosmos2_text2image import DEFAULT_NEGATIVE_PROMPT
        return DEFAULT_NEGATIVE_PROMPT

    def pipeline_parts(self) -> Mapping[str, Any]:
        return {"safety_checker": _Unguarded()}

    def encode_with(self, pipe: Any, prompt: str, negative: str, clip_skip: int) -> tuple[Texts, Texts]:
        positive, other = pipe.encode_prompt(prompt, negative, max_sequence_length=TOKENS, device="cpu")
        return {"prompt_embeds": positive}, {"prompt_embeds": other}

    def call(self, pipe: Any, conditioning: Texts, guidance_scale: float, guidance_rescale: float) -> dict[str, Any]:
        if pipe.transformer.config.concat_padding_mask and not is_torchvision_available():
            raise ExportError(
                "diffusers' network of Cosmos resizes a mask by torchvision, which is not here: pip install "
                "torchvision, or export without a check (--no-verify)"
            )
        return {
            "prompt_embeds": conditioning["prompt_embeds.positive"],
            "negative_prompt_embeds": conditioning.get("prompt_embeds.negative"),
            "guidance_scale": guidance_scale,
        }


class _Unguarded:
    """In the place of the guardrail (``cosmos_guardrail``), one that lets everything pass as it is: what diffusers'
    pipeline is asked for at export are goldens, which nobody sees."""

    def to(self, *_args: object) -> _Unguarded:
        return self

    def check_text_safety(self, _prompt: str) -> bool:
        return True

    def check_video_safety(self, frames: Any) -> Any:
        return frames


class _Frame(WanCausalConv3d):
    """A convolution that looks at frames gone by, of a video of one."""

    forward = one_frame


class _Places(CosmosRotaryPosEmbed):
    """What it computes of latents [N, C, 1, h, w]: cosines and sines [places, width], as numbers of the graph."""

    def forward(self, hidden_states: Tensor, fps: int | None = None) -> tuple[Tensor, Tensor]:
        shape = [int(length) for length in hidden_states.shape[2:]]
        with unset_fake_temporarily():
            angles = super().forward(torch.empty(1, 1, *shape), fps)
            halves = [each[:, : each.shape[1] // 2].tolist() for each in angles]  # both halves are alike
        cos, sin = (torch.tensor(half).repeat(1, 2) for half in halves)
        return cos, sin


class _Attention:
    """What :class:`diffusers.models.transformers.transformer_cosmos.CosmosAttnProcessor2_0` computes."""

    def __call__(
        self,
        attention: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        attended = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        projected = (attention.to_q(hidden_states), attention.to_k(attended), attention.to_v(attended))
        query, key, value = (x.unflatten(2, (attention.heads, -1)).transpose(1, 2) for x in projected)
        query, key = attention.norm_q(query), attention.norm_k(key)
        if image_rotary_emb is not None:
            query, key = (_rotated(x, *image_rotary_emb) for x in (query, key))
        result = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask)
        output: Tensor = attention.to_out[0](result.transpose(1, 2).flatten(2, 3).type_as(query))
        return output


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The halves of the last dimension of [N, heads, L, width] as pairs, each turned by its angle."""
    one, other = x.float().chunk(2, dim=-1)
    return (x.float() * cos + torch.cat([-other, one], dim=-1) * sin).type_as(x)


def _run(network: Any, latents: Tensor, times: Tensor, text: Tensor) -> Tensor:
    """What :meth:`diffusers.CosmosTransformer3DModel.forward` gives for latents [N, C, 1, h, w] of which none were
    filled up: the mask that tells so is zeros, which it resizes by a library."""
    seen = latents
    if network.config["concat_padding_mask"]:
        seen = torch.cat([latents, torch.zeros_like(latents[:, :1])], dim=1)
    rows, columns = (
        length // patch for length, patch in zip(latents.shape[3:], network.config["patch_size"][1:], strict=True)
    )
    hidden = network.patch_embed(seen).flatten(1, 3)
    further, embedded = network.time_embed(hidden, times)
    angles = network.rope(seen)
    for block in network.transformer_blocks:
        hidden = block(hidden, text, embedded, further, angles)
    given = network.proj_out(network.norm_out(hidden, embedded, further))
    _, height, width = network.config["patch_size"]
    places = given.unflatten(2, (height, width, -1)).unflatten(1, (rows, columns))  # [N, rows, columns, h, w, C]
    pixels: Tensor = places.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)
    return pixels.unsqueeze(2)
