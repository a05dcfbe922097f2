"""What eager PyTorch computes from a few inputs, recorded beside the bundle so that it can prove itself anywhere.

Text, picture, ungated trajectory and decoder are diffusers' own (:mod:`tgate_export.oracle`), so they check how the
checkpoint was read. Gated trajectories are the method here over the same modules. All are as short as they can be
while running every graph, in float32: they check tracing, conversion, weights, plan and runtime at once.
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
from tgate_export.conditioning import halves
from tgate_export.families.base import Texts
from tgate_export.gating import GatedStep, Variant
from tgate_export.job import Job
from tgate_export.oracle import Oracle
from tgate_export.sampling import compile_sampler
from tgate_export.tracing import DECODER_GRAPH, IMAGE_GRAPH, TEXT_GRAPH

GOLDEN_PROMPT = "a large red circle above a small blue square"
GOLDEN_NEGATIVE = "a photo"
GOLDEN_SEED = 2404

UNGATED, UNGATED_STEPS = "ungated", 3
"""Name and length of the trajectory that is diffusers' own: long enough for samplers that look back."""

TOLERANCES = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 2e-1}
"""Largest absolute difference over largest absolute value, by the dtype of the graphs: a few steps of rounding."""

SHAKE = 1e-6
"""Some float32 rounding errors. A trajectory that this much of its noise moves further than its tolerance is allowed
four times what PyTorch itself was moved: now and then a trained network sits on an edge."""

IMAGE_TOLERANCES = {"float32": 1e-3, "float16": 3e-2, "bfloat16": 1.25e-1}
"""As above, for what the decoder's pixels are rounded from."""


def record(
    job: Job, stage: Path, tokenizers: Sequence[Tokenizer], plan: Callable[[str, Schedule, Sampler], Plan]
) -> dict[str, Golden]:
    """Record every golden of a bundle below ``stage``. ``plan`` builds a plan over the bundle's graphs.

    Raises :class:`ExportError` where diffusers itself cannot run the checkpoint.
    """
    family, directory = job.family, stage / "golden"
    oracle, recorded = Oracle(job), dict[str, Golden]()
    batch, generator = job.settings.batch[0], torch.Generator().manual_seed(GOLDEN_SEED)
    rows = _conditioning(job, oracle, tokenizers, generator, directory, recorded)
    conditioning = {name: value.expand(batch, *value.shape[1:]) for name, value in rows.items()}

    if not oracle.fits(family.denoiser, *([family.decoder] if "decoder" in job.components else [])):
        return recorded
    denoiser = oracle.module(family.denoiser)
    shape = (batch, *job.latents)
    noise = torch.randn(shape, generator=generator)
    by_name = {variant.name: variant for variant in job.variants}
    schedules = _schedules(
        fidelity_reuse=job.settings.fidelity_interval > 1, guided=job.guided, lead_in=job.sampler.lead_in
    )
    made: dict[str, tuple[Plan, list[Tensor], dict[int, Tensor]]] = {}
    moved: dict[str, float] = {}  # by trajectory, what SHAKE of its noise moves it; diffusers' is not shaken
    decoded: Tensor | None = None
    for name, schedule in schedules.items():
        sampler = compile_sampler(job.sampler.name, job.scheduler, schedule.steps)
        short = plan(name, schedule, sampler)
        noises = {i: torch.randn(shape, generator=generator) for i, call in enumerate(sampler.calls) if call.noise}
        if name == UNGATED:
            trajectory = oracle.trajectory(denoiser, noise, conditioning, schedule.steps, noises)
            latents, decoded = trajectory.latents, trajectory.decoded
        else:
            latents = walk(job, short, denoiser, by_name, noise, conditioning, noises)
            shaken = walk(job, short, denoiser, by_name, noise * (1 + SHAKE), conditioning, noises)
            pairs = zip(shaken, latents, strict=True)
            moved[name] = max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
        made[name] = (short, latents, noises)
    for name, (short, latents, noises) in made.items():
        tensors = {
            "latents.0": noise,
            **{f"latents.{i}": x for i, x in enumerate(latents) if i > 0},
            **{f"noise.{i}": x for i, x in noises.items()},
            **{f"conditioning.{name}": value for name, value in conditioning.items()},
            "guidance_scale": torch.tensor(short.guidance_scale),
        }
        path = directory / f"{name}.safetensors"
        _save(path, tensors)
        recorded[name] = Golden(
            file=f"golden/{path.name}",
            tolerance=max(TOLERANCES[job.dtype], 4 * moved.get(name, max(moved.values()))),
            plan=short,
            oracle=oracle.name if name == UNGATED else f"the method in tgate-engine, over modules of {oracle.name}",
        )
    if decoded is not None:
        recorded["image"] = _record_graph(
            directory / "image.safetensors",
            DECODER_GRAPH,
            {"latents": made[UNGATED][1][-1][:1]},
            {"decoded": decoded},
            IMAGE_TOLERANCES[job.decoder_dtype],
            oracle.name,
        )
    return recorded


