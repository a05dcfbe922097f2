"""Small random-weight checkpoints of the paper's families other than SDXL, in diffusers' layout.

As in ``tests/tiny_models.py``, attention weights are redrawn so that attention and conditioning decide the result,
and each network's last layer is fitted to remove noise so that every step counts.
``tests/test_oracle_families.py`` checks both.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import PixArtAlphaTextProjection
from transformers import CLIPImageProcessor

from tests.tiny_encoders import clip, image_encoder, t5
from tests.tiny_models import (
    CONSISTENCY_VARIANT,
    _save_vocabulary,
    make_tiny_sdxl,
    tiny_model,
)

Pipeline = Any
Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Tiny:
    """One variant: what a caller has to know, and how it is built."""

    model: str  # the name for --model
    pipeline: str  # diffusers' class
    latents: Shape  # without the batch
    vae_factor: int  # image pixels per latent pixel
    seed: int
    network: Mapping[str, Any]  # arguments of the denoiser's class
    text_width: int = 0  # of the text or image encoder
    scheduler: str = "dpm"
    sigma_max: float = 700.0  # SVD; as published, but then early steps hardly matter to the result
    gain: float = 1.0  # of attention's output projection


_PLAIN, _CROSS = "DownBlock2D", "CrossAttnDownBlock2D"
_SVD_PLAIN, _SVD_CROSS = "DownBlockSpatioTemporal", "CrossAttnDownBlockSpatioTemporal"


def _unet(channels: Shape, blocks: tuple[str, ...], heads: Any, **more: Any) -> dict[str, Any]:
    return {
        "block_out_channels": channels,
        "down_block_types": blocks,
        "up_block_types": tuple(name.replace("Down", "Up") for name in reversed(blocks)),
        "layers_per_block": 1,
        **heads,
        **more,
    }


def _dit(heads: int, head_width: int, layers: int, sample_size: int, out: int = 8, **more: Any) -> dict[str, Any]:
    return {
        "num_attention_heads": heads,
        "attention_head_dim": head_width,
        "cross_attention_dim": heads * head_width,
        "in_channels": 4,
        "out_channels": out,
        "num_layers": layers,
        "sample_size": sample_size,
        "patch_size": 2,
        "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000,
        "norm_type": "ada_norm_single",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        **more,
    }


_ALPHA, _SIGMA, _LATTE = "PixArtAlphaPipeline", "PixArtSigmaPipeline", "LattePipeline"
_SD, _SVD = "StableDiffusionPipeline", "StableVideoDiffusionPipeline"
_SDXL = tiny_model(CONSISTENCY_VARIANT)

FAMILY_VARIANTS: Mapping[str, Tiny] = {
    "sd15_a": Tiny(
        model="sd15",
        pipeline=_SD,
        latents=(4, 8, 12),
        vae_factor=8,
        seed=31,
        text_width=24,
        network=_unet((16, 32), (_CROSS, _PLAIN), {"attention_head_dim": 2}, norm_num_groups=8, sample_size=8),
    ),
    "sd15_b": Tiny(
        model="sd15",
        pipeline=_SD,
        latents=(4, 12, 8),
        vae_factor=4,
        seed=32,
        text_width=32,
        scheduler="pndm",
        network=_unet(
            (8, 16, 32), (_CROSS, _CROSS, _PLAIN), {"attention_head_dim": 4}, norm_num_groups=4, sample_size=12
        ),
    ),
    "sd21_v": Tiny(
        model="sd21",
        pipeline=_SD,
        latents=(4, 8, 16),
        vae_factor=8,
        seed=33,
        text_width=32,
        scheduler="ddim_v",
        network=_unet(
            (16, 32),
            (_CROSS, _CROSS),
            {"attention_head_dim": (1, 4)},
            norm_num_groups=8,
            sample_size=8,
            use_linear_projection=True,
        ),
    ),
    "pixart_alpha_a": Tiny(
        model="pixart-alpha",
        pipeline=_ALPHA,
        latents=(4, 8, 12),
        vae_factor=8,
        seed=34,
        text_width=24,
        scheduler="dpm_linear",
        network=_dit(2, 16, 3, 8, use_additional_conditions=False),
    ),
    "pixart_alpha_b": Tiny(
        model="pixart-alpha",
        pipeline=_ALPHA,
        latents=(4, 12, 8),
        vae_factor=4,
        seed=35,
        text_width=16,
        scheduler="dpm_linear",
        network=_dit(3, 8, 2, 64, 4, use_additional_conditions=False),
    ),
    # Diffusers and the package tell this kind by sample_size alone; run it with small latents all the same.
    "pixart_alpha_1024": Tiny(
        model="pixart-alpha",
        pipeline=_ALPHA,
        latents=(4, 8, 16),
        vae_factor=8,
        seed=36,
        text_width=24,
        scheduler="dpm_linear",
        network=_dit(3, 16, 2, 128, use_additional_conditions=True),
    ),
    # As published: sample_size 128, and yet no additional conditions.
    "pixart_sigma_a": Tiny(
        model="pixart-sigma",
        pipeline=_SIGMA,
        latents=(4, 8, 12),
        vae_factor=8,
        seed=37,
        text_width=32,
        scheduler="dpm_linear",
        network=_dit(4, 8, 2, 128, use_additional_conditions=False),
    ),
    "lcm_pixart": Tiny(
        model="lcm-pixart",
        pipeline=_ALPHA,
        latents=(4, 12, 8),
        vae_factor=8,
        seed=38,
        text_width=16,
        scheduler="lcm",
        network=_dit(3, 8, 2, 128, use_additional_conditions=True),
    ),
    "lcm_sdxl": Tiny(
        model="lcm-sdxl",
        pipeline="StableDiffusionXLPipeline",
        latents=(4, *_SDXL.latent_size),
        vae_factor=_SDXL.vae_factor,
        seed=_SDXL.seed,
        network={},  # built by tests/tiny_models.py
    ),
    "svd_a": Tiny(
        model="svd",
        pipeline=_SVD,
        latents=(3, 4, 8, 12),
        vae_factor=4,
        seed=39,
        sigma_max=80.0,
        gain=2.0,
        text_width=24,
        scheduler="svd",
        network=_unet(
            (32, 64), (_SVD_CROSS, _SVD_PLAIN), {"num_attention_heads": (1, 2)}, sample_size=12, num_frames=3
        ),
    ),
    "svd_b": Tiny(
        model="svd",
        pipeline=_SVD,
        latents=(5, 4, 8, 4),
        vae_factor=4,
        seed=40,
        sigma_max=30.0,
        text_width=16,
        scheduler="svd",
        network=_unet((32, 32), (_SVD_CROSS, _SVD_CROSS), {"num_attention_heads": (4, 2)}, sample_size=8, num_frames=5),
    ),
    "latte_a": Tiny(
        model="opensora",
        pipeline=_LATTE,
        latents=(4, 3, 8, 12),
        vae_factor=8,
        seed=41,
        text_width=24,
        scheduler="pndm_linear",
        network=_dit(2, 16, 2, 8, video_length=3),
    ),
    "latte_b": Tiny(
        model="opensora",
        pipeline=_LATTE,
        latents=(4, 5, 8, 4),
        vae_factor=8,
        seed=42,
        text_width=16,
        scheduler="ddim_linear",
        network=_dit(3, 8, 1, 64, video_length=5),
    ),
}


def make_tiny(directory: Path | str, variant: str) -> Path:
    """Write the checkpoint of ``variant`` into ``directory``, new or empty; the same weights every time."""
    tiny, target = FAMILY_VARIANTS[variant], Path(directory)
    if tiny.model == "lcm-sdxl":
        return make_tiny_sdxl(target, CONSISTENCY_VARIANT)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(tiny.seed)
        pipe = _build(tiny)
    pipe.save_pretrained(target)
    if tiny.pipeline == _SD:
        _save_vocabulary(target / "tokenizer")
    return target


def load_tiny(directory: Path | str, variant: str) -> Pipeline:
    """Load a directory of :func:`make_tiny` in float32 on the CPU, silently."""
    options = {"add_watermarker": False} if FAMILY_VARIANTS[variant].model == "lcm-sdxl" else {}
    loader = getattr(diffusers, FAMILY_VARIANTS[variant].pipeline)
    pipe = loader.from_pretrained(directory, dtype=torch.float32, local_files_only=True, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latent_noise(variant: str, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Unit-variance noise [batch, *latents]; the same for the same seed."""
    return torch.randn(batch, *FAMILY_VARIANTS[variant].latents, generator=torch.Generator().manual_seed(seed))


