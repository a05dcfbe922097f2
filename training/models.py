"""The parts of `mini-sdxl` as diffusers and transformers modules, with fresh weights."""

from __future__ import annotations

import torch
from diffusers import (
    AutoencoderKL,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from training.settings import IMAGE_PX, LATENT_CHANNELS, LATENT_PX, MAX_TOKENS, Settings

_NOISE = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "prediction_type": "epsilon",
}


def build_text_encoders(
    settings: Settings, tokenizer: CLIPTokenizer
) -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Encoders whose penultimate states are [B, 48, width 1] and [B, 48, width 2]; the second also pools."""

    def config(width: int, activation: str) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=4 * width,
            projection_dim=settings.text_projection_dim,
            num_hidden_layers=settings.text_layers,
            num_attention_heads=width // settings.text_head_dim,
            max_position_embeddings=MAX_TOKENS,
            hidden_act=activation,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )

    first = CLIPTextModel(config(settings.text_1_width, "quick_gelu"))
    second = CLIPTextModelWithProjection(config(settings.text_2_width, "gelu"))
    return first, second


def build_unet(settings: Settings) -> UNet2DConditionModel:
    """An SDXL-structured denoiser of latents [B, 4, 16, 16] with transformers at 16x16 and 8x8."""
    levels = len(settings.unet_channels)
    return UNet2DConditionModel(
        sample_size=LATENT_PX,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        block_out_channels=settings.unet_channels,
        layers_per_block=settings.unet_layers_per_block,
        transformer_layers_per_block=list(settings.unet_transformer_layers),
        attention_head_dim=list(settings.unet_heads),  # the config key's name is historical: these are head counts
        cross_attention_dim=settings.cross_attention_dim,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=settings.unet_time_id_dim,
        projection_class_embeddings_input_dim=6 * settings.unet_time_id_dim + settings.text_projection_dim,
        norm_num_groups=16,
    )


def build_vae(settings: Settings) -> AutoencoderKL:
    """An autoencoder of images [B, 3, 128, 128] in [-1, 1] and latents [B, 4, 16, 16]."""
    levels = len(settings.vae_channels)
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=settings.vae_channels,
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=settings.vae_norm_groups,
        sample_size=IMAGE_PX,
        scaling_factor=1.0,
        force_upcast=False,
        mid_block_add_attention=settings.vae_mid_attention,
    )


def training_noise() -> DDPMScheduler:
    """The forward process: 1,000 steps, scaled-linear betas, epsilon prediction."""
    return DDPMScheduler(**_NOISE)


def sampling_scheduler() -> DPMSolverMultistepScheduler:
    """The sampler that the pipeline directory names: DPM-Solver++ of order 2."""
    return DPMSolverMultistepScheduler(
        **_NOISE,
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        lower_order_final=True,
        timestep_spacing="leading",
        steps_offset=1,
        lambda_min_clipped=-100.0,  # as good as the default, which JSON cannot hold: -Infinity
    )


def build_pipeline(
    *,
    vae: AutoencoderKL,
    unet: UNet2DConditionModel,
    text_1: CLIPTextModel,
    text_2: CLIPTextModelWithProjection,
    tokenizer: CLIPTokenizer,
) -> StableDiffusionXLPipeline:
    """The pipeline of the five parts; both tokenizer slots hold the same tokenizer."""
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_1,
        text_encoder_2=text_2,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=sampling_scheduler(),
        force_zeros_for_empty_prompt=False,
        add_watermarker=False,
    )


def time_ids(batch: int) -> torch.Tensor:
    """SDXL's size conditioning [B, 6]: original size, crop corner, target size, in pixels."""
    return torch.tensor([[IMAGE_PX, IMAGE_PX, 0, 0, IMAGE_PX, IMAGE_PX]], dtype=torch.float32).repeat(batch, 1)
