"""Stable Video Diffusion: a U-Net over frames that an image conditions, and no text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import diffusers
import torch
import transformers
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_engine.manifest import Conditioning
from tgate_export.checkpoints import Checkpoint
from tgate_export.families.base import ConditioningInput, Family, Size, unet_attention, vae_factor
from tgate_export.gating import AttentionSite, Halves

FPS = 7
MOTION_BUCKET = 127
NOISE_STRENGTH = 0.02
"""diffusers' defaults: frames a second, the amount of motion, and the noise added to the image."""

SIZE = Size(height=576, width=1024)


class StableVideo(Family):
    """Stable Video Diffusion (arXiv 2311.15127), in diffusers layout. Latents are [F, C, h, w].

    The network sees the image twice: as CLIP's embedding, in cross-attention, and as latents beside every frame's.
    Guidance grows from 1 at the first frame to its scale at the last.
    """

    name = "svd"
    pipeline_classes = ("StableVideoDiffusionPipeline",)
    classes: Mapping[str, type[nn.Module]] = {
        "unet": diffusers.UNetSpatioTemporalConditionModel,
        "vae": diffusers.AutoencoderKLTemporalDecoder,
        "image_encoder": transformers.CLIPVisionModelWithProjection,
    }
    denoiser = "unet"
    image_components = ("image_encoder", "vae")
    after_gate: Halves = "positive"
    frames_axis = 1
    fps = FPS

    def check(self, checkpoint: Checkpoint) -> None:
        channels = int(checkpoint.config("vae")["latent_channels"])
        found = checkpoint.config("unet").get("in_channels")
        if found != 2 * channels:
            raise ExportError(
                f"{checkpoint.where}: the unet takes {found} channels, Stable Video Diffusion takes the latents and "
                f"the image's: {2 * channels}; this checkpoint is of another architecture"
            )

    def attention(self, denoiser: nn.Module) -> tuple[AttentionSite, ...]:
        """Spatial and temporal blocks alike."""
        return unet_attention(denoiser)

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
        channels, factor = int(checkpoint.config("vae")["latent_channels"]), vae_factor(checkpoint.config("vae"))
        embedding = Conditioning(name="image_embeds", source="image", negative="zeros")
        latents = Conditioning(name="image_latents", source="image", negative="zeros")
        row = (float(FPS - 1), float(MOTION_BUCKET), NOISE_STRENGTH)  # trained with one frame a second less
        ids = Conditioning(name="added_time_ids", source="constant", value=row)
        width = int(checkpoint.config("image_encoder")["projection_dim"])
        return (
            ConditioningInput(embedding, (1, width)),
            ConditioningInput(latents, (channels, size.height // factor, size.width // factor)),
            ConditioningInput(ids, (len(row),), follows_dtype=False),
        )

    def guidance_ramp(self, latents: Sequence[int]) -> Tensor | None:
        return torch.linspace(0, 1, latents[0]).reshape(1, -1, 1, 1, 1)

    def image(self, encoders: Sequence[nn.Module], checkpoint: Checkpoint) -> nn.Module:
        return _Image(*encoders)

    def size_multiple(self, checkpoint: Checkpoint) -> int:
        """The U-Net joins its halves without trimming, so every level must halve evenly."""
        levels = len(checkpoint.config("unet")["block_out_channels"])
        return vae_factor(checkpoint.config("vae")) * int(2 ** (levels - 1))

    def default_size(self, checkpoint: Checkpoint) -> Size:
        return Size(height=SIZE.height, width=SIZE.width, frames=int(checkpoint.config("unet")["num_frames"]))


class _Image(nn.Module):
    """A picture, uint8 [1, H, W, 3], and noise [1, 3, H, W] to ``image_embeds`` [1, 1, P] and ``image_latents``.

    CLIP sees the picture resized to its own size, as the pipeline does it; the autoencoder sees it with noise.
    """

    def __init__(self, encoder: nn.Module, vae: nn.Module) -> None:
        super().__init__()
        self.image_encoder = encoder
        self.vae = vae
        mean, std = transformers.image_utils.OPENAI_CLIP_MEAN, transformers.image_utils.OPENAI_CLIP_STD
        # Imported late: the module wants libraries of image processing that only this needs.
        from diffusers.pipelines.stable_video_diffusion import pipeline_stable_video_diffusion

        self._resize = pipeline_stable_video_diffusion._resize_with_antialiasing
        self.register_buffer("mean", torch.tensor(mean).reshape(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).reshape(1, 3, 1, 1), persistent=False)

    def forward(self, picture: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        pixels = picture.permute(0, 3, 1, 2).float() / 255 * 2 - 1
        side = int(self.image_encoder.config.image_size)
        small = (self._resize(pixels, (side, side)) + 1) / 2
        small = (small - self.mean) / self.std
        dtype = next(self.image_encoder.parameters()).dtype
        embeds = self.image_encoder(small.to(dtype)).image_embeds.unsqueeze(1)
        dtype = next(self.vae.parameters()).dtype
        noised = pixels + NOISE_STRENGTH * noise
        encode = self.vae.encode
        assert callable(encode)
        latents: Tensor = encode(noised.to(dtype)).latent_dist.mode()
        return embeds, latents.to(embeds.dtype)
