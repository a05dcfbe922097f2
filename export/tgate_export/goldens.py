"""What eager PyTorch computes from a few inputs, recorded beside the bundle so that it can prove itself anywhere.

The trajectories are as short as they can be while running every graph: they walk real plans, in float32, with the
checkpoint's own modules, so they check tracing, conversion, weights, plan and runtime at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from tgate_engine.manifest import Golden, Tokenizer
from tgate_engine.plan import Plan
from tgate_engine.rows import step_row
from tgate_engine.sampler import HISTORY, Sampler
from tgate_engine.schedule import Schedule
from tgate_export.conditioning import encode, halves, token_ids
from tgate_export.families.base import Family
from tgate_export.gating import GatedStep, Variant
from tgate_export.job import Job
from tgate_export.modules import Decoder, real_module
from tgate_export.sampling import compile_sampler
from tgate_export.tracing import DECODER_GRAPH, IMAGE_GRAPH, TEXT_GRAPH

GOLDEN_PROMPT = "a large red circle above a small blue square"
GOLDEN_SEED = 2404

TOLERANCES = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 2e-1}
"""Largest absolute difference over largest absolute value, by the dtype of the graphs: a few steps of rounding."""

SHAKE = 1e-6
"""Some float32 rounding errors. A trajectory that this much of its noise moves further than its tolerance is allowed
four times what PyTorch itself was moved: now and then a trained network sits on an edge."""

IMAGE_TOLERANCES = {"float32": 2 / 255, "float16": 8 / 255, "bfloat16": 32 / 255}


def record(
    job: Job, stage: Path, tokenizers: Sequence[Tokenizer], plan: Callable[[str, Schedule, Sampler], Plan]
) -> dict[str, Golden]:
    """Record every golden of a bundle below ``stage``. ``plan`` builds a plan over the bundle's graphs."""
    family, checkpoint, directory = job.family, job.checkpoint, stage / "golden"
    recorded: dict[str, Golden] = {}
    batch, generator = job.settings.batch[0], torch.Generator().manual_seed(GOLDEN_SEED)
    rows = _conditioning(job, stage, tokenizers, generator, recorded)
    conditioning = {name: value.expand(batch, *value.shape[1:]) for name, value in rows.items()}

    denoiser = real_module(family, checkpoint, family.denoiser)
    shape = (batch, *job.latents)
    noise = torch.randn(shape, generator=generator)
    by_name = {variant.name: variant for variant in job.variants}
    final = noise
    schedules = _schedules(
        fidelity_reuse=job.settings.fidelity_interval > 1, guided=job.guided, lead_in=job.sampler.lead_in
    )
    for name, schedule in schedules.items():
        sampler = compile_sampler(job.sampler.name, checkpoint.scheduler_config(), schedule.steps)
        short = plan(name, schedule, sampler)
        noises = {i: torch.randn(shape, generator=generator) for i, call in enumerate(sampler.calls) if call.noise}
        latents = walk(short, family, denoiser, by_name, noise, conditioning, job.guidance_scale, noises)
        shaken = walk(short, family, denoiser, by_name, noise * (1 + SHAKE), conditioning, job.guidance_scale, noises)
        moved = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(shaken, latents, strict=True))
        final = latents[-1]
        tensors = {
            "latents.0": noise,
            **{f"latents.{i}": x for i, x in enumerate(latents) if i > 0},
            **{f"noise.{i}": x for i, x in noises.items()},
            **{f"conditioning.{name}": value for name, value in conditioning.items()},
            "guidance_scale": torch.tensor(short.guidance_scale),
        }
        path = directory / f"{name}.safetensors"
        _save(path, tensors)
        recorded[name] = Golden(file=f"golden/{path.name}", tolerance=max(TOLERANCES[job.dtype], 4 * moved), plan=short)
    del denoiser

    if "decoder" in job.components:
        vae, config = real_module(family, checkpoint, family.decoder), checkpoint.config(family.decoder)
        decoder = Decoder(vae, config, torch.float32, family.frames_axis)
        with torch.no_grad():
            image = decoder(final[:1])
        recorded["image"] = _record_graph(
            directory / "image.safetensors",
            DECODER_GRAPH,
            {"latents": final[:1]},
            {"image": image},
            IMAGE_TOLERANCES[job.decoder_dtype],
        )
    return recorded


