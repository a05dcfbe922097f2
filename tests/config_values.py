"""Every key of every configuration that diffusers or transformers reads in our families, and values to try for it.

One table a class, shared by the families that have it. ``keys`` are all that the class itself reads, a completeness
that ``tests/whole/test_config_sweep.py`` checks, and ``more`` what pipelines and loaders read of the same file beside
them. Each value stands with what is expected of an export; where that depends on the checkpoint, ``but`` says so.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import diffusers
import transformers

from tests.pipeline_reference import LEFT_OUT

PATCHED = ("steps_offset", "clip_sample", "prediction_type", "timestep_spacing", "_class_name")
"""Keys of a scheduler with which Stable Diffusion's pipeline may do as others do not: it changes two of them."""

Verdict = Literal["honoured", "refused", "no effect", "not read"]
"""``not read``: diffusers cannot load it, for want of something that an export does without."""

BETAS = [0.001 + 0.00001 * i for i in range(1000)]
LONG = "a large red circle above a small blue square and a photo of a small green circle below a large red square " * 3
"""A prompt of more tokens than any of the checkpoints take."""


@dataclass(frozen=True, kw_only=True)
class Try:
    """One value. ``also``: other keys of the file that make it legal. ``but``: other verdicts, by place.

    ``on``: the variants it is for; all of the table's where empty.
    """

    value: Any
    verdict: Verdict
    also: Mapping[str, Any] = field(default_factory=dict)
    but: Mapping[str, Verdict] = field(default_factory=dict)
    on: tuple[str, ...] = ()
    prompt: str | None = None


Tries = tuple[Try, ...]


@dataclass(frozen=True, kw_only=True)
class Table:
    """``places``: (variant of the tiny checkpoints, component). ``sampler``: of a scheduler's class."""

    keys: Mapping[str, Tries]
    more: Mapping[str, Tries] = field(default_factory=dict)
    places: tuple[tuple[str, str], ...]
    sampler: str | None = None


@dataclass(frozen=True, kw_only=True)
class Case:
    """One export to try: ``changes`` to one file of a checkpoint.

    ``slow``: not in every run of the tests. Those have every key with one value: alone where it is honoured or refused,
    and all those of a file together that have no effect. Of videos, those that are honoured are slow.
    """

    name: str
    cls: str
    variant: str
    component: str
    changes: Mapping[str, Any]
    verdict: Verdict
    prompt: str | None = None
    sampler: str | None = None
    slow: bool

    def __str__(self) -> str:
        return f"{self.variant}-{self.component}-{self.cls}.{self.name}"[:150]

    @property
    def scheduler(self) -> str | None:
        """The scheduler's class that the checkpoint is given instead of its own."""
        return self.cls if self.component == "scheduler" else None

    @property
    def negative(self) -> bool:
        """Whether the request has a negative prompt."""
        return "force_zeros_for_empty_prompt" not in self.changes


def _tries(verdict: Verdict, values: tuple[Any, ...], more: dict[str, Any]) -> Tries:
    return tuple(Try(value=value, verdict=verdict, **more) for value in values)


def honoured(*values: Any, **more: Any) -> Tries:
    """Diffusers' result changes, and ours with it."""
    return _tries("honoured", values, more)


def refused(*values: Any, **more: Any) -> Tries:
    """An ExportError: diffusers cannot run it, or the exporter does not offer it."""
    return _tries("refused", values, more)


def no_effect(*values: Any, **more: Any) -> Tries:
    """Nothing changes, in diffusers and in ours."""
    return _tries("no effect", values, more)


def not_read(*values: Any, **more: Any) -> Tries:
    """Diffusers cannot load it, for want of something that an export does without."""
    return _tries("not read", values, more)


def class_keys(name: str) -> set[str]:
    """The keys that a class reads."""
    if name in ("CLIPTokenizer", "T5Tokenizer"):  # what a saved tokenizer_config.json says
        extra = {"CLIPTokenizer": {"bos_token"}, "T5Tokenizer": {"extra_ids", "extra_special_tokens"}}[name]
        return extra | {"model_max_length", "pad_token", "unk_token", "eos_token", "tokenizer_class", "backend"}
    if name == "CLIPImageProcessor":
        return set(transformers.CLIPImageProcessor().to_dict())
    if hasattr(transformers, name):
        return {entry.name for entry in dataclasses.fields(getattr(transformers, name))}
    keys = set(inspect.signature(getattr(diffusers, name).__init__).parameters) - {"self"}
    return keys | {"_class_name", "_diffusers_version"} if name.endswith("Pipeline") else keys


def plain_scheduler(name: str) -> dict[str, Any]:
    """A scheduler's configuration with every key: the class's own values, but Stable Diffusion's betas."""
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
    config = {key: parameter.default for key, parameter in parameters.items() if key != "self"}
    usual = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
    usual |= {"clip_sample": False, "skip_prk_steps": True, "lambda_min_clipped": -1e9}
    return config | {key: value for key, value in usual.items() if key in config} | {"_class_name": name}


LONG_RUNS = (
    *("EulerDiscreteScheduler", "PNDMScheduler", "UniPCMultistepScheduler"),
    *("LMSDiscreteScheduler", "LCMScheduler", "EulerAncestralDiscreteScheduler"),
    *("DEISMultistepScheduler", "EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"),
)
"""Classes whose cases are all slow; all schedulers are compiled in one way."""

BY_ITSELF = ("dense_act_fn", "is_gated_act", "extra_ids", "_attn_implementation", "attn_implementation")
"""Keys that have no effect as long as another one is there, or is not changed with them."""

