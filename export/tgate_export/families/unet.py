"""What Stable Diffusion, SDXL and Kolors share: a U-Net that text conditions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import diffusers
import torch
import transformers
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_engine.manifest import Conditioning, Guidance
from tgate_engine.step import half
from tgate_export.attention import AttentionSite
from tgate_export.checkpoints import Checkpoint
from tgate_export.families.base import ConditioningInput, Family, Size, Texts, control_component, side
from tgate_export.ip_adapter import ENCODER, PROJECTION, Reference, adapted, attach, check_encoder
from tgate_export.pictures import check_processor, normalisation

MASKED = "masked"
"""Conditioning of an inpainting network: the mask and, after it, the latents of what is left of the picture."""
TIME_IDS = 6
"""Original height and width, crop top and left, target height and width."""

_FURTHER_INPUTS = ("class_embed_type", "num_class_embeds")
"""Keys that give the network an input which the pipelines do not have."""
_LAYERED = ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal")
"""Blocks on a U-Net's way up each of whose residual blocks takes a skip connection."""


class TextUNet(Family):
    """A U-Net of diffusers that text conditions in cross-attention.

    One that was distilled to a consistency model takes the guidance scale as an input (arXiv 2310.04378, section 4.2)
    and has no second half.
    """

    denoiser = "unet"
    textual_inversions = True
    beside: Mapping[str, type[nn.Module]] = {ENCODER: transformers.CLIPVisionModelWithProjection}
    control_class = diffusers.ControlNetModel
    addition: str | None
    """The ``addition_embed_type`` of its networks: what conditions them outside cross-attention."""

    def check(self, checkpoint: Checkpoint) -> None:
        super().check(checkpoint)
        config = self.config(checkpoint, "unet")
        if config["addition_embed_type"] != self.addition:
            raise ExportError(
                f"{checkpoint.where}: the unet has addition_embed_type = {config['addition_embed_type']!r}, "
                f"{self.pipeline_classes[0]} has {self.addition!r}; this checkpoint is of another architecture"
            )
        for key in _FURTHER_INPUTS:
            if config[key] is not None:
                raise ExportError(
                    f"{checkpoint.where}: the unet has {key} = {config[key]!r} and so a further input, which "
                    f"{self.pipeline_classes[0]} does not give it; this checkpoint is of another architecture"
                )
        if config["encoder_hid_dim_type"] not in (None, "text_proj"):
            raise ExportError(
                f"{checkpoint.where}: the unet has encoder_hid_dim_type = {config['encoder_hid_dim_type']!r}, which "
                "wants an image beside the prompt; only text is exported"
            )
        if config["out_channels"] != self.latent_channels(checkpoint):
            raise ExportError(
                f"{checkpoint.where}: the unet takes {self.latent_channels(checkpoint)} channels of latents and gives "
                f"{config['out_channels']}; samplers want as many"
            )
        check_clip(self, checkpoint, self.text_components if self.facts.clip_skips else ())
        if (own := adapted(checkpoint)) is not None:
            side = check_encoder(own.directory(ENCODER), own.adapter, self.config(checkpoint, ENCODER))
            check_processor(checkpoint, side)
            normalisation(checkpoint)

    def build(self, checkpoint: Checkpoint, component: str) -> nn.Module:
        """With an IP-Adapter, the U-Net attends to pictures as well, and there are what encodes them and what makes
        tokens of that."""
        own = adapted(checkpoint)
        if own is not None and component == PROJECTION:
            return own.adapter.build().eval()
        module = super().build(checkpoint, component)
        if own is not None and component == self.denoiser:
            attach(module, own)
        return module

    def reference(self, checkpoint: Checkpoint, encoders: Sequence[nn.Module], *, guided: bool) -> nn.Module:
        own = adapted(checkpoint)
        assert own is not None
        encoder, projection = encoders
        hidden = own.adapter.kind == "plus"
        return Reference(encoder, projection, normalisation(checkpoint), hidden=hidden, guided=guided)

    def guidance(self, checkpoint: Checkpoint, scale: float) -> Guidance:
        if self.config(checkpoint, "unet")["time_cond_proj_dim"] is not None:
            return "embedded"
        return super().guidance(checkpoint, scale)

    def deep(self, checkpoint: Checkpoint, branch: int) -> str | None:
        return deep_module(checkpoint, self.skeleton(checkpoint, "unet"), branch)

    def finest(self, checkpoint: Checkpoint, sites: Sequence[AttentionSite]) -> tuple[str, ...]:
        return finest_modules(self.skeleton(checkpoint, "unet"), sites)

    def default_size(self, checkpoint: Checkpoint) -> Size:
        height, width = side(checkpoint, "unet", self.config(checkpoint, "unet")["sample_size"])
        factor = self.pixels(checkpoint)
        return Size(height=height * factor, width=width * factor)

    def predict(
        self,
        denoiser: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        guidance: Tensor,
        text: Tensor | tuple[Tensor, ...],
        added: Mapping[str, Tensor] | None = None,
        residuals: Sequence[Tensor] = (),
    ) -> Tensor:
        """The network's output, [N, C, h, w]; ``text``: what its cross-attention is given
        (:func:`~tgate_export.ip_adapter.attended`); ``added``: what conditions it outside of that; ``residuals``: of
        ControlNets."""
        assert isinstance(denoiser, diffusers.UNet2DConditionModel)
        width: Any = denoiser.config["time_cond_proj_dim"]
        output: Tensor = denoiser(
            latents,
            timesteps,
            timestep_cond=None if width is None else guidance_embedding(guidance, int(width)).to(latents.dtype),
            encoder_hidden_states=text,
            added_cond_kwargs=added,
            down_block_additional_residuals=residuals[:-1] or None,
            mid_block_additional_residual=residuals[-1] if residuals else None,
            return_dict=False,
        )[0]
        return output

    def residuals(
        self,
        net: nn.Module,
        latents: Tensor,
        timesteps: Tensor,
        text: Tensor,
        pictures: Tensor,
        added: Mapping[str, Tensor] | None = None,
    ) -> Sequence[Tensor]:
        """What a ControlNet gives, [N, C, h, w] each: of the way down, then of the middle. Pictures are embedded once,
        whatever halves look at them."""
        assert isinstance(net, diffusers.ControlNetModel)
        embedding: Any = net.controlnet_cond_embedding
        plain, times = embedding.forward, latents.shape[0] // pictures.shape[0]

        def once(rows: Tensor) -> Tensor:
            embedded: Tensor = plain(rows)
            return embedded if times == 1 else torch.stack([embedded] * times, 1).flatten(0, 1)

        embedding.forward = once
        try:
            down, middle = net(
                latents,
                timesteps,
                encoder_hidden_states=text,
                controlnet_cond=pictures,
                added_cond_kwargs=added,
                return_dict=False,
            )
        finally:
            del embedding.forward  # the class's own comes to light
        return (*down, middle)

    def check_control(self, checkpoint: Checkpoint, net: str) -> None:
        component = control_component(net)
        where = f"{checkpoint.where}: ControlNet {net}"
        config, unet = self.config(checkpoint, component), dict(self.config(checkpoint, "unet"))
        unet["in_channels"] = self.latent_channels(checkpoint)  # what lies around a mask, a ControlNet is not told
        for key in ("in_channels", "cross_attention_dim", "addition_embed_type"):
            if config[key] != unet[key]:
                raise ExportError(
                    f"{where} has {key} = {config[key]!r}, the unet {unet[key]!r}; a ControlNet belongs to one "
                    "architecture: give one of this model's"
                )
        if config["conditioning_channels"] != 3:
            raise ExportError(
                f"{where} looks at pictures of {config['conditioning_channels']} channels; control pictures have 3"
            )
        if config["global_pool_conditions"]:
            raise ExportError(
                f"{where} has global_pool_conditions = true, for which the pipeline goes over to its guess mode; that "
                "is not exported"
            )
        for key in (*_FURTHER_INPUTS, "encoder_hid_dim_type"):
            if config[key] is not None:
                raise ExportError(
                    f"{where} has {key} = {config[key]!r} and so a further input, which the pipeline does not give it"
                )


