"""Small random-weight checkpoints of the flow-matching families, in diffusers' layout.

Weights are drawn with unit gain (``tests/shrunken.py``), so that attention and what conditions it decide the result.
Their text encoders and tokenizers are of the published kinds, a few hundred thousand parameters each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from PIL import Image

from tests.draw import draw
from tests.tiny_encoders import bert, chatglm, clip, clip_vision, clip_with_projection, gemma, qwen, t5, umt5

Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class TinyFlow:
    """One variant: ``model`` is the name for ``--model``, ``latents`` the shape of one result's, ``pixels`` those of a
    latent pixel, ``frames`` those of a video. ``network``, ``vae``, ``encoder``: arguments of those classes.
    ``boundary``: the share of the noise below which a second network runs. ``sees``: pixels a side that CLIP is shown,
    0 where it is shown nothing."""

    model: str
    pipeline: str
    latents: Shape
    pixels: int
    text_width: int
    network: Mapping[str, Any]
    vae: Mapping[str, Any]
    scheduler: Callable[[], Any]
    frames: int = 1
    encoder: Mapping[str, Any] = field(default_factory=dict)
    boundary: float | None = None
    sees: int = 0


def _sana(heads: int, head_width: int, cross_heads: int, **more: Any) -> dict[str, Any]:
    width = heads * head_width
    return {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": heads,
        "attention_head_dim": head_width,
        "num_cross_attention_heads": cross_heads,
        "cross_attention_head_dim": width // cross_heads,
        "cross_attention_dim": width,
        "num_layers": 2,
        "sample_size": 16,
        **more,
    }


def _dc_ae(channels: Shape, blocks: tuple[str, ...], layers: Shape, upsample: str) -> dict[str, Any]:
    scales = tuple((5,) if block == "EfficientViTBlock" else () for block in blocks)
    halves: dict[str, Any] = {}
    for half in ("encoder", "decoder"):
        halves[f"{half}_block_types"] = blocks
        halves[f"{half}_block_out_channels"] = channels
        halves[f"{half}_layers_per_block"] = layers
        halves[f"{half}_qkv_multiscales"] = scales
    return {**halves, "latent_channels": 8, "attention_head_dim": 8, "scaling_factor": 0.7} | {
        "upsample_block_type": upsample,
        "downsample_block_type": "conv" if upsample == "interpolate" else "pixel_unshuffle",
    }


def _qwen(heads: int, axes: Shape, text_width: int, **more: Any) -> dict[str, Any]:
    return {
        "in_channels": 16,
        "out_channels": 4,
        "num_attention_heads": heads,
        "attention_head_dim": sum(axes),
        "axes_dims_rope": axes,
        "joint_attention_dim": text_width,
        "num_layers": 2,
        **more,
    }


def _qwen_vae(levels: Shape, halves_time: tuple[bool, ...], **more: Any) -> dict[str, Any]:
    vae = _wan_vae(levels, halves_time)
    return {key: value for key, value in vae.items() if not key.startswith("scale_factor")} | more


def _qwen_flow() -> Any:
    """As published with Qwen-Image, but for the length that shifts are told by."""
    return diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=8, max_image_seq_len=64, max_shift=0.9, shift_terminal=0.02
    )


def _flux(heads: int, axes: Shape, widths: tuple[int, int], **more: Any) -> dict[str, Any]:
    return {
        "in_channels": 16,
        "num_attention_heads": heads,
        "attention_head_dim": sum(axes),
        "axes_dims_rope": axes,
        "joint_attention_dim": widths[0],
        "pooled_projection_dim": widths[1],
        "num_layers": 1,
        "num_single_layers": 1,
        "guidance_embeds": True,
        **more,
    }


def _wan(heads: int, head_width: int, text_width: int, **more: Any) -> dict[str, Any]:
    return {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": heads,
        "attention_head_dim": head_width,
        "text_dim": text_width,
        "freq_dim": 16,
        "ffn_dim": 3 * heads * head_width,
        "num_layers": 2,
        "rope_max_seq_len": 16,
        **more,
    }


def _wan_vae(levels: Shape, halves_time: tuple[bool, ...]) -> dict[str, Any]:
    return {
        "base_dim": 8,
        "z_dim": 4,
        "dim_mult": list(levels),
        "num_res_blocks": 1,
        "temperal_downsample": list(halves_time),
        "latents_mean": [0.2, -0.3, 0.1, 0.5],
        "latents_std": [1.5, 0.8, 1.1, 2.0],
        "scale_factor_spatial": 2 ** len(halves_time),
        "scale_factor_temporal": 2 ** sum(halves_time),
    }


def _hunyuan(heads: int, head_width: int, widths: tuple[int, int], **more: Any) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "attention_head_dim": head_width,
        "hidden_size": heads * head_width,
        "in_channels": 4,
        "patch_size": 2,
        "sample_size": 16,
        "num_layers": 4,
        "cross_attention_dim": widths[0],
        "cross_attention_dim_t5": widths[1],
        "pooled_projection_dim": 16,
        "use_style_cond_and_image_meta_size": False,
        **more,
    }


def _ddpm() -> Any:
    """As published with HunyuanDiT, which predicts velocity; its pipeline is asked for another sampler."""
    return diffusers.DDPMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.018,
        prediction_type="v_prediction",
        clip_sample=False,
        steps_offset=1,
    )


def _lumina(heads: int, head_width: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": heads * head_width,
        "num_attention_heads": heads,
        "num_layers": 2,
        "multiple_of": 16,
        "sample_size": 16,
        **more,
    }


def _cosmos(heads: int, head_width: int, **more: Any) -> dict[str, Any]:
    return {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": heads,
        "attention_head_dim": head_width,
        "num_layers": 2,
        "adaln_lora_dim": 8,
        "max_size": (16, 24, 24),
        "rope_scale": (1.0, 4.0, 4.0),
        "extra_pos_embed_type": None,
        **more,
    }


def _kolors(channels: Shape, blocks: tuple[str, ...], heads: Shape, text_width: int, **more: Any) -> dict[str, Any]:
    return {
        "block_out_channels": channels,
        "down_block_types": blocks,
        "up_block_types": tuple(name.replace("Down", "Up") for name in reversed(blocks)),
        "layers_per_block": 1,
        "attention_head_dim": heads,
        "norm_num_groups": 8,
        "sample_size": 16,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + text_width,
        **more,
    }


def _euler() -> Any:
    """As published with Kolors."""
    return diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.014,
        num_train_timesteps=1100,
        steps_offset=1,
        timestep_spacing="leading",
    )


def _flow_unipc(shift: float = 3.0) -> Any:
    """As published with Wan."""
    return diffusers.UniPCMultistepScheduler(
        beta_schedule="linear", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )


def _flow_dpm() -> Any:
    """As published with Sana."""
    return diffusers.DPMSolverMultistepScheduler(
        beta_schedule="linear", prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


def _sd3(heads: int, head_width: int, text_width: int, **more: Any) -> dict[str, Any]:
    return {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": heads,
        "attention_head_dim": head_width,
        "caption_projection_dim": heads * head_width,
        "joint_attention_dim": text_width,
        "pooled_projection_dim": 24,
        "num_layers": 2,
        "sample_size": 16,
        "pos_embed_max_size": 12,
        **more,
    }


def _kl(levels: int) -> dict[str, Any]:
    """As Stable Diffusion 3's: no convolutions between the halves, and latents that are shifted."""
    return {
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "block_out_channels": (8,) * levels,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "scaling_factor": 1.5305,
        "shift_factor": 0.0609,
        "use_quant_conv": False,
        "use_post_quant_conv": False,
    }