TABLES: Mapping[str, Table] = {
    "UNet2DConditionModel": Table(
        keys={
            "sample_size": no_effect(16, [12, 8], LEFT_OUT),
            "in_channels": refused(8) + no_effect(LEFT_OUT),
            "out_channels": refused(8) + no_effect(LEFT_OUT),
            "center_input_sample": honoured(True) + no_effect(LEFT_OUT),
            "flip_sin_to_cos": honoured(False) + no_effect(LEFT_OUT),
            "freq_shift": honoured(1) + no_effect(LEFT_OUT),
            "down_block_types": honoured(["CrossAttnDownBlock2D", "CrossAttnDownBlock2D"])
            + honoured(
                ["DownBlock2D", "CrossAttnDownBlock2D"], also={"up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"]}
            )
            + refused(["AttnDownBlock2D", "DownBlock2D"], also={"up_block_types": ["UpBlock2D", "AttnUpBlock2D"]})
            + refused(
                ["SimpleCrossAttnDownBlock2D", "DownBlock2D"],
                also={"up_block_types": ["UpBlock2D", "SimpleCrossAttnUpBlock2D"]},
            )
            + honoured(
                ["ResnetDownsampleBlock2D", "CrossAttnDownBlock2D"],
                also={"up_block_types": ["CrossAttnUpBlock2D", "ResnetUpsampleBlock2D"]},
            )
            + refused(["CrossAttnDownBlock2D"], LEFT_OUT),
            "mid_block_type": honoured("UNetMidBlock2D", None)
            + refused("UNetMidBlock2DSimpleCrossAttn")
            + no_effect(LEFT_OUT),
            "up_block_types": honoured(
                ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D"], ["UpBlock2D", "ResnetUpsampleBlock2D"]
            )
            + refused(LEFT_OUT),
            "only_cross_attention": honoured(True, [True, False]) + no_effect(LEFT_OUT),
            "block_out_channels": honoured([16, 16])
            + honoured(
                [16, 32, 32],
                also={
                    "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
                    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"],
                    "attention_head_dim": 2,
                },
            )
            + refused(LEFT_OUT),
            "layers_per_block": honoured(2, [1, 2], LEFT_OUT),
            "downsample_padding": honoured(0) + no_effect(LEFT_OUT),
            "mid_block_scale_factor": honoured(2.0) + no_effect(LEFT_OUT),
            "dropout": no_effect(0.5, LEFT_OUT),
            "act_fn": honoured("gelu", "mish") + no_effect(LEFT_OUT),
            "norm_num_groups": honoured(2) + refused(None, LEFT_OUT),
            "norm_eps": honoured(0.01) + no_effect(LEFT_OUT),
            "cross_attention_dim": refused(20)
            + no_effect([24, 24], on=("sd15_a",))
            + no_effect([48, 48], on=("conv_projection",))
            + refused(LEFT_OUT),
            "transformer_layers_per_block": honoured(2, [2, 1]) + no_effect(LEFT_OUT),
            "reverse_transformer_layers_per_block": no_effect([2, 1], LEFT_OUT),
            "encoder_hid_dim": honoured(24, also={"encoder_hid_dim_type": "text_proj"}, on=("sd15_a",))
            + honoured(48, also={"encoder_hid_dim_type": "text_proj"}, on=("conv_projection",))
            + no_effect(LEFT_OUT),
            "encoder_hid_dim_type": refused("text_image_proj", also={"encoder_hid_dim": 24})
            + refused("image_proj", also={"encoder_hid_dim": 24})
            + refused("text_proj")
            + no_effect(LEFT_OUT),
            "attention_head_dim": honoured(4, [1, 4], LEFT_OUT),
            "num_attention_heads": refused(2) + no_effect(LEFT_OUT),
            "dual_cross_attention": refused(True) + no_effect(LEFT_OUT),
            "use_linear_projection": honoured(True) + no_effect(LEFT_OUT),
            "class_embed_type": refused("timestep", "identity")
            + refused("projection", also={"projection_class_embeddings_input_dim": 72})
            + refused("simple_projection", also={"projection_class_embeddings_input_dim": 72})
            + no_effect(LEFT_OUT),
            "addition_embed_type": refused("text", "text_image", "image", "image_hint")
            + refused(
                "text_time",
                also={"addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 72},
                but={"conv_projection": "no effect"},
            )
            + no_effect(None, but={"conv_projection": "refused"})
            + no_effect(LEFT_OUT, but={"conv_projection": "refused"}),
            "addition_time_embed_dim": no_effect(4, but={"conv_projection": "refused"})
            + no_effect(LEFT_OUT, but={"conv_projection": "refused"}),
            "num_class_embeds": refused(10) + no_effect(LEFT_OUT),
            "upcast_attention": no_effect(True, LEFT_OUT),
            "resnet_time_scale_shift": honoured("scale_shift") + no_effect(LEFT_OUT),
            "resnet_skip_time_act": no_effect(True, LEFT_OUT),
            "resnet_out_scale_factor": no_effect(2.0, LEFT_OUT),
            "time_embedding_type": honoured("fourier") + no_effect(LEFT_OUT),
            "time_embedding_dim": honoured(48) + no_effect(LEFT_OUT),
            "time_embedding_act_fn": honoured("silu") + no_effect(LEFT_OUT),
            "timestep_post_act": honoured("silu") + no_effect(LEFT_OUT),
            "time_cond_proj_dim": honoured(16, but={"lcm_sdxl": "no effect"})
            + honoured(15)
            + no_effect(LEFT_OUT, but={"lcm_sdxl": "honoured"}),
            "conv_in_kernel": honoured(5, 1) + no_effect(LEFT_OUT),
            "conv_out_kernel": honoured(5, 1) + no_effect(LEFT_OUT),
            "projection_class_embeddings_input_dim": no_effect(80, but={"conv_projection": "refused"})
            + no_effect(LEFT_OUT, but={"conv_projection": "refused"}),
            "attention_type": no_effect("gated", "gated-text-image", LEFT_OUT),
            "class_embeddings_concat": refused(True) + no_effect(LEFT_OUT),
            "mid_block_only_cross_attention": no_effect(True, LEFT_OUT),
            "cross_attention_norm": no_effect("layer_norm", "group_norm", LEFT_OUT),
            "addition_embed_type_num_heads": no_effect(4, LEFT_OUT),
        },
        more={
            "_class_name": refused("UNet2DModel") + no_effect(LEFT_OUT),
            "_diffusers_version": no_effect("0.6.0", LEFT_OUT),
            "mystery": no_effect(1),
            "quantization_config": refused({"quant_method": "bitsandbytes", "load_in_8bit": True}),
        },
        places=(("sd15_a", "unet"), ("conv_projection", "unet"), ("lcm_sdxl", "unet")),
    ),
    "UNetSpatioTemporalConditionModel": Table(
        keys={
            "sample_size": no_effect(16, [8, 12], LEFT_OUT),
            "in_channels": refused(12) + no_effect(LEFT_OUT),
            "out_channels": refused(8) + no_effect(LEFT_OUT),
            "down_block_types": honoured(["CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"])
            + honoured(
                ["DownBlockSpatioTemporal", "CrossAttnDownBlockSpatioTemporal"],
                also={"up_block_types": ["CrossAttnUpBlockSpatioTemporal", "UpBlockSpatioTemporal"]},
            )
            + refused(["CrossAttnDownBlockSpatioTemporal"], LEFT_OUT),
            "up_block_types": honoured(["CrossAttnUpBlockSpatioTemporal", "UpBlockSpatioTemporal"]) + refused(LEFT_OUT),
            "block_out_channels": honoured([32, 64])
            + honoured(
                [32, 32, 32],
                also={
                    "down_block_types": [
                        "CrossAttnDownBlockSpatioTemporal",
                        "CrossAttnDownBlockSpatioTemporal",
                        "DownBlockSpatioTemporal",
                    ],
                    "up_block_types": [
                        "UpBlockSpatioTemporal",
                        "CrossAttnUpBlockSpatioTemporal",
                        "CrossAttnUpBlockSpatioTemporal",
                    ],
                    "num_attention_heads": [4, 2, 2],
                },
            )
            + refused(LEFT_OUT),
            "addition_time_embed_dim": refused(4)
            + honoured(16, also={"projection_class_embeddings_input_dim": 48})
            + refused(LEFT_OUT),
            "projection_class_embeddings_input_dim": refused(48, LEFT_OUT),
            "layers_per_block": honoured(2, [1, 2], LEFT_OUT),
            "cross_attention_dim": refused(20) + no_effect([16, 16]) + refused(LEFT_OUT),
            "transformer_layers_per_block": honoured(2, [1, 2]) + no_effect(LEFT_OUT),
            "num_attention_heads": honoured(2, [1, 2]) + refused(LEFT_OUT),
            "num_frames": no_effect(3, LEFT_OUT),
        },
        more={
            "_class_name": refused("UNet2DConditionModel") + no_effect(LEFT_OUT),
            "mystery": no_effect(1),
        },
        places=(("svd_b", "unet"),),
    ),
    "PixArtTransformer2DModel": Table(
        keys={
            "num_attention_heads": honoured(1, also={"attention_head_dim": 32}, on=("pixart_alpha_a", "pixart_sigma_a"))
            + honoured(1, also={"attention_head_dim": 48}, on=("pixart_alpha_1024",))
            + refused(1, LEFT_OUT),
            "attention_head_dim": refused(8, but={"pixart_sigma_a": "no effect"}) + refused(LEFT_OUT),
            "in_channels": refused(8) + no_effect(LEFT_OUT),
            "out_channels": honoured(4) + refused(6, 12, None) + no_effect(LEFT_OUT),
            "num_layers": honoured(1, LEFT_OUT),
            "dropout": no_effect(0.5, LEFT_OUT),
            "norm_num_groups": no_effect(8, LEFT_OUT),
            "cross_attention_dim": refused(16) + honoured(None) + refused(LEFT_OUT),
            "attention_bias": honoured(False) + no_effect(LEFT_OUT),
            "sample_size": honoured(16, but={"pixart_alpha_1024": "refused"})
            + no_effect(128, but={"pixart_alpha_a": "honoured"})
            + honoured(64, but={"pixart_alpha_1024": "refused", "pixart_sigma_a": "no effect"})
            + no_effect(LEFT_OUT, but={"pixart_alpha_a": "honoured"}),
            "patch_size": honoured(1, 4) + no_effect(LEFT_OUT),
            "activation_fn": honoured("gelu", "geglu") + refused("silu") + no_effect(LEFT_OUT),
            "num_embeds_ada_norm": no_effect(500, LEFT_OUT),
            "upcast_attention": no_effect(True, LEFT_OUT),
            "norm_type": refused("ada_norm_zero") + no_effect(LEFT_OUT),
            "norm_elementwise_affine": honoured(True) + no_effect(LEFT_OUT),
            "norm_eps": honoured(0.01) + no_effect(LEFT_OUT),
            "interpolation_scale": no_effect(2.0, but={"pixart_alpha_a": "honoured"}) + no_effect(LEFT_OUT),
            "use_additional_conditions": refused(True, but={"pixart_alpha_1024": "no effect"})
            + no_effect(False, but={"pixart_alpha_1024": "honoured"})
            + no_effect(None, but={"pixart_sigma_a": "refused"})
            + no_effect(LEFT_OUT, but={"pixart_sigma_a": "refused"}),
            "caption_channels": refused(20)
            + refused(None, but={"pixart_sigma_a": "honoured"})
            + refused(LEFT_OUT, but={"pixart_sigma_a": "honoured"}),
            "attention_type": no_effect("gated", LEFT_OUT),
        },
        more={
            "_class_name": no_effect("Transformer2DModel", LEFT_OUT),
            "mystery": no_effect(1),
        },
        places=(
            ("pixart_alpha_a", "transformer"),
            ("pixart_alpha_1024", "transformer"),
            ("pixart_sigma_a", "transformer"),
        ),
    ),
    "LatteTransformer3DModel": Table(
        keys={
            "num_attention_heads": honoured(1, also={"attention_head_dim": 32}) + refused(1, LEFT_OUT),
            "attention_head_dim": refused(8, LEFT_OUT),
            "in_channels": refused(8, LEFT_OUT),
            "out_channels": refused(4, 6, 12, None, LEFT_OUT),
            "num_layers": honoured(1, 3, LEFT_OUT),
            "dropout": no_effect(0.5, LEFT_OUT),
            "cross_attention_dim": refused(16) + honoured(None, LEFT_OUT),
            "attention_bias": honoured(False, LEFT_OUT),
            "sample_size": honoured(16, 64, LEFT_OUT),
            "patch_size": honoured(1, 4) + refused(LEFT_OUT),
            "activation_fn": honoured("gelu", "geglu") + refused("silu") + honoured(LEFT_OUT),
            "num_embeds_ada_norm": no_effect(500, LEFT_OUT),
            "norm_type": refused("ada_norm_zero") + honoured("layer_norm", LEFT_OUT),
            "norm_elementwise_affine": honoured(True, LEFT_OUT),
            "norm_eps": honoured(0.01),
            "caption_channels": refused(20, None, LEFT_OUT),
            "video_length": refused(5, 2, LEFT_OUT),
        },
        more={
            "_class_name": refused("Transformer2DModel") + no_effect(LEFT_OUT),
            "mystery": no_effect(1),
        },
        places=(("latte_a", "transformer"),),
    ),
    "AutoencoderKL": Table(
        keys={
            "in_channels": refused(4) + no_effect(LEFT_OUT),
            "out_channels": refused(1, 4) + no_effect(LEFT_OUT),
            "down_block_types": no_effect(
                ["DownEncoderBlock2D", "DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"]
            )
            + refused(["DownEncoderBlock2D"], LEFT_OUT, but={"pixart_alpha_a": "no effect", "latte_a": "no effect"}),
            "up_block_types": honoured(
                ["AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"]
            )
            + refused(["UpDecoderBlock2D"], LEFT_OUT),
            "block_out_channels": honoured([8, 8, 8, 16])
            + honoured(
                [8, 8],
                also={
                    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
                    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
                },
            )
            + refused(LEFT_OUT),
            "layers_per_block": honoured(2) + no_effect(LEFT_OUT),
            "act_fn": honoured("relu") + no_effect(LEFT_OUT),
            "latent_channels": refused(8) + no_effect(LEFT_OUT),
            "norm_num_groups": honoured(2) + refused(LEFT_OUT),
            "sample_size": no_effect(128, [64, 64], LEFT_OUT),
            "scaling_factor": honoured(0.5, 1)
            + refused(None)
            + no_effect(LEFT_OUT, but={"conv_projection": "honoured"}),
            "shift_factor": refused(0.3) + no_effect(LEFT_OUT),
            "latents_mean": refused([0.5, -0.5, 0.2, 0.1])
            + refused(
                [0.5, -0.5, 0.2, 0.1], also={"latents_std": [1.5, 0.7, 1.2, 2.0]}, but={"conv_projection": "honoured"}
            )
            + no_effect(LEFT_OUT),
            "latents_std": refused([1.5, 0.7, 1.2, 2.0]) + no_effect(LEFT_OUT),
            "force_upcast": no_effect(False, None, LEFT_OUT),
            "use_quant_conv": no_effect(False, LEFT_OUT),
            "use_post_quant_conv": honoured(False) + no_effect(LEFT_OUT),
            "mid_block_add_attention": honoured(False) + no_effect(LEFT_OUT),
        },
        more={
            "_class_name": refused("AutoencoderTiny") + no_effect(LEFT_OUT),
            "mystery": no_effect(1),
        },
        places=(("sd15_a", "vae"), ("conv_projection", "vae"), ("pixart_alpha_a", "vae"), ("latte_a", "vae")),
    ),
    "AutoencoderKLTemporalDecoder": Table(
        keys={
            "in_channels": refused(4) + no_effect(LEFT_OUT),
            "out_channels": refused(4) + no_effect(LEFT_OUT),
            "down_block_types": honoured(["DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"])
            + refused(LEFT_OUT),
            "block_out_channels": honoured([32, 32, 64])
            + honoured([32, 32], also={"down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"]})
            + refused(LEFT_OUT),
            "layers_per_block": honoured(2) + no_effect(LEFT_OUT),
            "latent_channels": refused(2) + no_effect(LEFT_OUT),
            "sample_size": no_effect(128, LEFT_OUT),
            "scaling_factor": honoured(0.5) + refused(None) + no_effect(LEFT_OUT),
            "force_upcast": no_effect(False, LEFT_OUT),
        },
        more={
            "_class_name": refused("AutoencoderKL") + no_effect(LEFT_OUT),
            "shift_factor": refused(0.3),
            "latents_mean": refused([0.5, -0.5, 0.2, 0.1], also={"latents_std": [1.5, 0.7, 1.2, 2.0]}),
            "mystery": no_effect(1),
        },
        places=(("svd_b", "vae"),),
    ),
    "CLIPTextConfig": Table(
        keys={
            "transformers_version": no_effect("4.20.0", LEFT_OUT),
            "architectures": no_effect(["Other"], LEFT_OUT),
            "output_hidden_states": no_effect(True, LEFT_OUT),
            "return_dict": refused(False) + no_effect(LEFT_OUT),
            "dtype": no_effect("float16", LEFT_OUT),
            "chunk_size_feed_forward": no_effect(2, LEFT_OUT),
            "is_encoder_decoder": no_effect(True, LEFT_OUT),
            "id2label": no_effect({"0": "x"}, LEFT_OUT),
            "label2id": no_effect({"x": 0}, LEFT_OUT),
            "problem_type": no_effect("regression", LEFT_OUT),
            "vocab_size": honoured(600) + refused(300) + honoured(LEFT_OUT),
            "hidden_size": refused(32, but={"conv_projection/text_encoder_2": "no effect"}) + refused(LEFT_OUT),
            "intermediate_size": honoured(20, LEFT_OUT),
            "projection_dim": no_effect(16, but={"conv_projection/text_encoder_2": "refused"})
            + no_effect(LEFT_OUT, but={"conv_projection/text_encoder_2": "refused"}),
            "num_hidden_layers": honoured(1, 3, LEFT_OUT),
            "num_attention_heads": honoured(4, 1, LEFT_OUT),
            "max_position_embeddings": refused(12) + honoured(40, LEFT_OUT),
            "hidden_act": honoured("relu", "silu")
            + honoured("gelu", but={"conv_projection/text_encoder_2": "no effect"})
            + no_effect("quick_gelu", but={"conv_projection/text_encoder_2": "honoured"})
            + no_effect(LEFT_OUT, but={"conv_projection/text_encoder_2": "honoured"}),
            "layer_norm_eps": honoured(0.1) + no_effect(LEFT_OUT),
            "attention_dropout": no_effect(0.5, LEFT_OUT),
            "initializer_range": no_effect(0.5, LEFT_OUT),
            "initializer_factor": no_effect(2.0, LEFT_OUT),
            "pad_token_id": no_effect(0, None, LEFT_OUT),
            "bos_token_id": no_effect(0, LEFT_OUT),
            "eos_token_id": no_effect(2)
            + no_effect(100, but={"conv_projection/text_encoder_2": "honoured"})
            + refused([544, 2], None)
            + no_effect(LEFT_OUT, but={"conv_projection/text_encoder_2": "honoured"}),
        },
        more={
            "_name_or_path": no_effect("x"),
            "output_attentions": no_effect(True),
            "torch_dtype": no_effect("float16"),
            "use_return_dict": refused(False),
            "mystery": no_effect(1),
            "_attn_implementation": no_effect("eager"),
            "attn_implementation": no_effect("eager"),
            "model_type": refused("clip") + no_effect(LEFT_OUT),
            "use_attention_mask": refused(True) + no_effect(False),
            "is_causal": refused(False),
            "is_decoder": no_effect(True),
        },
        places=(("sd15_a", "text_encoder"), ("conv_projection", "text_encoder"), ("conv_projection", "text_encoder_2")),
    ),
    "CLIPVisionConfig": Table(
        keys={
            "transformers_version": no_effect("4.20.0", LEFT_OUT),
            "architectures": no_effect(["Other"], LEFT_OUT),
            "output_hidden_states": no_effect(True, LEFT_OUT),
            "return_dict": refused(False) + no_effect(LEFT_OUT),
            "dtype": no_effect("float16", LEFT_OUT),
            "chunk_size_feed_forward": no_effect(2, LEFT_OUT),
            "is_encoder_decoder": no_effect(True, LEFT_OUT),
            "id2label": no_effect({"0": "x"}, LEFT_OUT),
            "label2id": no_effect({"x": 0}, LEFT_OUT),
            "problem_type": no_effect("regression", LEFT_OUT),
            "hidden_size": honoured(16) + refused(LEFT_OUT),
            "intermediate_size": honoured(20, LEFT_OUT),
            "projection_dim": refused(20, LEFT_OUT),
            "num_hidden_layers": honoured(1, LEFT_OUT),
            "num_attention_heads": honoured(4) + refused(LEFT_OUT),
            "num_channels": refused(4) + no_effect(LEFT_OUT),
            "image_size": refused(112, 448) + no_effect(LEFT_OUT),
            "patch_size": honoured(112, LEFT_OUT),
            "hidden_act": honoured("quick_gelu", "relu", LEFT_OUT),
            "layer_norm_eps": honoured(0.1) + no_effect(LEFT_OUT),
            "attention_dropout": no_effect(0.5, LEFT_OUT),
            "initializer_range": no_effect(0.5, LEFT_OUT),
            "initializer_factor": no_effect(2.0, LEFT_OUT),
        },
        more={
            "_name_or_path": no_effect("x"),
            "output_attentions": no_effect(True),
            "torch_dtype": no_effect("float16"),
            "use_return_dict": refused(False),
            "mystery": no_effect(1),
            "_attn_implementation": no_effect("eager"),
            "attn_implementation": no_effect("eager"),
            "model_type": refused("clip") + no_effect(LEFT_OUT),
        },
        places=(("svd_b", "image_encoder"),),
    ),
    "T5Config": Table(
        keys={
            "transformers_version": no_effect("4.20.0", LEFT_OUT),
            "architectures": no_effect(["Other"], LEFT_OUT),
            "output_hidden_states": no_effect(True, LEFT_OUT),
            "return_dict": refused(False) + no_effect(LEFT_OUT),
            "dtype": no_effect("float16", LEFT_OUT),
            "chunk_size_feed_forward": no_effect(2, LEFT_OUT),
            "is_encoder_decoder": no_effect(True, LEFT_OUT),
            "id2label": no_effect({"0": "x"}, LEFT_OUT),
            "label2id": no_effect({"x": 0}, LEFT_OUT),
            "problem_type": no_effect("regression", LEFT_OUT),
            "vocab_size": honoured(120) + refused(60) + honoured(LEFT_OUT),
            "d_model": refused(16, LEFT_OUT),
            "d_kv": honoured(4, LEFT_OUT),
            "d_ff": honoured(20, LEFT_OUT),
            "num_layers": honoured(1, 3, LEFT_OUT),
            "num_decoder_layers": no_effect(1, LEFT_OUT),
            "num_heads": honoured(1, LEFT_OUT),
            "relative_attention_num_buckets": honoured(16) + no_effect(LEFT_OUT),
            "relative_attention_max_distance": honoured(20) + no_effect(LEFT_OUT),
            "dropout_rate": no_effect(0.5, LEFT_OUT),
            "layer_norm_epsilon": honoured(0.1) + no_effect(LEFT_OUT),
            "initializer_factor": no_effect(2.0, LEFT_OUT),
            "feed_forward_proj": honoured("gated-silu", also={"dense_act_fn": LEFT_OUT, "is_gated_act": LEFT_OUT})
            + honoured("relu", also={"dense_act_fn": LEFT_OUT, "is_gated_act": LEFT_OUT})
            + honoured(LEFT_OUT, also={"dense_act_fn": LEFT_OUT, "is_gated_act": LEFT_OUT})
            + no_effect("relu", "gated-silu", "gelu", LEFT_OUT),
            "use_cache": no_effect(True, LEFT_OUT),
            "pad_token_id": no_effect(5, 1, None, LEFT_OUT),
            "eos_token_id": refused(3) + no_effect(LEFT_OUT),
            "classifier_dropout": no_effect(0.5, LEFT_OUT),
            "is_decoder": honoured(True) + no_effect(LEFT_OUT),
        },
        more={
            "_name_or_path": no_effect("x"),
            "output_attentions": no_effect(True),
            "torch_dtype": no_effect("float16"),
            "use_return_dict": refused(False),
            "mystery": no_effect(1),
            "_attn_implementation": no_effect("eager"),
            "attn_implementation": no_effect("eager"),
            "model_type": refused("mt5") + no_effect(LEFT_OUT),
            "dense_act_fn": honoured("relu") + no_effect(LEFT_OUT),
            "is_gated_act": honoured(False) + no_effect(LEFT_OUT),
            "scale_decoder_outputs": no_effect(True, LEFT_OUT),
            "tie_word_embeddings": no_effect(False, LEFT_OUT),
            "hidden_size": no_effect(24, also={"d_model": LEFT_OUT}),
            "num_attention_heads": no_effect(2, also={"num_heads": LEFT_OUT}),
            "num_hidden_layers": no_effect(2, also={"num_layers": LEFT_OUT}),
        },
        places=(("pixart_alpha_a", "text_encoder"), ("latte_a", "text_encoder")),
    ),
    "CLIPImageProcessor": Table(
        keys={
            "do_convert_rgb": no_effect(False, LEFT_OUT),
            "do_resize": no_effect(False, LEFT_OUT),
            "resample": no_effect(2, LEFT_OUT),
            "do_rescale": no_effect(False, LEFT_OUT),
            "rescale_factor": no_effect(0.1, LEFT_OUT),
            "do_normalize": no_effect(False, LEFT_OUT),
            "do_center_crop": no_effect(False, LEFT_OUT),
            "size": no_effect({"shortest_edge": 112}, LEFT_OUT),
            "crop_size": no_effect({"height": 112, "width": 112}, LEFT_OUT),
            "image_mean": honoured([0.5, 0.5, 0.5]) + no_effect(LEFT_OUT),
            "image_std": honoured([0.5, 0.4, 0.3]) + no_effect(LEFT_OUT),
            "image_processor_type": no_effect("CLIPFeatureExtractor", LEFT_OUT),
        },
        places=(("svd_b", "feature_extractor"),),
    ),
    "CLIPTokenizer": Table(
        keys={
            "model_max_length": refused(12, but={"sd15_a": "honoured"}) + refused(100, 1e30) + not_read(LEFT_OUT),
            "pad_token": honoured("!", but={"conv_projection/tokenizer_2": "no effect"})
            + refused(None)
            + no_effect(LEFT_OUT, but={"conv_projection/tokenizer_2": "honoured"}),
            "unk_token": no_effect("!", LEFT_OUT),
            "eos_token": honoured("!") + no_effect(LEFT_OUT),
            "tokenizer_class": no_effect("CLIPTokenizerFast")
            + refused("PreTrainedTokenizerFast")
            + no_effect(LEFT_OUT),
            "backend": no_effect("custom", LEFT_OUT),
            "bos_token": honoured("!") + no_effect(LEFT_OUT),
        },
        more={
            "padding_side": refused("left"),
            "truncation_side": refused("left", prompt=LONG),
            "added_tokens_decoder": honoured(
                {
                    "65": {
                        "content": "b",
                        "special": True,
                        "lstrip": False,
                        "rstrip": False,
                        "normalized": False,
                        "single_word": False,
                    }
                }
            ),
            "extra_special_tokens": refused(["circle"]) + no_effect(["!"]),
            "additional_special_tokens": refused(["circle"]),
            "split_special_tokens": no_effect(True, but={"sd15_a": "refused"}),
            "add_prefix_space": no_effect(True, False),
            "do_lower_case": no_effect(False),
            "clean_up_tokenization_spaces": no_effect(True),
            "add_bos_token": no_effect(False),
            "add_eos_token": no_effect(False),
            "name_or_path": no_effect("x"),
            "special_tokens_map_file": no_effect("x"),
            "errors": no_effect("strict"),
            "model_input_names": no_effect(["input_ids"]),
            "mystery": no_effect(1),
        },
        places=(("sd15_a", "tokenizer"), ("conv_projection", "tokenizer"), ("conv_projection", "tokenizer_2")),
    ),
    "T5Tokenizer": Table(
        keys={
            "model_max_length": no_effect(12, 100, 1e30, LEFT_OUT),
            "pad_token": honoured("!") + refused(None) + no_effect(LEFT_OUT),
            "unk_token": no_effect("!", LEFT_OUT),
            "eos_token": refused("!") + no_effect(LEFT_OUT),
            "tokenizer_class": refused("CLIPTokenizerFast", "PreTrainedTokenizerFast") + no_effect(LEFT_OUT),
            "backend": no_effect("custom", LEFT_OUT),
            "extra_ids": no_effect(10, LEFT_OUT),
            "extra_special_tokens": refused(["circle"]) + no_effect(["!"], LEFT_OUT),
        },
        more={
            "padding_side": refused("left"),
            "truncation_side": refused("left", prompt=LONG),
            "added_tokens_decoder": honoured(
                {
                    "65": {
                        "content": "b",
                        "special": True,
                        "lstrip": False,
                        "rstrip": False,
                        "normalized": False,
                        "single_word": False,
                    }
                }
            ),
            "additional_special_tokens": refused(["circle"]),
            "split_special_tokens": refused(True),
            "add_prefix_space": no_effect(True, False),
            "do_lower_case": no_effect(False),
            "clean_up_tokenization_spaces": no_effect(True),
            "add_bos_token": no_effect(False),
            "add_eos_token": no_effect(False),
            "name_or_path": no_effect("x"),
            "special_tokens_map_file": no_effect("x"),
            "errors": no_effect("strict"),
            "model_input_names": not_read(["input_ids"], but={"latte_a": "no effect"}),
            "mystery": no_effect(1),
            "legacy": no_effect(True, False),
            "sp_model_kwargs": no_effect({}),
        },
        places=(("pixart_alpha_a", "tokenizer"), ("latte_a", "tokenizer")),
    ),
    "StableDiffusionPipeline": Table(
        keys={
            "_diffusers_version": no_effect("0.5.0", LEFT_OUT),
            "_class_name": refused("KandinskyPipeline", LEFT_OUT),
            "requires_safety_checker": no_effect(True, LEFT_OUT),
            "safety_checker": not_read(["stable_diffusion", "StableDiffusionSafetyChecker"]) + no_effect(LEFT_OUT),
            "feature_extractor": not_read(["transformers", "CLIPImageProcessor"]) + no_effect(LEFT_OUT),
            "image_encoder": no_effect(LEFT_OUT),
            "scheduler": no_effect(["diffusers", "DDIMScheduler"], ["diffusers", "PNDMScheduler"]) + not_read(LEFT_OUT),
            "text_encoder": refused(
                ["transformers", "CLIPTextModelWithProjection"], ["transformers", "T5EncoderModel"], [None, None]
            )
            + not_read(LEFT_OUT),
            "tokenizer": no_effect(["transformers", "CLIPTokenizerFast"])
            + refused(["transformers", "AutoTokenizer"], [None, None])
            + not_read(LEFT_OUT),
            "unet": refused(["diffusers", "UNet2DModel"], ["diffusers", "AutoModel"]) + not_read(LEFT_OUT),
            "vae": refused(["diffusers", "AutoencoderTiny"], ["diffusers", "AsymmetricAutoencoderKL"])
            + not_read(LEFT_OUT),
        },
        more={
            "mystery": no_effect(1),
        },
        places=(("sd15_a", "model_index"),),
    ),
    "StableDiffusionXLPipeline": Table(
        keys={
            "_diffusers_version": no_effect("0.5.0", LEFT_OUT),
            "_class_name": refused("KandinskyPipeline", LEFT_OUT),
            "force_zeros_for_empty_prompt": honoured(True) + no_effect(False, None) + honoured(LEFT_OUT),
            "add_watermarker": no_effect(False),
            "feature_extractor": no_effect(LEFT_OUT),
            "image_encoder": no_effect(LEFT_OUT),
            "scheduler": no_effect(["diffusers", "DDIMScheduler"], ["diffusers", "PNDMScheduler"]) + not_read(LEFT_OUT),
            "text_encoder": refused(["transformers", "CLIPTextModelWithProjection"], [None, None]) + not_read(LEFT_OUT),
            "text_encoder_2": refused(["transformers", "CLIPTextModel"], [None, None]) + not_read(LEFT_OUT),
            "tokenizer": no_effect(["transformers", "CLIPTokenizerFast"]) + refused([None, None]) + not_read(LEFT_OUT),
            "tokenizer_2": not_read(LEFT_OUT),
            "unet": refused(["diffusers", "UNet2DModel"]) + not_read(LEFT_OUT),
            "vae": refused(["diffusers", "AutoencoderTiny"]) + not_read(LEFT_OUT),
        },
        more={
            "mystery": no_effect(1),
        },
        places=(("conv_projection", "model_index"),),
    ),
    "PixArtAlphaPipeline": Table(
        keys={
            "_diffusers_version": no_effect("0.5.0", LEFT_OUT),
            "_class_name": refused("PixArtSigmaPipeline", LEFT_OUT),
            "scheduler": no_effect(["diffusers", "DDIMScheduler"]) + not_read(LEFT_OUT),
            "text_encoder": refused(
                ["transformers", "MT5EncoderModel"], ["transformers", "UMT5EncoderModel"], [None, None]
            )
            + not_read(LEFT_OUT),
            "tokenizer": no_effect(["transformers", "T5TokenizerFast"]) + refused([None, None]) + not_read(LEFT_OUT),
            "transformer": no_effect(["diffusers", "Transformer2DModel"])
            + refused(["diffusers", "AutoModel"])
            + not_read(LEFT_OUT),
            "vae": refused(["diffusers", "AutoencoderTiny"]) + not_read(LEFT_OUT),
        },
        more={
            "mystery": no_effect(1),
        },
        places=(("pixart_alpha_1024", "model_index"),),
    ),
    "PixArtSigmaPipeline": Table(
        keys={
            "_diffusers_version": no_effect("0.5.0", LEFT_OUT),
            "_class_name": honoured("PixArtAlphaPipeline") + refused(LEFT_OUT),
            "scheduler": no_effect(["diffusers", "DDIMScheduler"]) + not_read(LEFT_OUT),
            "text_encoder": refused(
                ["transformers", "MT5EncoderModel"], ["transformers", "UMT5EncoderModel"], [None, None]
            )
            + not_read(LEFT_OUT),
            "tokenizer": no_effect(["transformers", "T5TokenizerFast"]) + refused([None, None]) + not_read(LEFT_OUT),
            "transformer": no_effect(["diffusers", "Transformer2DModel"])
            + refused(["diffusers", "AutoModel"])
            + not_read(LEFT_OUT),
            "vae": refused(["diffusers", "AutoencoderTiny"]) + not_read(LEFT_OUT),
        },
        more={
            "mystery": no_effect(1),
        },
        places=(("pixart_sigma_a", "model_index"),),
    ),
    "LattePipeline": Table(
        keys={
            "_diffusers_version": no_effect("0.5.0", LEFT_OUT),
            "_class_name": refused("PixArtAlphaPipeline", LEFT_OUT),
            "scheduler": no_effect(["diffusers", "DDIMScheduler"]) + not_read(LEFT_OUT),
            "text_encoder": refused(
                ["transformers", "MT5EncoderModel"], ["transformers", "UMT5EncoderModel"], [None, None]
            )
            + not_read(LEFT_OUT),
            "tokenizer": no_effect(["transformers", "T5TokenizerFast"]) + refused([None, None]) + not_read(LEFT_OUT),
            "transformer": refused(["diffusers", "Transformer2DModel"], ["diffusers", "AutoModel"])
            + not_read(LEFT_OUT),
            "vae": refused(["diffusers", "AutoencoderTiny"]) + not_read(LEFT_OUT),
        },
        more={
            "mystery": no_effect(1),
        },
        places=(("latte_a", "model_index"),),
    ),
    "StableVideoDiffusionPipeline": Table(
        keys={
            "_diffusers_version": no_effect("0.5.0", LEFT_OUT),
            "_class_name": refused("KandinskyPipeline", LEFT_OUT),
            "scheduler": no_effect(["diffusers", "DDIMScheduler"]) + not_read(LEFT_OUT),
            "image_encoder": refused(["transformers", "CLIPVisionModel"]) + not_read(LEFT_OUT),
            "feature_extractor": no_effect(["transformers", "CLIPFeatureExtractor"])
            + refused([None, None])
            + not_read(LEFT_OUT),
            "unet": refused(["diffusers", "UNet2DConditionModel"]) + not_read(LEFT_OUT),
            "vae": refused(["diffusers", "AutoencoderKL"]) + not_read(LEFT_OUT),
        },
        more={
            "mystery": no_effect(1),
        },
        places=(("svd_b", "model_index"),),
    ),
    "DDIMScheduler": Table(
        keys={
            "num_train_timesteps": honoured(500) + no_effect(LEFT_OUT),
            "beta_start": honoured(0.001, LEFT_OUT),
            "beta_end": honoured(0.015, LEFT_OUT),
            "beta_schedule": honoured("linear", "squaredcos_cap_v2", LEFT_OUT),
            "trained_betas": honoured(BETAS) + no_effect(LEFT_OUT),
            "clip_sample": refused(True, but={"sd15_a": "no effect"}) + no_effect(LEFT_OUT),
            "set_alpha_to_one": honoured(False) + no_effect(True, LEFT_OUT),
            "steps_offset": no_effect(1)
            + honoured(0, but={"sd15_a": "no effect"})
            + honoured(2, but={"sd15_a": "no effect"})
            + honoured(LEFT_OUT, but={"sd15_a": "no effect"}),
            "prediction_type": honoured("v_prediction", "sample") + refused("flow_prediction") + no_effect(LEFT_OUT),
            "thresholding": refused(True) + no_effect(LEFT_OUT),
            "dynamic_thresholding_ratio": no_effect(0.5, LEFT_OUT),
            "clip_sample_range": no_effect(0.5, LEFT_OUT),
            "sample_max_value": no_effect(2.0, LEFT_OUT),
            "timestep_spacing": no_effect("leading") + honoured("trailing", "linspace") + no_effect(LEFT_OUT),
            "rescale_betas_zero_snr": honoured(True) + no_effect(LEFT_OUT),
        },
        more={
            "_class_name": no_effect("DDPMScheduler", "FlowMatchEulerDiscreteScheduler", LEFT_OUT),
            "mystery": no_effect(1),
        },
        places=(("conv_projection", "scheduler"), ("sd15_a", "scheduler")),
        sampler="ddim",
    ),
    "EulerDiscreteScheduler": Table(
        keys={
            "num_train_timesteps": honoured(500) + no_effect(LEFT_OUT),
            "beta_start": honoured(0.001, LEFT_OUT),
            "beta_end": honoured(0.015, LEFT_OUT),
            "beta_schedule": honoured("linear", "squaredcos_cap_v2", LEFT_OUT),
            "trained_betas": honoured(BETAS) + no_effect(LEFT_OUT),
            "prediction_type": honoured("v_prediction", "sample") + refused("flow_prediction") + no_effect(LEFT_OUT),
            "interpolation_type": honoured("log_linear") + no_effect(LEFT_OUT),
            "use_karras_sigmas": honoured(True) + no_effect(LEFT_OUT),
            "use_exponential_sigmas": honoured(True) + no_effect(LEFT_OUT),
            "use_beta_sigmas": honoured(True) + no_effect(LEFT_OUT),
            "sigma_min": no_effect(0.1, LEFT_OUT),
            "sigma_max": no_effect(10.0, LEFT_OUT),
            "timestep_spacing": honoured("leading", "trailing") + no_effect("linspace", LEFT_OUT),
            "timestep_type": no_effect("continuous", LEFT_OUT),
            "steps_offset": no_effect(1, 0, 2, LEFT_OUT),
            "rescale_betas_zero_snr": honoured(True) + no_effect(LEFT_OUT),
            "final_sigmas_type": honoured("sigma_min") + no_effect(LEFT_OUT),
        },
        more={
            "_class_name": no_effect("DDPMScheduler", "FlowMatchEulerDiscreteScheduler", LEFT_OUT),
            "mystery": no_effect(1),
        },
        places=(("conv_projection", "scheduler"), ("sd15_a", "scheduler")),
        sampler="euler",
    ),
    "DPMSolverMultistepScheduler": Table(
        keys={
            "num_train_timesteps": honoured(500) + no_effect(LEFT_OUT),
            "beta_start": honoured(0.001, LEFT_OUT),
            "beta_end": honoured(0.015, LEFT_OUT),
            "beta_schedule": honoured("linear", "squaredcos_cap_v2", LEFT_OUT),
            "trained_betas": honoured(BETAS) + no_effect(LEFT_OUT),
            "solver_order": no_effect(1, 3, LEFT_OUT),
            "prediction_type": honoured("v_prediction", "sample", "flow_prediction") + no_effect(LEFT_OUT),
            "thresholding": refused(True) + no_effect(LEFT_OUT),
            "dynamic_thresholding_ratio": no_effect(0.5, LEFT_OUT),
            "sample_max_value": no_effect(2.0, LEFT_OUT),
            "algorithm_type": refused("dpmsolver")
            + no_effect("dpmsolver++", "sde-dpmsolver++")
            + refused("deis")
            + no_effect(LEFT_OUT),
            "solver_type": honoured("heun") + no_effect("midpoint", "bh1", "bh2", "logrho", LEFT_OUT),
            "lower_order_final": no_effect(False, LEFT_OUT),
            "euler_at_final": no_effect(True, LEFT_OUT),
            "use_karras_sigmas": no_effect(True, LEFT_OUT),
            "use_exponential_sigmas": honoured(True) + no_effect(LEFT_OUT),
            "use_beta_sigmas": honoured(True) + no_effect(LEFT_OUT),
            "use_lu_lambdas": honoured(True) + no_effect(LEFT_OUT),
            "use_flow_sigmas": honoured(True, also={"prediction_type": "flow_prediction"})
            + honoured(True)
            + no_effect(LEFT_OUT),
            "flow_shift": no_effect(3.0)
            + honoured(3.0, also={"use_flow_sigmas": True, "prediction_type": "flow_prediction"})
            + no_effect(LEFT_OUT),
            "final_sigmas_type": honoured("sigma_min") + no_effect(LEFT_OUT),
            "lambda_min_clipped": no_effect(-5.1, LEFT_OUT),
            "variance_type": refused("learned_range") + no_effect("fixed_small", LEFT_OUT),
            "timestep_spacing": honoured("leading", "trailing") + no_effect("linspace", LEFT_OUT),
            "steps_offset": no_effect(1, 0, 2, LEFT_OUT),
            "rescale_betas_zero_snr": honoured(True) + no_effect(LEFT_OUT),
            "use_dynamic_shifting": no_effect(True, LEFT_OUT),
            "time_shift_type": no_effect("linear", LEFT_OUT),
        },
        more={
            "_class_name": no_effect("DDPMScheduler", "FlowMatchEulerDiscreteScheduler", LEFT_OUT),
            "mystery": no_effect(1),
        },
        places=(("conv_projection", "scheduler"), ("sd15_a", "scheduler")),
        sampler="dpmpp_2m",
    ),
    "UniPCMultistepScheduler": Table(
        keys={
            "num_train_timesteps": honoured(500) + no_effect(LEFT_OUT),
            "beta_start": honoured(0.001, LEFT_OUT),
            "beta_end": honoured(0.015, LEFT_OUT),
            "beta_schedule": honoured("linear", "squaredcos_cap_v2", LEFT_OUT),
            "trained_betas": honoured(BETAS) + no_effect(LEFT_OUT),
            "solver_order": honoured(1) + no_effect(3, LEFT_OUT),
            "prediction_type": honoured("v_prediction", "sample", "flow_prediction") + no_effect(LEFT_OUT),
            "thresholding": refused(True) + no_effect(LEFT_OUT),
            "dynamic_thresholding_ratio": no_effect(0.5, LEFT_OUT),
            "sample_max_value": no_effect(2.0, LEFT_OUT),
            "predict_x0": refused(False) + no_effect(LEFT_OUT),
            "solver_type": no_effect("heun", "midpoint") + refused("bh1") + no_effect("bh2", "logrho", LEFT_OUT),
            "lower_order_final": refused(False) + no_effect(LEFT_OUT),
            "disable_corrector": honoured([0]) + no_effect(LEFT_OUT),
            "solver_p": no_effect(None, LEFT_OUT),
            "use_karras_sigmas": honoured(True) + no_effect(LEFT_OUT),
            "use_exponential_sigmas": honoured(True) + no_effect(LEFT_OUT),
            "use_beta_sigmas": honoured(True) + no_effect(LEFT_OUT),
            "use_flow_sigmas": honoured(True, also={"prediction_type": "flow_prediction"})
            + honoured(True)
            + no_effect(LEFT_OUT),
            "flow_shift": no_effect(3.0)
            + honoured(3.0, also={"use_flow_sigmas": True, "prediction_type": "flow_prediction"})
            + no_effect(LEFT_OUT),
            "timestep_spacing": honoured("leading", "trailing") + no_effect("linspace", LEFT_OUT),
            "steps_offset": no_effect(1, 0, 2, LEFT_OUT),
            "final_sigmas_type": honoured("sigma_min") + no_effect(LEFT_OUT),
            "rescale_betas_zero_snr": honoured(True) + no_effect(LEFT_OUT),
            "use_dynamic_shifting": refused(True) + no_effect(LEFT_OUT),
            "time_shift_type": no_effect("linear", LEFT_OUT),
            "sigma_min": no_effect(0.1, LEFT_OUT),
            "sigma_max": no_effect(10.0, LEFT_OUT),
            "shift_terminal": refused(0.1) + no_effect(LEFT_OUT),
        },
        more={
            "_class_name": no_effect("DDPMScheduler", "FlowMatchEulerDiscreteScheduler", LEFT_OUT),
            "mystery": no_effect(1),
        },
        places=(("conv_projection", "scheduler"), ("sd15_a", "scheduler")),
        sampler="unipc",
    ),
    "PNDMScheduler": Table(
        keys={
            "num_train_timesteps": honoured(500) + no_effect(LEFT_OUT),
            "beta_start": honoured(0.001, LEFT_OUT),
            "beta_end": honoured(0.015, LEFT_OUT),
            "beta_schedule": honoured("linear", "squaredcos_cap_v2", LEFT_OUT),
            "trained_betas": honoured(BETAS) + no_effect(LEFT_OUT),
            "skip_prk_steps": no_effect(False, True, LEFT_OUT),
            "set_alpha_to_one": no_effect(False) + honoured(True) + no_effect(LEFT_OUT),
            "prediction_type": honoured("v_prediction") + refused("sample", "flow_prediction") + no_effect(LEFT_OUT),
            "timestep_spacing": no_effect("leading") + honoured("trailing", "linspace") + no_effect(LEFT_OUT),
            "steps_offset": no_effect(1)
            + honoured(0, but={"sd15_a": "no effect"})
            + honoured(2, but={"sd15_a": "no effect"})
            + honoured(LEFT_OUT, but={"sd15_a": "no effect"}),
        },
        more={
            "_class_name": no_effect("DDPMScheduler", "FlowMatchEulerDiscreteScheduler", LEFT_OUT),
            "mystery": no_effect(1),
        },
        places=(("conv_projection", "scheduler"), ("sd15_a", "scheduler")),
        sampler="pndm",
    ),
    "LMSDiscreteScheduler": Table(
        keys={
            "num_train_timesteps": honoured(500) + no_effect(LEFT_OUT),
            "beta_start": honoured(0.001, LEFT_OUT),
            "beta_end": honoured(0.015, LEFT_OUT),
            "beta_schedule": honoured("linear", "squaredcos_cap_v2", LEFT_OUT),
            "trained_betas": honoured(BETAS) + no_effect(LEFT_OUT),
            "use_karras_sigmas": honoured(True) + no_effect(LEFT_OUT),
            "use_exponential_sigmas": honoured(True) + no_effect(LEFT_OUT),
            "use_beta_sigmas": honoured(True) + no_effect(LEFT_OUT),
            "prediction_type": honoured("v_prediction", "sample") + refused("flow_prediction") + no_effect(LEFT_OUT),
            "timestep_spacing": honoured("leading", "trailing") + no_effect("linspace", LEFT_OUT),
            "steps_offset": no_effect(1, 0, 2, LEFT_OUT),
        },
        more={
            "_class_name": no_effect("DDPMScheduler", "FlowMatchEulerDiscreteScheduler", LEFT_OUT),
            "mystery": no_effect(1),
        },
        places=(("conv_projection", "scheduler"), ("sd15_a", "scheduler")),
        sampler="lms",
    ),
    "LCMScheduler": Table(
        keys={
            "num_train_timesteps": honoured(500) + no_effect(LEFT_OUT),
            "beta_start": honoured(0.001) + no_effect(LEFT_OUT),
            "beta_end": honoured(0.015) + no_effect(LEFT_OUT),
            "beta_schedule": honoured("linear", "squaredcos_cap_v2") + no_effect(LEFT_OUT),
            "trained_betas": honoured(BETAS) + no_effect(LEFT_OUT),
            "original_inference_steps": honoured(100) + no_effect(LEFT_OUT),
            "clip_sample": refused(True, but={"sd15_a": "no effect"}) + no_effect(LEFT_OUT),
            "clip_sample_range": no_effect(0.5, LEFT_OUT),
            "set_alpha_to_one": no_effect(False, True, LEFT_OUT),
            "steps_offset": no_effect(1, 0, 2, LEFT_OUT),
            "prediction_type": honoured("v_prediction", "sample") + refused("flow_prediction") + no_effect(LEFT_OUT),
            "thresholding": refused(True) + no_effect(LEFT_OUT),
            "dynamic_thresholding_ratio": no_effect(0.5, LEFT_OUT),
            "sample_max_value": no_effect(2.0, LEFT_OUT),
            "timestep_spacing": no_effect("leading", "trailing", "linspace", LEFT_OUT),
            "timestep_scaling": no_effect(5.0, LEFT_OUT),
            "rescale_betas_zero_snr": refused(True) + no_effect(LEFT_OUT),
        },
        more={
            "_class_name": no_effect("DDPMScheduler", "FlowMatchEulerDiscreteScheduler", LEFT_OUT),
            "mystery": no_effect(1),
        },
        places=(("conv_projection", "scheduler"), ("sd15_a", "scheduler")),
        sampler="lcm",
    ),
    "EulerAncestralDiscreteScheduler": Table(
        keys={
            "num_train_timesteps": honoured(500) + no_effect(LEFT_OUT),
            "beta_start": honoured(0.001, LEFT_OUT),
            "beta_end": honoured(0.015, LEFT_OUT),
            "beta_schedule": honoured("linear", "squaredcos_cap_v2", LEFT_OUT),
            "trained_betas": honoured(BETAS) + no_effect(LEFT_OUT),
            "prediction_type": honoured("v_prediction") + refused("sample", "flow_prediction") + no_effect(LEFT_OUT),
            "timestep_spacing": honoured("leading", "trailing") + no_effect("linspace", LEFT_OUT),
            "steps_offset": no_effect(1, 0, 2, LEFT_OUT),
            "rescale_betas_zero_snr": honoured(True) + no_effect(LEFT_OUT),
        },
        more={
            "_class_name": no_effect("DDPMScheduler", "FlowMatchEulerDiscreteScheduler", LEFT_OUT),
            "mystery": no_effect(1),
        },
        places=(("conv_projection", "scheduler"), ("sd15_a", "scheduler")),
        sampler="euler_a",
    ),
    "DEISMultistepScheduler": Table(
        keys={
            "num_train_timesteps": honoured(500) + no_effect(LEFT_OUT),
            "beta_start": honoured(0.001, LEFT_OUT),
            "beta_end": honoured(0.015, LEFT_OUT),
            "beta_schedule": honoured("linear", "squaredcos_cap_v2", LEFT_OUT),
            "trained_betas": honoured(BETAS) + no_effect(LEFT_OUT),
            "solver_order": honoured(1) + no_effect(3, LEFT_OUT),
            "prediction_type": honoured("v_prediction", "sample", "flow_prediction") + no_effect(LEFT_OUT),
            "thresholding": refused(True) + no_effect(LEFT_OUT),
            "dynamic_thresholding_ratio": no_effect(0.5, LEFT_OUT),
            "sample_max_value": no_effect(2.0, LEFT_OUT),
            "algorithm_type": no_effect("dpmsolver", "dpmsolver++")
            + refused("sde-dpmsolver++")
            + no_effect("deis", LEFT_OUT),
            "solver_type": no_effect("heun", "midpoint", "bh1", "bh2", "logrho", LEFT_OUT),
            "lower_order_final": honoured(False) + no_effect(LEFT_OUT),
            "use_karras_sigmas": honoured(True) + no_effect(LEFT_OUT),
            "use_exponential_sigmas": honoured(True) + no_effect(LEFT_OUT),
            "use_beta_sigmas": honoured(True) + no_effect(LEFT_OUT),
            "use_flow_sigmas": honoured(True, also={"prediction_type": "flow_prediction"})
            + honoured(True)
            + no_effect(LEFT_OUT),
            "flow_shift": no_effect(3.0)
            + honoured(3.0, also={"use_flow_sigmas": True, "prediction_type": "flow_prediction"})
            + no_effect(LEFT_OUT),
            "timestep_spacing": honoured("leading", "trailing") + no_effect("linspace", LEFT_OUT),
            "steps_offset": no_effect(1, 0, 2, LEFT_OUT),
            "use_dynamic_shifting": no_effect(True, LEFT_OUT),
            "time_shift_type": no_effect("linear", LEFT_OUT),
        },
        more={
            "_class_name": no_effect("DDPMScheduler", "FlowMatchEulerDiscreteScheduler", LEFT_OUT),
            "mystery": no_effect(1),
        },
        places=(("conv_projection", "scheduler"), ("sd15_a", "scheduler")),
        sampler="deis",
    ),
    "EDMEulerScheduler": Table(
        keys={
            "sigma_min": honoured(0.1) + no_effect(LEFT_OUT),
            "sigma_max": honoured(10.0) + no_effect(LEFT_OUT),
            "sigma_data": honoured(1.0) + no_effect(LEFT_OUT),
            "sigma_schedule": honoured("exponential") + no_effect(LEFT_OUT),
            "num_train_timesteps": no_effect(500, LEFT_OUT),
            "prediction_type": honoured("v_prediction") + refused("sample", "flow_prediction") + no_effect(LEFT_OUT),
            "rho": honoured(5.0) + no_effect(LEFT_OUT),
            "final_sigmas_type": honoured("sigma_min") + no_effect(LEFT_OUT),
        },
        more={
            "_class_name": no_effect("DDPMScheduler", "FlowMatchEulerDiscreteScheduler", LEFT_OUT),
            "mystery": no_effect(1),
        },
        places=(("conv_projection", "scheduler"), ("sd15_a", "scheduler")),
        sampler="euler",
    ),
    "EDMDPMSolverMultistepScheduler": Table(
        keys={
            "sigma_min": honoured(0.1) + no_effect(LEFT_OUT),
            "sigma_max": honoured(10.0) + no_effect(LEFT_OUT),
            "sigma_data": honoured(1.0) + no_effect(LEFT_OUT),
            "sigma_schedule": honoured("exponential") + no_effect(LEFT_OUT),
            "num_train_timesteps": no_effect(500, LEFT_OUT),
            "prediction_type": honoured("v_prediction") + refused("sample", "flow_prediction") + no_effect(LEFT_OUT),
            "rho": honoured(5.0) + no_effect(LEFT_OUT),
            "solver_order": no_effect(1, 3, LEFT_OUT),
            "thresholding": refused(True) + no_effect(LEFT_OUT),
            "dynamic_thresholding_ratio": no_effect(0.5, LEFT_OUT),
            "sample_max_value": no_effect(2.0, LEFT_OUT),
            "algorithm_type": refused("dpmsolver")
            + no_effect("dpmsolver++", "sde-dpmsolver++")
            + refused("deis")
            + no_effect(LEFT_OUT),
            "solver_type": honoured("heun") + no_effect("midpoint", "bh1", "bh2", "logrho", LEFT_OUT),
            "lower_order_final": no_effect(False, LEFT_OUT),
            "euler_at_final": no_effect(True, LEFT_OUT),
            "final_sigmas_type": honoured("sigma_min") + no_effect(LEFT_OUT),
        },
        more={
            "_class_name": no_effect("DDPMScheduler", "FlowMatchEulerDiscreteScheduler", LEFT_OUT),
            "mystery": no_effect(1),
        },
        places=(("conv_projection", "scheduler"), ("sd15_a", "scheduler")),
        sampler="dpmpp_2m",
    ),
}