def walk(
    plan: Plan,
    family: Family,
    denoiser: nn.Module,
    variants: Mapping[str, Variant],
    noise: Tensor,
    conditioning: Mapping[str, Tensor],
    guidance_scale: float,
    step_noise: Mapping[int, Tensor] | None = None,
) -> list[Tensor]:
    """Run a plan in eager PyTorch, float32, on the device of ``noise``, where all else must be, too. Returns the
    latents before the first step and after each.

    ``noise``: unit variance, [B, ...]. ``conditioning``: ``<name>.<half>``, each [B, ...]. ``step_noise``: of the
    steps that draw noise, by index.
    """
    names = tuple(dict.fromkeys(name.rpartition(".")[0] for name in conditioning))
    sites = family.attention(denoiser)
    batch = noise.shape[0]
    latents = [noise * plan.sampler.initial_scale]
    outputs: list[Tensor] = []
    carries: dict[str, Tensor] = {}
    nothing = torch.zeros_like(noise)
    ramp = family.guidance_ramp(noise.shape[1:])
    for step in plan.steps:
        gated = GatedStep(denoiser, family.denoise, sites, variants[step.graph], names, torch.float32, ramp)
        named = {
            **conditioning,
            **carries,
            "latents": latents[-1],
            "noise": (step_noise or {}).get(step.index, nothing),
            "step": torch.from_numpy(step_row(step.call, guidance_scale)).to(noise.device).expand(batch, -1),
            **{f"latents.{j}": latents[-1 - j] if j < len(latents) else nothing for j in range(1, HISTORY + 1)},
            **{f"output.{j}": outputs[-j] if j <= len(outputs) else nothing for j in range(1, HISTORY + 1)},
        }
        with torch.no_grad(), gated.attached():
            results = dict(zip(gated.output_names, gated(*(named[n] for n in gated.input_names)), strict=True))
        latents.append(results["next_latents"])
        outputs.append(results["output"])
        carries.update({name: results[name] for name in step.writes})
    return latents


def _conditioning(
    job: Job, stage: Path, tokenizers: Sequence[Tokenizer], generator: torch.Generator, recorded: dict[str, Golden]
) -> dict[str, Tensor]:
    """``<name>.<half>`` to [1, ...] of the golden request. Records the graph that makes it, where there is one."""
    family, checkpoint, directory = job.family, job.checkpoint, stage / "golden"
    positive: dict[str, Tensor] = {}
    negative: dict[str, Tensor] | None = None
    if "text" in job.components:
        inputs = job.inputs_from("text")
        text = family.text([real_module(family, checkpoint, c) for c in family.text_components])
        ids = token_ids(stage, tokenizers, GOLDEN_PROMPT)
        positive = encode(text, inputs, *ids.values())
        negative = encode(text, inputs, *token_ids(stage, tokenizers, "").values())
        recorded["text"] = _record_graph(
            directory / "text.safetensors", TEXT_GRAPH, ids, positive, TOLERANCES[job.dtype]
        )
    elif "image" in job.components:
        inputs = job.inputs_from("image")
        image = family.image([real_module(family, checkpoint, c) for c in family.image_components], checkpoint)
        picture = _picture(job.size.height, job.size.width)
        noise = torch.randn((1, 3, job.size.height, job.size.width), generator=generator)
        positive = encode(image, inputs, picture, noise)
        recorded["conditioning"] = _record_graph(
            directory / "conditioning.safetensors",
            IMAGE_GRAPH,
            {"picture": picture, "noise": noise},
            positive,
            TOLERANCES[job.dtype],
        )
    else:  # the denoiser alone: anything will do
        for c in job.conditioning:
            shape = (1, *c.shape)
            positive[c.conditioning.name] = torch.ones(shape) if c.mask else torch.randn(shape, generator=generator)
        negative = {name: -value if value.min() < 0 else value for name, value in positive.items()}
    return halves(job.conditioning, positive, negative, guided=job.guided)


def _picture(height: int, width: int) -> Tensor:
    """A smooth picture with an edge, uint8 [1, H, W, 3]."""
    rows, columns = torch.meshgrid(torch.linspace(0, 255, height), torch.linspace(0, 255, width), indexing="ij")
    disc = (rows - 128) ** 2 + (columns - 128) ** 2 < 60**2
    return torch.stack([rows, columns, torch.where(disc, 220.0, 30.0)], dim=-1).to(torch.uint8)[None]


def _schedules(*, fidelity_reuse: bool, guided: bool, lead_in: int) -> dict[str, Schedule]:
    """Short schedules that between them run every graph of the bundle."""
    steps = 6 if fidelity_reuse else 4
    gated = Schedule(
        steps=steps,
        gate=3,
        self_interval=3,
        warm_up=0,
        fidelity_interval=2 if fidelity_reuse else 1,
        lead_in=lead_in,
    )
    stopped = Schedule(steps=steps, gate=2, warm_up=0, lead_in=lead_in, reuse=False)
    return {"gated": gated, "guidance_stopped": stopped} if guided else {"gated": gated}


def _record_graph(
    path: Path, graph: str, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], tolerance: float
) -> Golden:
    """Save one run of a graph."""
    tensors = {f"input.{name}": value for name, value in inputs.items()}
    tensors |= {f"output.{name}": value for name, value in outputs.items()}
    _save(path, tensors)
    return Golden(file=f"{path.parent.name}/{path.name}", tolerance=tolerance, graph=graph)


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({name: t.detach().contiguous().clone() for name, t in tensors.items()}, path)
