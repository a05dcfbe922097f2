"""What users would otherwise take: diffusers' pipelines around the same network, in turns with an engine."""

from __future__ import annotations

import copy
import functools
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.loops import Clock, one_line, plans_of, request, take
from tgate_engine.manifest import Manifest
from tgate_engine.plan import Plan
from tgate_runtime.session import Session
from tgate_runtime.state import State
from tgate_runtime.verify import relative_error

OPENVINO_ALONE = "OpenVINO, the network alone"


def compare(
    session: Session,
    engine: str,
    settings: Any,
    *,
    device: str = "cpu",
    compile_mode: str = "default",
    openvino: str = "",
    repeats: int,
    warm_ups: int = 0,
    seed: int = 0,
) -> dict[str, Any]:
    """Whole loops of diffusers' own pipeline, of the same with torch.compile, and of the ``tgate`` package, in turns
    with those of a session that holds the gated and the ungated plan's graphs; ``engine`` is what to call it.

    ``settings``: those that the bundle was exported with, for its network. ``first_s``: from building a peer to the end
    of its first loop, which the turns leave out. ``openvino``: a precision in which the network alone runs there, too,
    under diffusers' own pipeline. ``differs``: how far a peer's final latents are from the engine's,
    relative. A peer that fails is left out, with what it said.
    """
    import torch

    from tgate_export.job import prepare
    from tgate_export.modules import real_module

    manifest, plans, clock = session.manifest, plans_of(session.manifest), Clock(device)
    start, rows = request(manifest, seed)
    loop: dict[str, Callable[[], object]] = {}
    ours: dict[str, NDArray[np.float32]] = {}
    for name in ("gated", "ungated"):
        state = State(session, plans[name])
        loop[f"{engine} {name}"] = lambda state=state: take(state, start, rows, Clock("cpu"))  # type: ignore[misc]
        loop[f"{engine} {name}"]()
        ours[name] = state.latents()
    plan = plans["gated"]
    job = prepare(settings)
    network = real_module(job.family, job.checkpoint, job.family.denoiser, getattr(torch, manifest.dtype)).to(device)
    # The package changes the modules that it is given: it gets its own, around the same weights.
    weights = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    peers: dict[str, Callable[[], Any]] = {
        "diffusers eager": lambda: _pipeline(network, manifest, plan),
        "torch.compile": lambda: _pipeline(torch.compile(network, mode=compile_mode), manifest, plan),
        "tgate eager gated": lambda: _gating(
            _pipeline(copy.deepcopy(network, dict(weights)), manifest, plan), manifest.family, plan
        ),
    }
    if openvino:
        peers[OPENVINO_ALONE] = lambda: _pipeline(
            _in_openvino(copy.deepcopy(network, dict(weights)), openvino), manifest, plan
        )
    asked = _asked(manifest, plan, start, rows, next(iter(network.parameters())))
    failed, first_s = {}, {}
    differs: dict[str, float | None] = {}
    for name, build in peers.items():
        begin = time.perf_counter()
        try:
            run = build()
            latents = run(**asked).images.float().cpu().numpy()
        except Exception as error:
            failed[name] = one_line(error)
            continue
        first_s[name] = time.perf_counter() - begin
        # The same work, or the times mean nothing. Random weights may overflow: null, since JSON has no NaN.
        apart = relative_error(latents, ours["gated" if "tgate" in name else "ungated"])
        differs[name] = None if np.isnan(apart) else apart
        loop[name] = lambda run=run: run(**asked)  # type: ignore[misc]
    taken: dict[str, list[float]] = {name: [] for name in loop}
    for turn in range(warm_ups + repeats):
        for name, once in loop.items():
            begin_mark = clock.mark()
            once()
            if turn >= warm_ups:
                taken[name].append(clock.ms(begin_mark, clock.mark()))
    medians = {name: statistics.median(runs) for name, runs in taken.items()}
    told: dict[str, Any] = {"engine": engine, "torch": torch.__version__, "threads": torch.get_num_threads()}
    told |= {"dtype": manifest.dtype, "compile_mode": compile_mode, "clock": clock.name}
    return {**told, "differs": differs, "first_s": first_s, "failed": failed, "ms": medians, "runs_ms": taken}


