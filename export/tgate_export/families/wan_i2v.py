"""Wan from a picture: the text-to-video network, told beside its noise what the first frame is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import PIL.Image
import torch
import transformers
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_engine.manifest import Conditioning
from tgate_export.checkpoints import Checkpoint
from tgate_export.families.base import ConditioningInput, Scaling, Size, Texts
from tgate_export.families.facts import WAN_I2V
from tgate_export.families.wan import Wan
from tgate_export.pictures import ClipPicture, check_processor, normalisation

TOGETHER = 4
"""Frames that the autoencoder encodes at a time, but for the first; what is known of a latent frame has as many
channels."""

_ENCODER, _PROCESSOR = "image_encoder", "image_processor"


class WanImageToVideo(Wan):
    """Wan 2.1 and Wan 2.2 of 14 billion parameters, image to video, in diffusers layout. Latents are those of
    :class:`~tgate_export.families.wan.Wan`.

    The network sees the picture as a video of it and black after it, encoded, beside the noise: [4 + C, F, h, w], the
    first four of them 1 in the frame that is known. Wan 2.1's sees it in cross-attention as well, as CLIP's last hidden
    states but one, with keys and values of their own; what that adds to the text's is summed within the module.
    """

    facts = WAN_I2V
    pipeline_classes = ("WanImageToVideoPipeline",)
    classes: Mapping[str, type[nn.Module]] = {**Wan.classes, _ENCODER: transformers.CLIPVisionModel}
    aliases: Mapping[str, tuple[str, ...]] = {"CLIPVisionModel": ("CLIPVisionModelWithProjection",)}
    image_components = (_ENCODER, "vae")
    picture_processor = _PROCESSOR

    def image_parts(self, checkpoint: Checkpoint) -> tuple[str, ...]:
        return self.image_components if self._attends(checkpoint) else ("vae",)

    def _attends(self, checkpoint: Checkpoint) -> bool:
        """Whether the picture is attended to, as in Wan 2.1."""
        return self.config(checkpoint, "transformer")["image_dim"] is not None

    def check_networks(self, checkpoint: Checkpoint) -> None:
        config, channels = self.config(checkpoint, "transformer"), self.latent_channels(checkpoint)
        if self.config(checkpoint, "vae")["scale_factor_temporal"] != TOGETHER:
            raise ExportError(
                f"{checkpoint.where}: vae/config.json packs {self.config(checkpoint, 'vae')['scale_factor_temporal']} "
                f"frames (temperal_downsample); pictures are encoded {TOGETHER} frames at a time, and it must agree"
            )
        if config["in_channels"] != 2 * channels + TOGETHER:
            raise ExportError(
                f"{checkpoint.where}: the transformer takes {config['in_channels']} channels; image to video takes the "
                f"latents, the picture's and {TOGETHER} that say which frame is known: {2 * channels + TOGETHER}; this "
                "checkpoint is of another architecture"
            )
        if config["out_channels"] != channels:
            raise ExportError(
                f"{checkpoint.where}: the transformer gives {config['out_channels']} channels, its latents have "
                f"{channels}; this checkpoint is of another architecture"
            )
        if config["pos_embed_seq_len"] is not None:
            raise ExportError(
                f"{checkpoint.where}: the transformer has pos_embed_seq_len = {config['pos_embed_seq_len']}, as models "
                "between a first and a last picture have (FLF2V); image to video from a first one alone is exported"
            )
        if (config["image_dim"] is None) != (config["added_kv_proj_dim"] is None):
            raise ExportError(
                f"{checkpoint.where}: the transformer has image_dim = {config['image_dim']} and added_kv_proj_dim = "
                f"{config['added_kv_proj_dim']}; Wan 2.1 has both, Wan 2.2 neither"
            )
        if self._attends(checkpoint):
            encoder = self.config(checkpoint, _ENCODER)
            if encoder["hidden_size"] != config["image_dim"]:
                raise ExportError(
                    f"{checkpoint.where}: the transformer has image_dim = {config['image_dim']}, the {_ENCODER} has "
                    f"hidden_size = {encoder['hidden_size']}; they must agree"
                )
            checkpoint.named_class(_PROCESSOR)
            check_processor(checkpoint, int(encoder["image_size"]), _PROCESSOR, f"the {_ENCODER}")
            normalisation(checkpoint, _PROCESSOR)

    def denoise(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        guidance: Tensor,
        conditioning: Mapping[str, Tensor],
    ) -> Tensor:
        output: Tensor = denoiser(
            hidden_states=torch.cat([latents, conditioning["image_latents"]], dim=1),
            timestep=timesteps,
            encoder_hidden_states=conditioning["prompt_embeds"],
            encoder_hidden_states_image=conditioning.get("image_embeds"),
            return_dict=False,
        )[0]
        return output

    def conditioning(self, checkpoint: Checkpoint, size: Size) -> Sequence[ConditioningInput]:
        """The text, and the picture, the same in both halves."""
        inputs = [*super().conditioning(checkpoint, size)]
        if self._attends(checkpoint):
            config = self.config(checkpoint, _ENCODER)
            tokens = (int(config["image_size"]) // int(config["patch_size"])) ** 2 + 1
            embeds = Conditioning(name="image_embeds", source="image", negative="same")
            inputs.append(ConditioningInput(embeds, (tokens, int(config["hidden_size"])), attended=True))
        channels, *places = self.latents(checkpoint, size)
        latents = Conditioning(name="image_latents", source="image", negative="same")
        return (*inputs, ConditioningInput(latents, (TOGETHER + channels, *places)))

    def image(self, encoders: Sequence[nn.Module], checkpoint: Checkpoint, size: Size) -> nn.Module:
        *clip, vae = encoders
        prepare: nn.Module | None = None
        if clip:
            side = int(self.config(checkpoint, _ENCODER)["image_size"])
            prepare = ClipPicture(size.height, size.width, side, *normalisation(checkpoint, _PROCESSOR))
        return _Picture(vae, self.scaling(checkpoint), size.frames, clip[0] if clip else None, prepare)

    def encode_image_with(self, pipe: Any, picture: Tensor, noise: Tensor, size: Size) -> Texts:
        image = PIL.Image.fromarray(picture[0].numpy())
        pixels = pipe.video_processor.preprocess(image, height=size.height, width=size.width)
        sides, nothing = (size.height, size.width, size.frames), torch.zeros(1)
        _, known = pipe.prepare_latents(
            pixels, 1, pipe.vae.config.z_dim, *sides, torch.float32, "cpu", None, nothing, None
        )
        seen = {} if pipe.image_encoder is None else {"image_embeds": pipe.encode_image(image, "cpu")}
        return {**seen, "image_latents": known}

    def call(self, pipe: Any, conditioning: Texts, guidance_scale: float, guidance_rescale: float) -> dict[str, Any]:
        """The pipeline encodes a picture itself: what one was made into is put in the place of its encoders."""
        known = conditioning["image_latents.positive"]
        pipe.prepare_latents = lambda *given: (given[9], known)
        if (seen := conditioning.get("image_embeds.positive")) is not None:
            pipe.encode_image = lambda *_: seen[:1]  # which the pipeline repeats
        if pipe.vae is None:  # it is asked how many channels latents have
            pipe.vae = SimpleNamespace(config=SimpleNamespace(z_dim=known.shape[1] - TOGETHER))
        options = super().call(pipe, conditioning, guidance_scale, guidance_rescale)
        return {**options, "image": torch.zeros(len(known), 3, 8, 8)}


class _Picture(nn.Module):
    """A picture, uint8 [1, H, W, 3], to ``image_embeds`` [1, T, W] where there is an encoder of CLIP's, and
    ``image_latents`` [1, 4 + C, F, h, w]. Noise is taken as other models do, and left."""

    def __init__(
        self, vae: nn.Module, scaling: Scaling, frames: int, encoder: nn.Module | None, prepare: nn.Module | None
    ) -> None:
        super().__init__()
        self.image_encoder = encoder
        self.vae = vae
        self._prepare = prepare
        self._frames = frames
        self.register_buffer("mean", torch.tensor(scaling.mean).reshape(1, -1, 1, 1, 1), persistent=False)
        self.register_buffer("inverse", 1 / torch.tensor(scaling.std).reshape(1, -1, 1, 1, 1), persistent=False)

    def forward(self, picture: Tensor, noise: Tensor) -> tuple[Tensor, ...]:
        pixels = (picture.permute(0, 3, 1, 2).float() / 255 * 2 - 1).unsqueeze(2)
        # Zeros that are no constant, or engines would work out ahead what convolutions make of them, and keep it.
        black = (pixels * 0).expand(-1, -1, self._frames - 1, -1, -1)
        dtype, encode = next(self.vae.parameters()).dtype, self.vae.encode
        assert callable(encode)
        latents: Tensor = encode(torch.cat([pixels, black], dim=2).to(dtype)).latent_dist.mode().float()
        latents = (latents - self.mean) * self.inverse
        first = torch.ones(1, TOGETHER, 1, *latents.shape[3:])
        known = torch.cat([first, torch.zeros(1, TOGETHER, latents.shape[2] - 1, *latents.shape[3:])], dim=2)
        conditions = torch.cat([known, latents], dim=1).to(dtype)
        if self.image_encoder is None or self._prepare is None:
            return (conditions,)
        small: Tensor = self._prepare(picture)
        seen = self.image_encoder(small.to(next(self.image_encoder.parameters()).dtype), output_hidden_states=True)
        return seen.hidden_states[-2], conditions