def _cases() -> Iterator[Case]:
    for cls, table in TABLES.items():
        keys = {**table.keys, **table.more}
        for variant, component in table.places:
            first = (variant, component) == table.places[0] and cls not in LONG_RUNS
            same: dict[str, Any] = {"cls": cls, "variant": variant, "component": component, "sampler": table.sampler}
            changed: dict[str, Any] = {}
            left_out: dict[str, Any] = {}
            for key, tries in keys.items():
                if variant == "lcm_sdxl" and key not in ("time_cond_proj_dim", "sample_size"):
                    continue  # otherwise as SDXL
                if (variant, component) == ("sd15_a", "scheduler") and key not in PATCHED:
                    continue  # otherwise as SDXL's
                alone = False
                for attempt in tries:
                    if attempt.on and variant not in attempt.on:
                        continue
                    verdict = attempt.but.get(variant) or attempt.but.get(f"{variant}/{component}") or attempt.verdict
                    simple = not (attempt.also or attempt.prompt or attempt.on or key in BY_ITSELF)
                    if verdict == "no effect" and simple:
                        (left_out if attempt.value is LEFT_OUT else changed).setdefault(key, attempt.value)
                    more = "".join(f",{name}={value!r}" for name, value in attempt.also.items())
                    yield Case(
                        name=f"{key}={attempt.value!r}{more}",
                        changes={key: attempt.value, **attempt.also},
                        verdict=verdict,
                        prompt=attempt.prompt,
                        slow=not first
                        or alone
                        or verdict == "no effect"
                        or (variant in ("svd_b", "latte_a") and verdict == "honoured"),
                        **same,
                    )
                    alone = alone or verdict != "no effect"
            for name, changes in (("changed", changed), ("left out", left_out)):
                if len(changes) > 1:
                    what = f"{len(changes)} keys {name}"
                    yield Case(name=what, changes=changes, verdict="no effect", slow=not first, **same)


CASES: tuple[Case, ...] = tuple(_cases())