def walk(
    job: Job,
    plan: Plan,
    denoiser: nn.Module,
    variants: Mapping[str, Variant],
    noise: Tensor,
    conditioning: Mapping[str, Tensor],
    step_noise: Mapping[int, Tensor] | None = None,
) -> list[Tensor]:
    """Run a plan in eager PyTorch, float32, on the device of ``noise``, where all else must be, too. Returns the
    latents before the first step and after each.

    ``noise``: unit variance, [B, ...]. ``conditioning``: ``<name>.<half>``, each [B, ...]. ``step_noise``: of the
    steps that draw noise, by index.
    """
    family = job.family
    names = tuple(dict.fromkeys(name.rpartition(".")[0] for name in conditioning))
    batch = noise.shape[0]
    latents = [noise * plan.sampler.initial_scale]
    outputs: list[Tensor] = []
    carries: dict[str, Tensor] = {}
    nothing = torch.zeros_like(noise)
    ramp = family.guidance_ramp(noise.shape[1:])
    for step in plan.steps:
        gated = GatedStep(
            denoiser,
            family.denoise,
            job.sites,
            variants[step.graph],
            names,
            torch.float32,
            ramp,
            job.settings.guidance_rescale,
        )
        named = {
            **conditioning,
            **carries,
            "latents": latents[-1],
            "noise": (step_noise or {}).get(step.index, nothing),
            "step": torch.from_numpy(step_row(step.call, job.guidance_scale)).to(noise.device).expand(batch, -1),
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
    job: Job,
    oracle: Oracle,
    tokenizers: Sequence[Tokenizer],
    generator: torch.Generator,
    directory: Path,
    recorded: dict[str, Golden],
) -> dict[str, Tensor]:
    """``<name>.<half>`` to [1, ...] of the golden request. Records the graph that makes it, where there is one."""
    positive: Texts = {}
    negative: Texts | None = None
    if "text" in job.components and oracle.fits(*job.family.text_components):
        rows, positive, negative = oracle.text(GOLDEN_PROMPT, GOLDEN_NEGATIVE)
        ids = {spec.input: torch.tensor([row]) for spec, row in zip(tokenizers, rows, strict=True)}
        recorded["text"] = _record_graph(
            directory / "text.safetensors", TEXT_GRAPH, ids, positive, TOLERANCES[job.dtype], oracle.name
        )
    elif "image" in job.components and oracle.fits(*job.family.image_components):
        picture = _picture(job.size.height, job.size.width)
        noise = torch.randn((1, 3, job.size.height, job.size.width), generator=generator)
        positive = oracle.image(picture, noise)
        recorded["conditioning"] = _record_graph(
            directory / "conditioning.safetensors",
            IMAGE_GRAPH,
            {"picture": picture, "noise": noise},
            positive,
            TOLERANCES[job.dtype],
            oracle.name,
        )
    else:  # nothing that makes conditioning: anything will do
        drawn = {}
        for c in job.conditioning:
            shape = (1, *c.shape)
            drawn[c.conditioning.name] = torch.ones(shape) if c.mask else torch.randn(shape, generator=generator)
        positive, negative = drawn, {n: -value if value.min() < 0 else value for n, value in drawn.items()}
    return halves(job.conditioning, positive, negative, guided=job.guided)


def _picture(height: int, width: int) -> Tensor:
    """A smooth picture with an edge, uint8 [1, H, W, 3]."""
    rows, columns = torch.meshgrid(torch.linspace(0, 255, height), torch.linspace(0, 255, width), indexing="ij")
    disc = (rows - 128) ** 2 + (columns - 128) ** 2 < 60**2
    return torch.stack([rows, columns, torch.where(disc, 220.0, 30.0)], dim=-1).to(torch.uint8)[None]


def _schedules(*, fidelity_reuse: bool, guided: bool, lead_in: int) -> dict[str, Schedule]:
    """Short schedules that between them run every graph of the bundle; the first is what diffusers does."""
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
    schedules = {UNGATED: Schedule(steps=UNGATED_STEPS, gate=UNGATED_STEPS, lead_in=lead_in).ungated(), "gated": gated}
    return {**schedules, "guidance_stopped": stopped} if guided else schedules


def _record_graph(
    path: Path, graph: str, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], tolerance: float, oracle: str
) -> Golden:
    """Save one run of a graph."""
    tensors = {f"input.{name}": value for name, value in inputs.items()}
    tensors |= {f"output.{name}": value for name, value in outputs.items()}
    _save(path, tensors)
    return Golden(file=f"{path.parent.name}/{path.name}", tolerance=tolerance, graph=graph, oracle=oracle)


def _save(path: Path, tensors: Mapping[str, Tensor]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file({name: t.detach().contiguous().clone() for name, t in tensors.items()}, path)