def _build(tiny: Tiny) -> Pipeline:
    levels = int(math.log2(tiny.vae_factor)) + 1
    vae: dict[str, Any] = {"down_block_types": ("DownEncoderBlock2D",) * levels, "latent_channels": 4}
    parts: dict[str, Any] = {"scheduler": _scheduler(tiny.scheduler, tiny.sigma_max)}
    network: Any
    if tiny.pipeline == _SVD:
        width = 8
        network = diffusers.UNetSpatioTemporalConditionModel(
            **tiny.network,
            cross_attention_dim=tiny.text_width,
            addition_time_embed_dim=width,
            projection_class_embeddings_input_dim=3 * width,
        )
        parts["vae"] = diffusers.AutoencoderKLTemporalDecoder(**vae, block_out_channels=(32,) * levels)
        parts["image_encoder"] = image_encoder(tiny.text_width)
        parts["feature_extractor"] = CLIPImageProcessor()
    else:
        vae["up_block_types"] = ("UpDecoderBlock2D",) * levels
        parts["vae"] = diffusers.AutoencoderKL(**vae, block_out_channels=(8,) * levels, norm_num_groups=4)
        if tiny.pipeline == _SD:
            network = diffusers.UNet2DConditionModel(**tiny.network, cross_attention_dim=tiny.text_width)
            parts |= clip(tiny.text_width, length=24, second=tiny.model == "sd21")
            parts |= {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        else:
            name = "LatteTransformer3DModel" if tiny.pipeline == _LATTE else "PixArtTransformer2DModel"
            network = getattr(diffusers, name)(**tiny.network, caption_channels=tiny.text_width)
            parts |= t5(tiny.text_width)
    parts = {name: part.eval() if isinstance(part, torch.nn.Module) else part for name, part in parts.items()}
    network.eval()
    _strengthen(network, tiny.gain)
    _fit_last_layer(network, tiny)
    parts["unet" if tiny.pipeline in (_SD, _SVD) else "transformer"] = network
    return getattr(diffusers, tiny.pipeline)(**parts)


def _scheduler(name: str, sigma_max: float) -> Any:
    scaled = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    # PixArt's ends at 0.02. There the first step's error, times 158, would hide whatever late steps do.
    linear = {"beta_start": 0.0001, "beta_end": 0.012, "beta_schedule": "linear"}
    ddim = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    known: dict[str, Callable[[], Any]] = {
        "dpm": lambda: diffusers.DPMSolverMultistepScheduler(**scaled, steps_offset=1),
        "dpm_linear": lambda: diffusers.DPMSolverMultistepScheduler(**linear),
        "pndm": lambda: diffusers.PNDMScheduler(**scaled, skip_prk_steps=True, steps_offset=1),
        "ddim_v": lambda: diffusers.DDIMScheduler(**scaled, **ddim, prediction_type="v_prediction"),
        "lcm": lambda: diffusers.LCMScheduler(**linear, original_inference_steps=50),
        "ddim_linear": lambda: diffusers.DDIMScheduler(**linear, clip_sample=False),
        "pndm_linear": lambda: diffusers.PNDMScheduler(**linear, skip_prk_steps=True),
        # As published with Stable Video Diffusion, but for the largest sigma.
        "svd": lambda: diffusers.EulerDiscreteScheduler(
            **scaled,
            interpolation_type="linear",
            prediction_type="v_prediction",
            sigma_max=sigma_max,
            sigma_min=0.002,
            steps_offset=1,
            timestep_spacing="leading",
            timestep_type="continuous",
            use_karras_sigmas=True,
        ),
    }
    return known[name]()


def reshape_unet(checkpoint: Path, **changes: Any) -> None:
    """Replace a checkpoint's U-Net by one with some config keys changed, drawn so that attention matters."""
    config = json.loads((checkpoint / "unet" / "config.json").read_text("utf-8")) | changes
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        unet = diffusers.UNet2DConditionModel.from_config(config).eval()
        for name, parameter in unet.named_parameters():
            if name.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")):
                torch.nn.init.normal_(parameter, std=1.3 / math.sqrt(parameter.shape[1]))
    unet.save_pretrained(checkpoint / "unet")


def _redraw(layer: Any, gain: float) -> None:
    layer.weight.normal_(std=gain / math.sqrt(layer.weight[0].numel()))


@torch.no_grad()
def _strengthen(network: torch.nn.Module, gain: float) -> None:
    """Redraw weights so that attention outweighs the stream it joins, and conditioning is strong."""
    for name, module in network.named_modules():
        if isinstance(module, Attention):
            for linear, factor in (
                (module.to_q, 1.0),
                (module.to_k, 1.0),
                (module.to_v, 1.5),
                (module.to_out[0], gain),
            ):
                _redraw(linear, factor)
        elif isinstance(module, PixArtAlphaTextProjection):
            _redraw(module.linear_1, 1.0)
            _redraw(module.linear_2, 1.0)
        elif "blocks" in name and name.endswith(("proj_out", "upsamplers.0.conv")):
            _redraw(module, 1.5)
        elif name.endswith(("resolution_embedder.linear_2", "aspect_ratio_embedder.linear_2")):
            _redraw(module, 1.0)
        if "blocks" in name and hasattr(module, "scale_shift_table"):
            module.scale_shift_table.normal_(std=0.3)
            module.scale_shift_table[[2, 5]] += 1.0  # the gates of self-attention and feed-forward


@torch.no_grad()
def _fit_last_layer(network: Any, tiny: Tiny) -> None:
    """Solve the last layer by ridge regression for the noise (or velocity) in noised random latents.

    Otherwise the initial noise would dominate the final latents, and what late steps do would disappear in it.
    """
    batch = 8 if tiny.pipeline in (_SD, _SVD) else 32
    clean, noise = torch.randn(2, batch, *tiny.latents)
    times = torch.randint(20, 980, (batch,))
    signal = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)[times]
    if tiny.scheduler == "svd":
        times = 0.25 * (2.5 * torch.randn(batch) + 1).clamp(-5, 6)  # ¼ log σ
        signal = 1 / (1 + torch.exp(4 * times) ** 2)
    a, s = (part.sqrt().view(-1, *(1,) * len(tiny.latents)) for part in (signal, 1 - signal))
    noisy = a * clean + s * noise
    wanted = a * noise - s * clean if tiny.scheduler in ("svd", "ddim_v") else noise
    text = torch.randn(batch, 20, tiny.text_width)
    last = network.conv_out if hasattr(network, "conv_out") else network.proj_out
    seen: list[torch.Tensor] = []
    hook = last.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    if tiny.pipeline == _SD:
        network(noisy, times, encoder_hidden_states=text)
    elif tiny.pipeline == _SVD:
        ids = torch.tensor([[6.0, 127.0, 0.02]] * batch)
        first = clean[:, :1].expand_as(clean)  # the picture the video starts from
        network(torch.cat([noisy, first], dim=2), times, encoder_hidden_states=text[:, :1], added_time_ids=ids)
    elif tiny.pipeline == _LATTE:
        network(noisy, timestep=times, encoder_hidden_states=text)
    else:
        height, width = (float(side * tiny.vae_factor) for side in tiny.latents[-2:])
        size = {"resolution": torch.tensor([[height, width]] * batch)}
        size["aspect_ratio"] = torch.tensor([[height / width]] * batch)
        network(noisy, timestep=times, encoder_hidden_states=text, added_cond_kwargs=size)
    hook.remove()
    if isinstance(last, torch.nn.Conv2d):
        inputs = torch.nn.functional.unfold(seen[0], kernel_size=3, padding=1).transpose(1, 2).flatten(0, 1)
        images = wanted.flatten(0, 1) if tiny.pipeline == _SVD else wanted
        last.weight.copy_(_ridge(inputs, images.flatten(2).transpose(1, 2).flatten(0, 1)).T.view_as(last.weight))
        last.bias.zero_()
        return
    # In the space of the clean latents, where an error counts the more the less signal there is.
    importance = (s / a).clamp(max=30).flatten().repeat_interleave(seen[0].shape[0] * seen[0].shape[1] // batch)
    # Patches of 2 x 2, channels last within a patch; what lies beyond the first four channels is learned sigma.
    images = wanted.transpose(1, 2).flatten(0, 1) if tiny.pipeline == _LATTE else wanted
    patches = images.unfold(2, 2, 2).unfold(3, 2, 2).permute(0, 2, 3, 4, 5, 1).flatten(0, 2)  # [tokens, 2, 2, 4]
    weight = last.weight.view(2, 2, network.config.out_channels, -1)
    weight[:, :, :4] = _ridge(
        seen[0].flatten(0, 1) * importance[:, None], patches.flatten(1) * importance[:, None]
    ).T.reshape(2, 2, 4, -1)
    last.bias.zero_()


def _ridge(inputs: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Weights [inputs, outputs] in float32."""
    inputs, wanted = inputs.double(), wanted.double()
    penalty = 1e-2 * len(inputs) * torch.eye(inputs.shape[1], dtype=torch.float64)
    return torch.linalg.solve(inputs.T @ inputs + penalty, inputs.T @ wanted).float()