def _ltx(heads: int, head_width: int, text_width: int, channels: int, **more: Any) -> dict[str, Any]:
    return {
        "in_channels": channels,
        "out_channels": channels,
        "num_attention_heads": heads,
        "attention_head_dim": head_width,
        "cross_attention_dim": heads * head_width,
        "caption_channels": text_width,
        "num_layers": 2,
        **more,
    }


def _ltx_vae(channels: int, levels: Shape, scaling: tuple[bool, ...], **more: Any) -> dict[str, Any]:
    return {
        "latent_channels": channels,
        "block_out_channels": (8, 8, 16, 16),
        "layers_per_block": (1, 1, 1, 1, 1),
        "decoder_block_out_channels": levels,
        "decoder_layers_per_block": (1,) * (len(levels) + 1),
        "decoder_spatio_temporal_scaling": scaling,
        "decoder_inject_noise": (False,) * (len(levels) + 1),
        "upsample_residual": (False,) * len(levels),
        "upsample_factor": (1,) * len(levels),
        **more,
    }


def _flow_euler() -> Any:
    """As published with LTX-Video."""
    return diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )


_RES, _VIT = "ResBlock", "EfficientViTBlock"
_PLAIN, _CROSS = "DownBlock2D", "CrossAttnDownBlock2D"