def _pipeline(network: Any, manifest: Manifest, plan: Plan) -> Any:
    from diffusers import PixArtAlphaPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline

    from tgate_export.schedulers import make_scheduler

    parts: dict[str, Any] = {"vae": None, "text_encoder": None, "tokenizer": None}
    parts["scheduler"] = make_scheduler(plan.sampler.name, manifest.scheduler)
    if manifest.family == "sdxl":
        pipe = StableDiffusionXLPipeline(unet=network, text_encoder_2=None, tokenizer_2=None, **parts)
    elif manifest.family == "sd":
        unused = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipe = StableDiffusionPipeline(unet=network, **unused, **parts)
    else:
        pipe = PixArtAlphaPipeline(transformer=network, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _in_openvino(network: Any, precision: str) -> Any:
    """The module, whose calls run in OpenVINO: converted from PyTorch when it is first called, for those shapes."""
    import openvino as ov
    import torch
    from torch.utils import _pytree as pytree

    eager = network.forward
    made: dict[str, Any] = {}

    def forward(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
        leaves, tree = pytree.tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not made:

            class Flat(torch.nn.Module):
                def __init__(self) -> None:
                    super().__init__()
                    self.network = network

                def forward(self, *given: Any) -> Any:
                    rest = iter(given)
                    whole = [next(rest) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
                    args, kwargs = pytree.tree_unflatten(whole, tree)
                    return eager(*args, **kwargs)[0]

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that shapes become constants is meant
                model = ov.convert_model(Flat(), example_input=tuple(tensors))
            model.reshape({place: list(tensor.shape) for place, tensor in enumerate(tensors)})
            hints = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
            made["compiled"] = ov.Core().compile_model(model, "CPU", hints)
        return (torch.from_numpy(made["compiled"]([tensor.numpy() for tensor in tensors])[0]),)

    network.forward = forward
    return network


def _gating(pipe: Any, family: str, plan: Plan) -> Callable[..., Any]:
    """The pipeline as the ``tgate`` package changes it, by the plan's settings."""
    import tgate

    loaders: Any = tgate
    named = {"gate_step": "m", "sp_interval": "k", "fi_interval": "f", "warm_up": "w"}
    method = {theirs: plan.settings[ours] for theirs, ours in named.items()}
    loader = {"sd": loaders.TgateSDLoader, "sdxl": loaders.TgateSDXLLoader, "pixart": loaders.TgatePixArtAlphaLoader}
    return functools.partial(loader[family](pipe).tgate, **method)


def _asked(
    manifest: Manifest, plan: Plan, start: NDArray[np.float32], rows: Mapping[str, NDArray[Any]], like: Any
) -> dict[str, Any]:
    """The same request, as a pipeline's arguments."""
    import torch

    shape = manifest.shapes[0]
    tensors = {name: torch.from_numpy(np.array(row)).to(like) for name, row in {**rows, "latents": start}.items()}
    asked = {
        **{"latents": tensors["latents"], "num_inference_steps": len(plan.steps), "output_type": "latent"},
        **{"guidance_scale": plan.guidance_scale, "height": shape.height, "width": shape.width},
        "prompt_embeds": tensors["prompt_embeds.positive"],
        "negative_prompt_embeds": tensors["prompt_embeds.negative"],
    }
    if manifest.family == "sdxl":
        pooled = {"": tensors["pooled.positive"], "negative_": tensors["pooled.negative"]}
        return asked | {f"{half}pooled_prompt_embeds": tensor for half, tensor in pooled.items()}
    if manifest.family == "sd":
        return asked
    masks = {"": tensors["prompt_mask.positive"], "negative_": tensors["prompt_mask.negative"]}
    asked |= {f"{half}prompt_attention_mask": tensor for half, tensor in masks.items()}
    return asked | {"negative_prompt": None, "use_resolution_binning": False}
