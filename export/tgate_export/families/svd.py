"""Stable Video Diffusion: a U-Net over frames that an image conditions, and no text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import PIL.Image
import torch
import transformers
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_engine.manifest import Conditioning
from tgate_export.checkpoints import Checkpoint
from tgate_export.families.base import ConditioningInput, Family, Size, Texts
from tgate_export.families.facts import SVD
from tgate_export.families.unet import deep_module
from tgate_export.methods.base import Halves
from tgate_export.pictures import normalisation

FPS = 7
MOTION_BUCKET = 127
NOISE_STRENGTH = 0.02
"""diffusers' defaults: frames a second, the amount of motion, and the noise added to the image."""

HEIGHT, WIDTH = 576, 1024
"""The pipeline's default size, whatever the checkpoint says."""

CLIP_SIDE = 224
"""Pixels: the pipeline shows CLIP a picture of this height and width."""


class StableVideo(Family):
    """Stable Video Diffusion (arXiv 2311.15127), in diffusers layout. Latents are [F, C, h, w].

    The network sees the image twice: as CLIP's embedding, in cross-attention, and as latents beside every frame's.
    Guidance grows from 1 at the first frame to its scale at the last.
    """

    facts = SVD
    pipeline_classes = ("StableVideoDiffusionPipeline",)
    classes: Mapping[str, type[nn.Module]] = {
        "unet": diffusers.UNetSpatioTemporalConditionModel,
        "vae": diffusers.AutoencoderKLTemporalDecoder,
        "image_encoder": transformers.CLIPVisionModelWithProjection,
    }
    denoiser = "unet"
    image_components = ("image_encoder", "vae")
    after_gate: Halves = "positive"
    frames_argument = "num_frames"
    frames_axis = 1
    fps = FPS

    def deep(self, checkpoint: Checkpoint, branch: int) -> str | None:
        return deep_module(checkpoint, self.skeleton(checkpoint, "unet"), branch)

    def check(self, checkpoint: Checkpoint) -> None:
        channels, config = self.latent_channels(checkpoint), self.config(checkpoint, "unet")
        if config["in_channels"] != 2 * channels:
            raise ExportError(
                f"{checkpoint.where}: the unet takes {config['in_channels']} channels, Stable Video Diffusion takes "
                f"the latents and the image's: {2 * channels}; this checkpoint is of another architecture"
            )
        if config["out_channels"] != channels:
            raise ExportError(
                f"{checkpoint.where}: the unet gives {config['out_channels']} channels, its latents have {channels}; "
                "this checkpoint is of another architecture"
            )
        numbers = 3 * int(config["addition_time_embed_dim"])
        if config["projection_class_embeddings_input_dim"] != numbers:
            raise ExportError(
                f"{checkpoint.where}: the unet has projection_class_embeddings_input_dim = "
                f"{config['projection_class_embeddings_input_dim']}, and is given 3 numbers of addition_time_embed_dim "
                f"= {config['addition_time_embed_dim']}; they must agree"
            )
        image_size = self.config(checkpoint, "image_encoder")["image_size"]
        if image_size != CLIP_SIDE:
            raise ExportError(
                f"{checkpoint.where}: the image_encoder takes {image_size} pixels a side; "
                f"{self.pipeline_classes[0]} shows it {CLIP_SIDE}"
            )
        self.check_decoder(checkpoint)
        checkpoint.named_class("feature_extractor")
        normalisation(checkpoint)

    def denoise(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        guidance: Tensor,
        conditioning: Mapping[str, Tensor],
    ) -> Tensor:
        image = conditioning["image_latents"].unsqueeze(1).expand(-1, latents.shape[1], -1, -1, -1)
        output: Tensor = denoiser(
            torch.cat([latents, image], dim=2),
            timesteps,
            encoder_hidden_states=conditioning["image_embeds"],
            added_time_ids=conditioning["added_time_ids"],
            return_dict=False,
        )[0]
        return output

    def conditioning(self, checkpoint: Checkpoint, size: Size) -> Sequence[ConditioningInput]:
        """CLIP's embedding and the image's latents, zeros in the negative half, and three numbers about the video."""
        channels, factor = self.latent_channels(checkpoint), self.pixels(checkpoint)
        embedding = Conditioning(name="image_embeds", source="image", negative="zeros")
        latents = Conditioning(name="image_latents", source="image", negative="zeros")
        row = (float(FPS - 1), float(MOTION_BUCKET), NOISE_STRENGTH)  # trained with one frame a second less
        ids = Conditioning(name="added_time_ids", source="constant")
        width = int(self.config(checkpoint, "image_encoder")["projection_dim"])
        return (
            ConditioningInput(embedding, (1, width), attended=True),
            ConditioningInput(latents, (channels, size.height // factor, size.width // factor)),
            ConditioningInput(ids, (len(row),), follows_dtype=False, value=row),
        )

    def guidance_ramp(self, latents: Sequence[int]) -> Tensor | None:
        return torch.linspace(0, 1, latents[0]).reshape(1, -1, 1, 1, 1)

    def image(self, encoders: Sequence[nn.Module], checkpoint: Checkpoint, size: Size) -> nn.Module:
        encoder, vae = encoders
        return _Image(encoder, vae, *normalisation(checkpoint))

    def size_multiple(self, checkpoint: Checkpoint) -> int:
        """The U-Net joins its halves without trimming, so every level must halve evenly."""
        levels = len(self.config(checkpoint, "unet")["block_out_channels"])
        return self.pixels(checkpoint) * int(2 ** (levels - 1))

    def default_size(self, checkpoint: Checkpoint) -> Size:
        return Size(height=HEIGHT, width=WIDTH)

    def default_frames(self, checkpoint: Checkpoint) -> int:
        return int(self.config(checkpoint, "unet")["num_frames"])

    def encode_image_with(self, pipe: Any, picture: Tensor, noise: Tensor, size: Size) -> Texts:
        image = PIL.Image.fromarray(picture[0].numpy())
        pixels = pipe.video_processor.preprocess(image, height=image.height, width=image.width)
        embeds = pipe._encode_image(image, "cpu", 1, False)
        return {
            "image_embeds": embeds,
            "image_latents": pipe._encode_vae_image(pixels + NOISE_STRENGTH * noise, "cpu", 1, False),
        }

    def call(self, pipe: Any, conditioning: Texts, guidance_scale: float, guidance_rescale: float) -> dict[str, Any]:
        """The pipeline encodes a picture itself: what one was made into is put in the place of its encoders."""

        def halves(name: str) -> Tensor:
            tensors = [conditioning.get(f"{name}.{half}") for half in ("negative", "positive")]
            return torch.cat([tensor for tensor in tensors if tensor is not None])

        latents = conditioning["image_latents.positive"]
        pipe._encode_image = lambda *_args, **_options: halves("image_embeds")
        pipe._encode_vae_image = lambda *_args, **_options: halves("image_latents")
        return {
            "image": torch.zeros(len(latents), 3, 8, 8),
            "min_guidance_scale": 1.0,
            "max_guidance_scale": guidance_scale,
            "fps": FPS,
            "motion_bucket_id": MOTION_BUCKET,
            "noise_aug_strength": NOISE_STRENGTH,
        }


class _Image(nn.Module):
    """A picture, uint8 [1, H, W, 3], and noise [1, 3, H, W] to ``image_embeds`` [1, 1, P] and ``image_latents``.

    CLIP sees the picture resized to its own size, as the pipeline does it; the autoencoder sees it with noise.
    """

    def __init__(self, encoder: nn.Module, vae: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.image_encoder = encoder
        self.vae = vae
        # Imported late: the module wants libraries of image processing that only this needs.
        from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion

        self._resize = pipeline_stable_video_diffusion._resize_with_antialiasing
        self.register_buffer("mean", torch.tensor(mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, picture: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        pixels = picture.permute(0, 3, 1, 2).float() / 255 * 2 - 1
        small = (self._resize(pixels, (CLIP_SIDE, CLIP_SIDE)) + 1) / 2
        small = (small - self.mean) / self.std
        dtype = next(self.image_encoder.parameters()).dtype
        embeds = self.image_encoder(small.to(dtype)).image_embeds.unsqueeze(1)
        dtype = next(self.vae.parameters()).dtype
        noised = pixels + NOISE_STRENGTH * noise
        encode = self.vae.encode
        assert callable(encode)
        latents: Tensor = encode(noised.to(dtype)).latent_dist.mode()
        return embeds, latents.to(embeds.dtype)