FLOW_VARIANTS: Mapping[str, TinyFlow] = {
    "sana_a": TinyFlow(
        model="sana-1.6b",
        pipeline="SanaPipeline",
        latents=(8, 8, 16),
        pixels=4,
        text_width=16,
        network=_sana(4, 8, 2),
        vae=_dc_ae((16, 16, 32), (_RES, _RES, _VIT), (1, 1, 1), "interpolate"),
        scheduler=_flow_dpm,
    ),
    # As Sana 1.5, whose queries and keys are normalised, and with all that a configuration may have besides.
    "sana_b": TinyFlow(
        model="sana-1.6b-512",
        pipeline="SanaPipeline",
        latents=(8, 8, 4),
        pixels=8,
        text_width=24,
        network=_sana(
            3,
            8,
            3,
            out_channels=16,
            patch_size=2,
            qk_norm="rms_norm_across_heads",
            interpolation_scale=1.0,
            timestep_scale=0.5,
            attention_bias=True,
            norm_elementwise_affine=True,
        ),
        vae=_dc_ae((16, 16, 16, 32), (_RES, _VIT, _RES, _VIT), (0, 1, 1, 1), "pixel_shuffle"),
        scheduler=_flow_dpm,
    ),
    # Sana-Sprint takes the guidance scale, and its noise is an angle.
    "sprint_a": TinyFlow(
        model="sana-sprint-1.6b",
        pipeline="SanaSprintPipeline",
        latents=(8, 8, 16),
        pixels=4,
        text_width=16,
        network=_sana(4, 8, 2, guidance_embeds=True, qk_norm="rms_norm_across_heads"),
        vae=_dc_ae((16, 16, 32), (_RES, _RES, _VIT), (1, 1, 1), "interpolate"),
        scheduler=diffusers.SCMScheduler,
    ),
    "sprint_b": TinyFlow(
        model="sana-sprint-0.6b",
        pipeline="SanaSprintPipeline",
        latents=(8, 8, 4),
        pixels=8,
        text_width=24,
        network=_sana(
            3,
            8,
            3,
            guidance_embeds=True,
            guidance_embeds_scale=0.3,
            patch_size=2,
            interpolation_scale=1.0,
            timestep_scale=0.5,
            attention_bias=True,
            num_layers=3,
        ),
        vae=_dc_ae((16, 16, 16, 32), (_RES, _VIT, _RES, _VIT), (0, 1, 1, 1), "pixel_shuffle"),
        scheduler=lambda: diffusers.SCMScheduler(sigma_data=0.8),
    ),
    "sd3_a": TinyFlow(
        model="sd3-medium",
        pipeline="StableDiffusion3Pipeline",
        latents=(4, 8, 12),
        pixels=8,
        text_width=40,
        network=_sd3(2, 8, 40),
        vae=_kl(4),
        scheduler=lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    ),
    # As 3.5: queries and keys normalised, and a second attention beside the joint one.
    "sd3_b": TinyFlow(
        model="sd35-medium",
        pipeline="StableDiffusion3Pipeline",
        latents=(4, 12, 8),
        pixels=4,
        text_width=48,
        network=_sd3(3, 8, 48, qk_norm="rms_norm", dual_attention_layers=(0,), num_layers=3),
        vae=_kl(3),
        scheduler=lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_image_seq_len=8),
    ),
    "lumina_a": TinyFlow(
        model="lumina-next",
        pipeline="LuminaPipeline",
        latents=(4, 8, 12),
        pixels=8,
        text_width=16,
        network=_lumina(4, 12, num_kv_heads=2),
        vae={**_kl(4), "shift_factor": None},
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler,
    ),
    "lumina_b": TinyFlow(
        model="lumina-next",
        pipeline="LuminaPipeline",
        latents=(4, 12, 8),
        pixels=8,
        text_width=24,
        network=_lumina(3, 8, num_layers=3, qk_norm=False, ffn_dim_multiplier=1.3, sample_size=6),
        vae={**_kl(4), "shift_factor": None},
        scheduler=lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0),
    ),
    # No flow matching here, and an encoder that no graph holds.
    "hunyuan_a": TinyFlow(
        model="hunyuandit-1.2",
        pipeline="HunyuanDiTPipeline",
        latents=(4, 8, 12),
        pixels=8,
        text_width=16,
        network=_hunyuan(2, 16, (16, 24)),
        vae={**_kl(4), "shift_factor": None},
        scheduler=_ddpm,
    ),
    "hunyuan_b": TinyFlow(
        model="hunyuandit-1.2",
        pipeline="HunyuanDiTPipeline",
        latents=(4, 12, 8),
        pixels=8,
        text_width=24,
        network=_hunyuan(3, 8, (24, 16), num_layers=3, mlp_ratio=2.5),
        vae={**_kl(4), "shift_factor": None},
        scheduler=_ddpm,
    ),
    # A U-Net as SDXL's, and no flow matching either.
    "kolors_a": TinyFlow(
        model="kolors",
        pipeline="KolorsPipeline",
        latents=(4, 8, 12),
        pixels=8,
        text_width=32,
        network=_kolors(
            (16, 32),
            (_PLAIN, _CROSS),
            (1, 2),
            32,
            encoder_hid_dim_type="text_proj",
            encoder_hid_dim=32,
            cross_attention_dim=24,
            transformer_layers_per_block=(1, 2),
        ),
        vae={**_kl(4), "shift_factor": None, "use_quant_conv": True, "use_post_quant_conv": True},
        scheduler=_euler,
        encoder={"add_qkv_bias": True, "multi_query_attention": True, "multi_query_group_num": 2},
    ),
    "kolors_b": TinyFlow(
        model="kolors",
        pipeline="KolorsPipeline",
        latents=(4, 12, 8),
        pixels=4,
        text_width=16,
        network=_kolors(
            (8, 16, 32), (_CROSS, _CROSS, _PLAIN), (2, 1, 4), 16, cross_attention_dim=16, norm_num_groups=4
        ),
        vae={**_kl(3), "shift_factor": None},
        scheduler=_euler,
        encoder={"rmsnorm": False, "add_bias_linear": True, "apply_residual_connection_post_layernorm": True},
    ),
    "qwen_a": TinyFlow(
        model="qwen-image",
        pipeline="QwenImagePipeline",
        latents=(4, 8, 12),
        pixels=8,
        text_width=16,
        network=_qwen(2, (4, 6, 6), 16),
        vae=_qwen_vae((1, 2, 2, 2), (False, True, True)),
        scheduler=_qwen_flow,
    ),
    # Odd numbers of places a side, whose middle is no place.
    "qwen_b": TinyFlow(
        model="qwen-image",
        pipeline="QwenImagePipeline",
        latents=(4, 10, 6),
        pixels=4,
        text_width=24,
        network=_qwen(3, (2, 4, 2), 24, num_layers=3),
        vae=_qwen_vae((1, 1, 2), (True, False), num_res_blocks=2),
        scheduler=_qwen_flow,
    ),
    "qwen_c": TinyFlow(
        model="qwen-image",
        pipeline="QwenImagePipeline",
        latents=(4, 4, 14),
        pixels=2,
        text_width=32,
        network=_qwen(1, (8, 4, 12), 32, num_layers=1),
        vae=_qwen_vae((2, 1), (True,)),
        scheduler=lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=2.0),  # noise levels spaced all the same
    ),
    "flux_a": TinyFlow(
        model="flux1-dev",
        pipeline="FluxPipeline",
        latents=(4, 8, 12),
        pixels=8,
        text_width=24,
        network=_flux(2, (4, 6, 6), (24, 16)),
        vae=_kl(4),
        scheduler=lambda: diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=True, base_image_seq_len=8, max_image_seq_len=64
        ),
    ),
    # As FLUX.1-schnell, which knows no guidance.
    "flux_b": TinyFlow(
        model="flux1-schnell",
        pipeline="FluxPipeline",
        latents=(4, 10, 6),
        pixels=4,
        text_width=40,
        network=_flux(3, (2, 4, 2), (40, 16), num_layers=2, num_single_layers=2, guidance_embeds=False),
        vae=_kl(3),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler,
    ),
    "cosmos_a": TinyFlow(
        model="cosmos-predict2-2b",
        pipeline="Cosmos2TextToImagePipeline",
        latents=(4, 8, 12),
        pixels=8,
        text_width=24,
        network=_cosmos(2, 16),
        vae=_wan_vae((1, 1, 2, 2), (False, True, True)),
        scheduler=lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True),
    ),
    "cosmos_b": TinyFlow(
        model="cosmos-predict2-2b",
        pipeline="Cosmos2TextToImagePipeline",
        latents=(4, 12, 8),
        pixels=4,
        text_width=16,
        network=_cosmos(3, 12, num_layers=3, mlp_ratio=2.0, rope_scale=(2.0, 1.0, 3.0), concat_padding_mask=False),
        vae=_wan_vae((1, 2, 2), (True, False)),
        scheduler=lambda: diffusers.FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True, shift=3.0),
    ),
    "wan_a": TinyFlow(
        model="wan21-t2v-1.3b",
        pipeline="WanPipeline",
        latents=(4, 3, 4, 8),
        pixels=4,
        frames=5,
        text_width=24,
        network=_wan(2, 12, 24),
        vae=_wan_vae((1, 1, 2), (False, True)),
        scheduler=_flow_unipc,
    ),
    "wan_b": TinyFlow(
        model="wan21-t2v-1.3b",
        pipeline="WanPipeline",
        latents=(4, 2, 4, 2),
        pixels=8,
        frames=5,
        text_width=16,
        network=_wan(3, 16, 16, cross_attn_norm=False, num_layers=1),
        vae=_wan_vae((1, 2, 2, 2), (True, True, False)),
        scheduler=_flow_unipc,
    ),
    # Two networks. The second one begins about the gate of the tests here, and well after it in the next.
    "wan22_a": TinyFlow(
        model="wan22-t2v-a14b",
        pipeline="WanPipeline",
        latents=(4, 3, 4, 8),
        pixels=4,
        frames=5,
        text_width=24,
        network=_wan(2, 12, 24),
        vae=_wan_vae((1, 1, 2), (False, True)),
        scheduler=_flow_unipc,
        boundary=0.875,
    ),
    "wan22_b": TinyFlow(
        model="wan22-t2v-a14b",
        pipeline="WanPipeline",
        latents=(4, 2, 4, 2),
        pixels=8,
        frames=5,
        text_width=16,
        network=_wan(3, 16, 16, cross_attn_norm=False, num_layers=1),
        vae=_wan_vae((1, 2, 2, 2), (True, True, False)),
        scheduler=lambda: _flow_unipc(12.0),
        boundary=0.9,
    ),
    # From a picture, which the networks of one kind attend to as well.
    "wan_i2v_a": TinyFlow(
        model="wan21-i2v-14b",
        pipeline="WanImageToVideoPipeline",
        latents=(4, 2, 4, 8),
        pixels=4,
        frames=5,
        text_width=24,
        network=_wan(2, 12, 24, in_channels=12, image_dim=16, added_kv_proj_dim=24),
        vae=_wan_vae((1, 1, 2), (True, True)),
        scheduler=_flow_unipc,
        sees=12,
    ),
    "wan_i2v_b": TinyFlow(
        model="wan21-i2v-14b",
        pipeline="WanImageToVideoPipeline",
        latents=(4, 3, 8, 4),
        pixels=8,
        frames=9,
        text_width=16,
        network=_wan(
            3, 16, 16, cross_attn_norm=False, num_layers=1, in_channels=12, image_dim=24, added_kv_proj_dim=48
        ),
        vae=_wan_vae((1, 2, 2, 2), (False, True, True)),
        scheduler=_flow_unipc,
        sees=20,
    ),
    "wan22_i2v_a": TinyFlow(
        model="wan22-i2v-a14b",
        pipeline="WanImageToVideoPipeline",
        latents=(4, 2, 4, 8),
        pixels=8,
        frames=5,
        text_width=24,
        network=_wan(2, 12, 24, in_channels=12),
        vae=_wan_vae((1, 1, 2, 2), (False, True, True)),
        scheduler=_flow_unipc,
        boundary=0.9,
    ),
    "wan22_i2v_b": TinyFlow(
        model="wan22-i2v-a14b",
        pipeline="WanImageToVideoPipeline",
        latents=(4, 3, 4, 4),
        pixels=8,
        frames=9,
        text_width=16,
        network=_wan(3, 16, 16, cross_attn_norm=False, num_layers=1, in_channels=12),
        vae=_wan_vae((1, 2, 2, 2), (True, True, False)),
        scheduler=lambda: _flow_unipc(5.0),
        boundary=0.875,
    ),
    "ltx_a": TinyFlow(
        model="ltx-video",
        pipeline="LTXPipeline",
        latents=(8, 2, 2, 3),
        pixels=32,
        frames=9,
        text_width=24,
        network=_ltx(2, 10, 24, 8),
        vae=_ltx_vae(8, (8, 8, 16, 16), (True, True, True, False)),
        scheduler=_flow_euler,
    ),
    # As 0.9.5's decoder, which is told a timestep, and a network with all that a configuration may have besides.
    "ltx_b": TinyFlow(
        model="ltx-video",
        pipeline="LTXPipeline",
        latents=(6, 3, 3, 2),
        pixels=32,
        frames=17,
        text_width=16,
        network=_ltx(3, 8, 16, 6, norm_elementwise_affine=True, attention_bias=False, attention_out_bias=False),
        vae=_ltx_vae(
            6,
            (8, 16, 32),
            (True, True, True),
            upsample_residual=(True, True, True),
            upsample_factor=(2, 2, 2),
            timestep_conditioning=True,
            scaling_factor=0.8,
            decoder_causal=True,
        ),
        scheduler=lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    ),
    # One frame.
    "ltx_c": TinyFlow(
        model="ltx-video",
        pipeline="LTXPipeline",
        latents=(4, 1, 4, 2),
        pixels=32,
        frames=1,
        text_width=16,
        network=_ltx(1, 12, 16, 4, num_layers=3, norm_eps=1e-3),
        vae=_ltx_vae(4, (8, 8, 8, 16), (True, True, True, False)),
        scheduler=_flow_euler,
    ),
}