def masked(family: Family, checkpoint: Checkpoint, size: Size) -> tuple[ConditioningInput, ...]:
    """What an inpainting network is told of what lies around the mask; nothing of others."""
    if not family.inpaints(checkpoint):
        return ()
    channels, height, width = family.latents(checkpoint, size)
    around = Conditioning(name=MASKED, source="masked", negative="same")
    return (ConditioningInput(around, (1 + channels, height, width)),)


def beside_mask(latents: Tensor, conditioning: Mapping[str, Tensor]) -> Tensor:
    """What the network takes: latents [N, C, h, w] and, of an inpainting one, what lies around the mask after them."""
    return torch.cat([latents, conditioning[MASKED]], dim=1) if MASKED in conditioning else latents


def inpainting_call(conditioning: Texts, pixels: int) -> dict[str, Any]:
    """Arguments that have diffusers' inpainting pipeline begin from noise with that mask and those latents of what is
    left, ``masked.<half>`` [B, 1 + C, h, w]; nothing of other networks. ``pixels``: of a latent pixel."""
    if (around := conditioning.get(half(MASKED, "positive"))) is None:
        return {}
    mask = around[:, :1].repeat_interleave(pixels, 2).repeat_interleave(pixels, 3)
    return {
        "image": torch.zeros_like(mask).repeat(1, 3, 1, 1),  # nothing of it is left at that strength
        "mask_image": mask,
        "masked_image_latents": around[:, 1:],
        "strength": 1.0,
    }


