"""What the training loop needs of a model: its parts with fresh weights, and the loss of a noised batch."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from training import pixart
from training.grammar import Scene
from training.models import build_text_encoders, build_unet, time_ids, training_noise
from training.reading import PlaceReader, TokenReader, token_targets
from training.settings import LATENT_PX, PixArtSettings, Settings
from training.text import encode, t5_encode, token_ids
from training.tokenizer import build_tokenizer


class Denoiser(Protocol):
    """A denoiser and its text encoders, `parts`, trained together to predict the noise."""

    parts: nn.ModuleDict

    def errors(
        self,
        noisy: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        captions: list[str],
        scenes: list[Scene],
        corners: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Squared error of the noise, and what else is to be minimised; both float [B].

        Latents are [B, 4, h, w] and show `scenes`; `corners`, int64 [B, 2], are the columns and rows at which windows
        of whole pictures start, None for whole pictures.
        """
        ...


class SdxlDenoiser:
    """`mini-sdxl`: a UNet, which needs not know where a window lies, and two CLIP encoders."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.tokenizer = build_tokenizer()
        text_1, text_2 = build_text_encoders(settings, self.tokenizer)
        unet = build_unet(settings)
        _start_transparent(unet)
        unet.to(memory_format=torch.channels_last)
        readers = {
            "reader": TokenReader(settings.unet_channels[-1]),
            "places": PlaceReader(settings.cross_attention_dim),
        }
        self.parts = nn.ModuleDict({"unet": unet, "text_1": text_1, "text_2": text_2, **readers})
        unet.mid_block.register_forward_hook(self._keep)

    def errors(
        self,
        noisy: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        captions: list[str],
        scenes: list[Scene],
        corners: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Denoiser.errors`; the reading of tokens, and of whole pictures' places off the text, is minimised too."""
        states, pooled = encode(self.parts["text_1"], self.parts["text_2"], token_ids(self.tokenizer, captions))
        conditions = {"text_embeds": pooled, "time_ids": time_ids(len(noisy))}
        noisy = noisy.contiguous(memory_format=torch.channels_last)
        # the flash kernel's backward pass is slow for so few tokens
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
            predicted = self.parts["unet"](noisy, timesteps, states, added_cond_kwargs=conditions).sample.float()
        errors = (predicted - noise).square().mean(dim=(1, 2, 3))
        deep = LATENT_PX // self._states.shape[-1] if corners is None else noisy.shape[-1] // self._states.shape[-1]
        targets = token_targets(scenes, corners, self._states.shape[-1], deep)
        beside = self.parts["reader"](self._states.flatten(2).transpose(1, 2), targets)
        if corners is None:
            said = torch.tensor([bool(caption) for caption in captions])
            beside = beside + self.parts["places"](states, targets["pair"]) * said
        return errors, self.settings.reading_weight * beside

    def _keep(self, _module: nn.Module, _args: object, output: torch.Tensor) -> None:
        self._states = output.float()


class PixArtDenoiser:
    """`mini-pixart`: a transformer, which is told where a window lies, and a T5 encoder."""

    def __init__(self, settings: PixArtSettings) -> None:
        self.settings = settings
        self.tokenizer = pixart.build_tokenizer()
        transformer = pixart.build_transformer(settings)
        pixart.start_transparent(transformer)
        text = pixart.build_text_encoder(settings, self.tokenizer)
        self.parts = nn.ModuleDict({"transformer": transformer, "text": text, "reader": TokenReader(settings.width)})
        transformer.transformer_blocks[settings.reading_layer - 1].register_forward_hook(self._keep)
        self._betas = training_noise().betas
        self._alphas = training_noise().alphas_cumprod

    def errors(
        self,
        noisy: torch.Tensor,
        noise: torch.Tensor,
        timesteps: torch.Tensor,
        captions: list[str],
        scenes: list[Scene],
        corners: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `Denoiser.errors`; the variance's bound and the reading of tokens are minimised too."""
        transformer = self.parts["transformer"]
        states, mask = t5_encode(self.parts["text"], self.tokenizer, captions)
        positions = transformer.pos_embed
        if corners is not None:
            patch = self.settings.patch
            transformer.pos_embed = pixart.WindowedPatches(
                positions, corners.div(patch, rounding_mode="floor"), LATENT_PX // patch
            )
        try:
            # twice as fast as float32 and the flash kernel, whose backward pass is slow for so few tokens
            with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
                predicted = transformer(
                    noisy,
                    encoder_hidden_states=states,
                    encoder_attention_mask=mask,
                    timestep=timesteps,
                    added_cond_kwargs={"resolution": None, "aspect_ratio": None},
                ).sample.float()
        finally:
            transformer.pos_embed = positions
        mean, variance = predicted.chunk(2, dim=1)
        errors = (mean - noise).square().mean(dim=(1, 2, 3))
        bound = self.variance_bound(mean.detach(), variance, noise, timesteps)
        patch = self.settings.patch
        targets = token_targets(scenes, corners, noisy.shape[-1] // patch, patch)
        reading = self.parts["reader"](self._states, targets)
        return errors, self.settings.variance_weight * bound + self.settings.reading_weight * reading

    def _keep(self, _module: nn.Module, _args: object, output: torch.Tensor) -> None:
        self._states = output.float()

    def variance_bound(
        self, mean: torch.Tensor, variance: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """KL of the true and the predicted reverse step in bits, float [B] (Nichol & Dhariwal 2021, section 3.1).

        `mean` is the noise predicted. Both Gaussians have means linear in the noise, so only the difference counts;
        the first step, whose true variance is zero, borrows that of the second.
        """
        beta, alpha_bar = self._betas[timesteps], self._alphas[timesteps]
        second = timesteps.clamp(min=1)
        true = self._betas[second] * (1 - self._alphas[second - 1]) / (1 - self._alphas[second])
        shape = (-1, 1, 1, 1)
        share = (variance + 1) / 2
        log_predicted = share * beta.log().view(shape) + (1 - share) * true.log().view(shape)
        scale = (beta.square() / ((1 - beta) * (1 - alpha_bar))).view(shape)  # of squared noise in the mean
        log_true = true.log().view(shape)
        ratio = (true.view(shape) + scale * (mean - noise).square()) * torch.exp(-log_predicted)
        nats = 0.5 * (log_predicted - log_true + ratio - 1)
        return nats.mean(dim=(1, 2, 3)) / math.log(2)


@torch.no_grad()
def _start_transparent(unet: UNet2DConditionModel) -> None:
    """Zero the last layer of every residual branch, so that early gradients reach all depths undisturbed."""
    for name, module in unet.named_modules():
        if name.endswith((".conv2", ".proj_out", "conv_out", ".ff.net.2", ".to_out.0")):
            scale = 0.2 if name.endswith((".ff.net.2", ".to_out.0")) else 0.0
            module.weight *= scale
            module.bias *= scale
