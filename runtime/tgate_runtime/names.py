"""Arguments by the names that diffusers has for them: what a request takes instead."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

_PLAN = "plan=NAME takes a plan of the bundle, and `tgate plan` adds one"
_SIZE = 'size="WIDTHxHEIGHT" takes one of the bundle\'s sizes'
INSTEAD: Mapping[str, str] = {
    "num_inference_steps": f"steps belong to a plan: {_PLAN}",
    "timesteps": f"timesteps belong to a plan's sampler: {_PLAN}",
    "sigmas": f"noise levels belong to a plan's sampler: {_PLAN}",
    "gate_step": f"the gate belongs to a plan: {_PLAN}",
    "scheduler": f"the sampler belongs to a plan: {_PLAN}",
    "height": _SIZE,
    "width": _SIZE,
    "num_frames": "frames are settled at export: tgate-export --frames F",
    "video_length": "frames are settled at export: tgate-export --frames F",
    "num_images_per_prompt": "num_images=N draws N of each prompt",
    "num_videos_per_prompt": "num_images=N draws N of each prompt",
    "latents": "initial_latents=X takes noise in place of a seed's",
    "output_type": "a result has images, and latents beside them; a bundle without a decoder gives latents alone",
    "return_dict": "a call gives a Result",
    "callback": "on_step=F is called after each step",
    "callback_steps": "on_step=F is called after each step",
    "callback_on_step_end": "on_step=F is called after each step",
    "callback_on_step_end_tensor_inputs": "on_step=F is called after each step",
    "negative_prompt_embeds": "prompt_embeds hold the negative half, as <name>.negative",
    "pooled_prompt_embeds": "prompt_embeds hold every tensor of a prompt, as <name>.<half>",
    "guidance_rescale": "it is settled at export: tgate-export --guidance-rescale R",
    "mask_image": "mask=M says what of the image is drawn anew",
    "control_image": "controls={NAME: Control(image=…)} takes a control picture for each ControlNet",
    "controlnet_conditioning_scale": "each of controls has its scale: Control(image=…, scale=S)",
    "control_guidance_start": "each of controls has its start: Control(image=…, start=A)",
    "control_guidance_end": "each of controls has its end: Control(image=…, end=B)",
    "guess_mode": "ControlNets look at both halves of guidance; there is no guess mode",
    "clip_skip": "it is settled at export: tgate-export --clip-skip N",
}
"""By a name of diffusers', what there is here."""


def with_hints(call: Callable[P, T]) -> Callable[P, T]:
    """``call``, whose TypeError for an argument that it does not have says what to give instead."""
    known = inspect.signature(call).parameters

    @functools.wraps(call)
    def checked(*args: P.args, **kwargs: P.kwargs) -> T:
        for name in kwargs:
            if name not in known:
                hint = INSTEAD.get(name)
                raise TypeError(f"a pipeline takes no {name}{'' if hint is None else f'; {hint}'}")
        return call(*args, **kwargs)

    return checked