def make_tiny_flow(directory: Path, variant: str) -> Path:
    """Write the checkpoint of ``variant`` into ``directory``, new or empty; the same weights every time."""
    tiny = FLOW_VARIANTS[variant]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        _BUILD[tiny.pipeline](tiny, variant).save_pretrained(directory)
    return directory


def load_tiny_flow(directory: Path, variant: str) -> Any:
    """diffusers' own pipeline of a directory of :func:`make_tiny_flow`, in float32 on the CPU, silent."""
    loader = getattr(diffusers, FLOW_VARIANTS[variant].pipeline)
    further = {"safety_checker": Unguarded()} if variant.startswith("cosmos") else {}
    pipe = loader.from_pretrained(directory, dtype=torch.float32, local_files_only=True, **further)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flow_noise(variant: str, seed: int = 0) -> torch.Tensor:
    """Unit-variance noise [1, *latents]; the same for the same seed."""
    return torch.randn(1, *FLOW_VARIANTS[variant].latents, generator=torch.Generator().manual_seed(seed))


def flow_picture(variant: str, seed: int = 0) -> Image.Image:
    """What a video of ``variant`` starts from; the same for the same seed."""
    tiny = FLOW_VARIANTS[variant]
    height, width = (side * tiny.pixels for side in tiny.latents[-2:])
    coarse = Image.fromarray(np.random.default_rng(seed).integers(0, 255, (4, 4, 3), np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def _build_sana(tiny: TinyFlow, variant: str) -> Any:
    network = diffusers.SanaTransformer2DModel(**tiny.network, caption_channels=tiny.text_width)
    return getattr(diffusers, tiny.pipeline)(
        transformer=draw(network.eval(), f"{variant}/transformer"),
        vae=draw(diffusers.AutoencoderDC(**tiny.vae).eval(), f"{variant}/vae"),
        scheduler=tiny.scheduler(),
        **gemma(tiny.text_width, f"{variant}/text"),
    )


def _build_lumina(tiny: TinyFlow, variant: str) -> Any:
    network = diffusers.LuminaNextDiT2DModel(**tiny.network, cross_attention_dim=tiny.text_width)
    draw(network.eval(), f"{variant}/transformer")
    with torch.no_grad():
        for layer in network.layers:
            layer.gate.normal_()  # else a text counts for little
    return diffusers.LuminaPipeline(
        transformer=network,
        vae=draw(diffusers.AutoencoderKL(**tiny.vae).eval(), f"{variant}/vae"),
        scheduler=tiny.scheduler(),
        **gemma(tiny.text_width, f"{variant}/text", first=True),
    )


def _build_cosmos(tiny: TinyFlow, variant: str) -> Any:
    network = diffusers.CosmosTransformer3DModel(**tiny.network, text_embed_dim=tiny.text_width)
    return diffusers.Cosmos2TextToImagePipeline(
        transformer=draw(network.eval(), f"{variant}/transformer"),
        vae=draw(diffusers.AutoencoderKLWan(**tiny.vae).eval(), f"{variant}/vae"),
        scheduler=tiny.scheduler(),
        safety_checker=Unguarded(),
        **t5(tiny.text_width),
    )


class Unguarded:
    """In the place of Cosmos's guardrail, one that lets everything pass."""

    def to(self, _device: object) -> None: ...

    def check_text_safety(self, _text: str) -> bool:
        return True

    def check_video_safety(self, video: Any) -> Any:
        return video


def _build_sd3(tiny: TinyFlow, variant: str) -> Any:
    return diffusers.StableDiffusion3Pipeline(
        transformer=draw(diffusers.SD3Transformer2DModel(**tiny.network).eval(), f"{variant}/transformer"),
        vae=draw(diffusers.AutoencoderKL(**tiny.vae).eval(), f"{variant}/vae"),
        scheduler=tiny.scheduler(),
        **clip_with_projection(16, 8, f"{variant}/1"),
        **{f"{name}_2": part for name, part in clip_with_projection(24, 16, f"{variant}/2").items()},
        **{f"{name}_3": part for name, part in t5(tiny.text_width).items()},
    )


def _build_hunyuan(tiny: TinyFlow, variant: str) -> Any:
    return diffusers.HunyuanDiTPipeline(
        transformer=draw(diffusers.HunyuanDiT2DModel(**tiny.network).eval(), f"{variant}/transformer"),
        vae=draw(diffusers.AutoencoderKL(**tiny.vae).eval(), f"{variant}/vae"),
        scheduler=tiny.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        **bert(tiny.text_width, f"{variant}/1"),
        **{f"{name}_2": part for name, part in t5(tiny.network["cross_attention_dim_t5"]).items()},
    )


def _build_kolors(tiny: TinyFlow, variant: str) -> Any:
    return diffusers.KolorsPipeline(
        unet=draw(diffusers.UNet2DConditionModel(**tiny.network).eval(), f"{variant}/unet"),
        vae=draw(diffusers.AutoencoderKL(**tiny.vae).eval(), f"{variant}/vae"),
        scheduler=tiny.scheduler(),
        **chatglm(tiny.text_width, f"{variant}/text", **tiny.encoder),
    )


def _build_qwen(tiny: TinyFlow, variant: str) -> Any:
    return diffusers.QwenImagePipeline(
        transformer=draw(diffusers.QwenImageTransformer2DModel(**tiny.network).eval(), f"{variant}/transformer"),
        vae=draw(diffusers.AutoencoderKLQwenImage(**tiny.vae).eval(), f"{variant}/vae"),
        scheduler=tiny.scheduler(),
        **qwen(tiny.text_width, f"{variant}/text"),
    )


def _build_flux(tiny: TinyFlow, variant: str) -> Any:
    return diffusers.FluxPipeline(
        transformer=draw(diffusers.FluxTransformer2DModel(**tiny.network).eval(), f"{variant}/transformer"),
        vae=draw(diffusers.AutoencoderKL(**tiny.vae).eval(), f"{variant}/vae"),
        scheduler=tiny.scheduler(),
        **clip(tiny.network["pooled_projection_dim"], length=24, second=False),
        **{f"{name}_2": part for name, part in t5(tiny.text_width).items()},
    )


def _build_wan(tiny: TinyFlow, variant: str) -> Any:
    second: dict[str, Any] = {}
    if tiny.boundary is not None:
        network = diffusers.WanTransformer3DModel(**tiny.network).eval()
        second = {"transformer_2": draw(network, f"{variant}/transformer_2"), "boundary_ratio": tiny.boundary}
    if tiny.sees:
        second |= clip_vision(tiny.network["image_dim"], tiny.sees, f"{variant}/image_encoder")
    return getattr(diffusers, tiny.pipeline)(
        transformer=draw(diffusers.WanTransformer3DModel(**tiny.network).eval(), f"{variant}/transformer"),
        vae=draw(diffusers.AutoencoderKLWan(**tiny.vae).eval(), f"{variant}/vae"),
        scheduler=tiny.scheduler(),
        **umt5(tiny.text_width, f"{variant}/text"),
        **second,
    )


def _build_ltx(tiny: TinyFlow, variant: str) -> Any:
    vae = draw(diffusers.AutoencoderKLLTXVideo(**tiny.vae).eval(), f"{variant}/vae")
    with torch.no_grad():
        vae.latents_mean.uniform_(-0.5, 0.5)
        vae.latents_std.uniform_(0.6, 1.8)
    return diffusers.LTXPipeline(
        transformer=draw(diffusers.LTXVideoTransformer3DModel(**tiny.network).eval(), f"{variant}/transformer"),
        vae=vae,
        scheduler=tiny.scheduler(),
        **t5(tiny.text_width),
    )


_BUILD: Mapping[str, Callable[[TinyFlow, str], Any]] = {
    "SanaPipeline": _build_sana,
    "SanaSprintPipeline": _build_sana,
    "LuminaPipeline": _build_lumina,
    "StableDiffusion3Pipeline": _build_sd3,
    "Cosmos2TextToImagePipeline": _build_cosmos,
    "WanPipeline": _build_wan,
    "WanImageToVideoPipeline": _build_wan,
    "LTXPipeline": _build_ltx,
    "QwenImagePipeline": _build_qwen,
    "FluxPipeline": _build_flux,
    "HunyuanDiTPipeline": _build_hunyuan,
    "KolorsPipeline": _build_kolors,
}