def time_ids(size: Size) -> ConditioningInput:
    """The size row, [:data:`TIME_IDS`]: no crop, original and target size the output's."""
    row = (float(size.height), float(size.width), 0.0, 0.0, float(size.height), float(size.width))
    ids = Conditioning(name="time_ids", source="constant")
    return ConditioningInput(ids, (TIME_IDS,), follows_dtype=False, value=row)


def deep_module(checkpoint: Checkpoint, unet: nn.Module, branch: int) -> str | None:
    """The module before the last ``branch`` + 1 layers of a U-Net's way up.

    A layer is a residual block, and the attention after it where there is one; a block's last is the block itself, with
    what makes its output larger. None where there is one alone, or a block of a kind whose layers do not each take a
    skip connection; raises :class:`ExportError` where there are too few.
    """
    network: Any = unet
    if any(type(block).__name__ not in _LAYERED for block in network.up_blocks):
        return None
    names = [] if network.mid_block is None else ["mid_block"]
    for i, block in enumerate(network.up_blocks):
        kind = "attentions" if getattr(block, "attentions", None) else "resnets"
        names += [f"up_blocks.{i}.{kind}.{layer}" for layer in range(len(block.resnets) - 1)] + [f"up_blocks.{i}"]
    if len(names) < 2:
        return None
    if not 0 <= branch <= len(names) - 2:
        raise ExportError(
            f"{checkpoint.where}: --cache-branch must be from 0 to {len(names) - 2}, got {branch}: the unet has no "
            "more layers on its way up"
        )
    return names[-branch - 2]


def finest_modules(unet: nn.Module, sites: Sequence[AttentionSite]) -> tuple[str, ...]:
    """The self-attention modules of a U-Net's first level, counted from the finest, that has any; none where one of
    them is no first layer of a transformer block, whose input it attends to once that is normalised."""
    network: Any = unet
    levels = len(network.down_blocks)
    for level in range(levels):
        places = [f"down_blocks.{level}.", f"up_blocks.{levels - 1 - level}."]
        places += ["mid_block."] if level == levels - 1 else []
        found = [site.module for site in sites if site.kind == "self" and site.module.startswith(tuple(places))]
        if found:
            blocks = [name.removesuffix(".attn1") for name in found]
            plain = all(type(unet.get_submodule(block)) is BasicTransformerBlock for block in blocks)
            return tuple(found) if plain else ()
    return ()


def check_clip(family: Family, checkpoint: Checkpoint, components: Sequence[str]) -> None:
    """Raises :class:`ExportError` for CLIP text encoders that do not do as diffusers' pipelines expect."""
    for component in components:
        if family.config(checkpoint, component).get("use_attention_mask"):
            raise ExportError(
                f"{checkpoint.where}: {component}/config.json has use_attention_mask = true; text encoders that "
                "mask padding cannot be exported. Set it to false if the model was trained without the mask"
            )
        if checkpoint.config(component).get("is_causal") is False:
            raise ExportError(
                f"{checkpoint.where}: {component}/config.json has is_causal = false; CLIP's text encoders look "
                "back alone, and are exported so. Leave it out if the model was trained so"
            )


def guidance_embedding(scale: Tensor, width: int) -> Tensor:
    """A guidance scale [N] as sines and cosines [N, width] of 1000 (scale - 1), as consistency models take it."""
    half = width // 2
    # Written down as numbers, so that no engine computes them in its own way: the angles go up to thousands.
    decay = [10000.0 ** (-i / (half - 1)) for i in range(half)]
    angles = (1000 * (scale - 1))[:, None] * torch.tensor(decay, dtype=torch.float32)[None]
    return nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))
