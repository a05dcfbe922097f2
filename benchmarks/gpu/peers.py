"""What users would otherwise take: diffusers' pipelines around the same network, in turns with an engine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.gpu.setting import (
    CASES,
    Clock,
    Setting,
    one_line,
    plans_of,
    request,
    session_of,
    take,
)
from tgate_engine.manifest import Manifest
from tgate_engine.plan import Plan
from tgate_runtime.binding import Binding
from tgate_runtime.verify import relative_error


def peers(setting: Setting) -> dict[str, Any]:
    """Whole loops of diffusers' own pipeline, of the same with torch.compile, and of the ``tgate`` package, in turns
    with those of ``setting.engine``. ``differs``: how far a peer's final latents are from the engine's, relative.
    A peer that fails is left out, with what it said."""
    import torch

    opened, clock = setting.open(), Clock(setting.device)
    manifest, plans = opened.manifest, plans_of(opened.manifest)
    start, rows = request(manifest, setting.seed)
    session = session_of(setting, opened, plans)
    loop: dict[str, Callable[[], object]] = {}
    ours: dict[str, NDArray[np.float32]] = {}
    for name in ("gated", "ungated"):
        binding = Binding(session, plans[name], 1)
        loop[f"{setting.engine} {name}"] = lambda binding=binding: take(binding, start, rows, Clock("cpu"))  # type: ignore[misc]
        loop[f"{setting.engine} {name}"]()
        ours[name] = binding.latents()
    plan, sampler = plans["gated"], plans["gated"].sampler.name
    method = {"gate_step": plan.schedule.gate, "sp_interval": plan.schedule.self_interval, "fi_interval": 1}
    pipes: dict[str, Callable[[], Any]] = {
        "diffusers eager": lambda: _pipeline(setting, manifest, sampler),
        "torch.compile": lambda: _compiled(_pipeline(setting, manifest, sampler), setting.compile_mode),
        "tgate eager gated": lambda: _gating(_pipeline(setting, manifest, sampler), manifest.family),
    }
    failed, first_s = {}, {}
    differs: dict[str, float | None] = {}
    for name, build in pipes.items():
        begin = time.perf_counter()
        try:
            pipe = build()
            asked = _asked(manifest, plan, start, rows, next(iter(_network(pipe).parameters())))
            asked |= {**method, "warm_up": plan.schedule.warm_up} if "tgate" in name else {}
            run = pipe.tgate if "tgate" in name else pipe
            latents = run(**asked).images.float().cpu().numpy()
        except Exception as error:
            failed[name] = one_line(error)
            continue
        first_s[name] = time.perf_counter() - begin
        # The same work, or the times mean nothing. Random weights may overflow: null, since JSON has no NaN.
        apart = relative_error(latents, ours["gated" if "tgate" in name else "ungated"])
        differs[name] = None if np.isnan(apart) else apart
        loop[name] = lambda run=run, asked=asked: run(**asked)  # type: ignore[misc]
    taken: dict[str, list[float]] = {name: [] for name in loop}
    for turn in range(setting.warm_ups + setting.repeats):
        for name, once in loop.items():
            begin_mark = clock.mark()
            once()
            if turn >= setting.warm_ups:
                taken[name].append(clock.ms(begin_mark, clock.mark()))
    medians = {name: statistics.median(runs) for name, runs in taken.items()}
    told: dict[str, Any] = {"engine": setting.engine, "torch": torch.__version__, "compile_mode": setting.compile_mode}
    told |= {"clock": clock.name, "differs": differs, "first_s": first_s, "failed": failed}
    return {**told, "ms": medians, "runs_ms": taken}


def _pipeline(setting: Setting, manifest: Manifest, sampler: str) -> Any:
    import torch
    from diffusers import PixArtAlphaPipeline, StableDiffusionXLPipeline

    from tgate_export.job import prepare
    from tgate_export.modules import real_module
    from tgate_export.schedulers import make_scheduler

    job = prepare(CASES[setting.model].settings(setting.model, height=manifest.height, width=manifest.width))
    network = real_module(job.family, job.checkpoint, job.family.denoiser, getattr(torch, manifest.dtype))
    parts: dict[str, Any] = {"vae": None, "text_encoder": None, "tokenizer": None}
    parts["scheduler"] = make_scheduler(sampler, manifest.scheduler)
    if manifest.family == "sdxl":
        pipe = StableDiffusionXLPipeline(unet=network, text_encoder_2=None, tokenizer_2=None, **parts)
    else:
        pipe = PixArtAlphaPipeline(transformer=network, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(setting.device)


def _network(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def _compiled(pipe: Any, mode: str) -> Any:
    import torch

    setattr(pipe, "unet" if hasattr(pipe, "unet") else "transformer", torch.compile(_network(pipe), mode=mode))
    return pipe


def _gating(pipe: Any, family: str) -> Any:
    import tgate

    loaders: Any = tgate
    return (loaders.TgateSDXLLoader if family == "sdxl" else loaders.TgatePixArtAlphaLoader)(pipe)


def _asked(
    manifest: Manifest, plan: Plan, start: NDArray[np.float32], rows: Mapping[str, NDArray[Any]], like: Any
) -> dict[str, Any]:
    """The same request, as a pipeline's arguments."""
    import torch

    tensors = {name: torch.from_numpy(np.array(row)).to(like) for name, row in {**rows, "latents": start}.items()}
    asked = {
        **{"latents": tensors["latents"], "num_inference_steps": len(plan.steps), "output_type": "latent"},
        **{"guidance_scale": plan.guidance_scale, "height": manifest.height, "width": manifest.width},
        "prompt_embeds": tensors["prompt_embeds.positive"],
        "negative_prompt_embeds": tensors["prompt_embeds.negative"],
    }
    if manifest.family == "sdxl":
        pooled = {"": tensors["pooled.positive"], "negative_": tensors["pooled.negative"]}
        return asked | {f"{half}pooled_prompt_embeds": tensor for half, tensor in pooled.items()}
    masks = {"": tensors["prompt_mask.positive"], "negative_": tensors["prompt_mask.negative"]}
    asked |= {f"{half}prompt_attention_mask": tensor for half, tensor in masks.items()}
    return asked | {"negative_prompt": None, "use_resolution_binning": False}
