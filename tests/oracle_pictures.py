"""Eager references for requests that begin from a picture: diffusers' own pipelines, ungated and gated.

:func:`latents_from` runs diffusers' image-to-image pipeline of a checkpoint, or its inpainting pipeline, in float32 on
the CPU. With a gate, the method is written out around its U-Net, which the pipeline calls as it always does: hooks
keep, store and replace what attention modules give, and from the gate on the negative half alone is computed and given
for both, so that guidance changes nothing. The method counts the calls that are made, PNDM's extra first one apart.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
from diffusers.models.autoencoders import vae
from PIL import Image

from tests.oracle import _actions
from tgate_export.sampling import make_scheduler

Draws = Callable[[int, tuple[int, ...]], torch.Tensor]
"""Standard normal noise of a shape, by how often it was drawn before."""


@dataclass(frozen=True, kw_only=True)
class Gate:
    """The method's settings."""

    m: int
    k: int = 1
    f: int = 1
    w: int = 2


def latents_from(
    checkpoint: Path,
    cls: str,
    *,
    sampler: str,
    steps: int,
    strength: float,
    image: Image.Image,
    prompt: str,
    negative_prompt: str | None,
    guidance_scale: float,
    draws: Draws,
    gate: Gate | None = None,
    **more: Any,
) -> torch.Tensor:
    """Final latents [1, 4, h, w]. ``cls``: diffusers' pipeline. ``image``: of the output's size. ``more``: what else
    the pipeline is given, such as a mask."""
    pipe, config = _loaded(checkpoint, cls)
    pipe.scheduler = make_scheduler(sampler, config)
    with _drawn(pipe, draws), torch.no_grad(), ExitStack() as stack:
        if gate is not None:
            extra = 1 if sampler == "pndm" else 0
            guided = guidance_scale > 1 and pipe.unet.config.time_cond_proj_dim is None
            stack.enter_context(gated(pipe.unet, gate, first=-extra, guided=guided))
        result = pipe(
            prompt=prompt,
            negative_prompt=negative_prompt,
            image=image,
            strength=strength,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            output_type="latent",
            **more,
        )
    latents: torch.Tensor = result.images
    return latents


@functools.lru_cache(maxsize=2)
def _loaded(checkpoint: Path, cls: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline, and the configuration of the checkpoint's own scheduler."""
    pipe: Any = getattr(diffusers, cls).from_pretrained(checkpoint, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    return pipe, {**pipe.scheduler.config, "_class_name": type(pipe.scheduler).__name__}


@contextmanager
def _drawn(pipe: Any, draws: Draws) -> Iterator[None]:
    """Whatever draws noise gets that of ``draws``, in the order in which it asks."""
    count = 0

    def draw(shape: Any, **_options: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        return draws(count - 1, tuple(shape))

    modules = (vae, sys.modules[type(pipe).__module__], sys.modules[type(pipe.scheduler).__module__])
    with ExitStack() as stack:
        for module in modules:
            if hasattr(module, "randn_tensor"):
                stack.enter_context(mock.patch.object(module, "randn_tensor", draw))
        yield


def _first_half(value: Any) -> Any:
    """Of a tensor, or of each tensor in a list, as an IP-Adapter's pictures are."""
    return [each.chunk(2)[0] for each in value] if isinstance(value, list) else value.chunk(2)[0]


@contextmanager
def gated(unet: torch.nn.Module, gate: Gate, *, first: int, guided: bool) -> Iterator[None]:
    stored: dict[str, torch.Tensor] = {}
    now: dict[str, str] = {}
    plain, step = unet.forward, first

    def hook_for(name: str) -> Callable[..., torch.Tensor]:
        kind = "cross" if name.endswith("attn2") else "self"

        def hook(_module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
            action = now[kind]
            if action == "reuse":
                assert stored[name].shape == output.shape
                return stored[name]
            if action == "store":
                stored[name] = output
            if action == "store_mean":
                stored[name] = sum(output.chunk(2)) / 2
            return output

        return hook

    def forward(sample: torch.Tensor, timestep: Any, encoder_hidden_states: torch.Tensor, **options: Any) -> Any:
        nonlocal step
        now["self"], now["cross"] = _actions(step, m=gate.m, k=gate.k, f=gate.f, w=gate.w, guided=guided)
        step += 1
        if step <= gate.m or not guided:
            return plain(sample, timestep, encoder_hidden_states=encoder_hidden_states, **options)
        added = options.pop("added_cond_kwargs", None) or {}
        if (down := options.get("down_block_additional_residuals")) is not None:  # of ControlNets
            options["down_block_additional_residuals"] = [each.chunk(2)[0] for each in down]
            options["mid_block_additional_residual"] = options["mid_block_additional_residual"].chunk(2)[0]
        output = plain(
            sample.chunk(2)[0],
            timestep,
            encoder_hidden_states=encoder_hidden_states.chunk(2)[0],
            added_cond_kwargs={name: _first_half(value) for name, value in added.items()},
            **options,
        )[0]
        return (torch.cat([output, output]),)

    with ExitStack() as stack:
        for name, module in unet.named_modules():
            if name.endswith(("attn1", "attn2")):
                stack.callback(module.register_forward_hook(hook_for(name)).remove)
        stack.enter_context(mock.patch.object(unet, "forward", forward))
        yield
