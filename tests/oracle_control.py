"""Eager references for requests with control pictures: diffusers' own ControlNet pipelines, ungated and gated.

With a gate, the method is written out around the U-Net as in :mod:`tests.oracle_pictures`. The pipeline calls its
ControlNets as it always does, on both halves; from the gate on the U-Net takes the negative half of what they give.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from PIL import Image

from tests.oracle_pictures import Draws, Gate, _drawn, gated
from tests.tiny_ip_adapter import ENCODER
from tgate_export.sampling import make_scheduler


@dataclass(frozen=True, kw_only=True)
class Steered:
    """One ControlNet of a request, as diffusers is asked."""

    net: Path
    picture: Image.Image
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0


def latents_with(
    checkpoint: Path,
    cls: str,
    controls: Sequence[Steered],
    *,
    sampler: str,
    steps: int,
    prompt: str,
    negative_prompt: str | None,
    guidance_scale: float,
    draws: Draws,
    gate: Gate | None = None,
    adapter: Path | None = None,
    adapter_scale: float = 1.0,
    **more: Any,
) -> torch.Tensor:
    """Final latents [1, 4, h, w]. ``cls``: diffusers' pipeline. ``adapter``: an IP-Adapter's file. ``more``: what else
    it is given, such as a picture to begin from."""
    pipe, config = _loaded(checkpoint, cls, tuple(control.net for control in controls), adapter)
    if adapter is not None:
        pipe.set_ip_adapter_scale(adapter_scale)
    pipe.scheduler = make_scheduler(sampler, config)
    several = len(controls) > 1
    pictures = [control.picture for control in controls]
    picture = "control_image" if "image" in more else "image"
    with _drawn(pipe, draws), torch.no_grad(), ExitStack() as stack:
        if gate is not None:
            extra = 1 if sampler == "pndm" else 0
            guided = guidance_scale > 1 and pipe.unet.config.time_cond_proj_dim is None
            stack.enter_context(gated(pipe.unet, gate, first=-extra, guided=guided))
        result = pipe(
            prompt=prompt,
            negative_prompt=negative_prompt,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            output_type="latent",
            controlnet_conditioning_scale=[c.scale for c in controls] if several else controls[0].scale,
            control_guidance_start=[c.start for c in controls] if several else controls[0].start,
            control_guidance_end=[c.end for c in controls] if several else controls[0].end,
            **{picture: pictures if several else pictures[0]},
            **more,
        )
    latents: torch.Tensor = result.images
    return latents


@functools.lru_cache(maxsize=2)
def _loaded(
    checkpoint: Path, cls: str, nets: tuple[Path, ...], adapter: Path | None = None
) -> tuple[Any, dict[str, Any]]:
    """A pipeline, and the configuration of the checkpoint's own scheduler."""
    loaded = [diffusers.ControlNetModel.from_pretrained(net) for net in nets]
    own = loaded if len(loaded) > 1 else loaded[0]
    pipe: Any = getattr(diffusers, cls).from_pretrained(checkpoint, controlnet=own, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    if adapter is not None:
        pipe.load_ip_adapter(str(adapter.parent), subfolder="", weight_name=adapter.name, image_encoder_folder=ENCODER)
    return pipe, {**pipe.scheduler.config, "_class_name": type(pipe.scheduler).__name__}
