"""What eager PyTorch computes from a few inputs, recorded beside the bundle so that it can prove itself anywhere.

The trajectories are as short as they can be while running every graph: they walk real plans, in float32, with the
checkpoint's own modules, so they check tracing, conversion, weights, plan and runtime at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import safetensors.torch
import tokenizers as tokenizers_library
import torch
from torch import Tensor, nn

from tgate_engine.manifest import Golden, Tokenizer
from tgate_engine.plan import Plan
from tgate_engine.rows import step_row
from tgate_engine.sampler import HISTORY, Sampler
from tgate_engine.schedule import Schedule
from tgate_export.families.base import Family
from tgate_export.gating import GatedStep, Variant
from tgate_export.job import Job
from tgate_export.modules import Decoder, real_module
from tgate_export.sampling import compile_sampler
from tgate_export.tracing import DECODER_GRAPH, TEXT_GRAPH

GOLDEN_PROMPT = "a large red circle above a small blue square"
GOLDEN_SEED = 2404

TOLERANCES = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 2e-1}
"""Largest absolute difference over largest absolute value, by the dtype of the graphs: a few steps of rounding."""

IMAGE_TOLERANCES = {"float32": 2 / 255, "float16": 8 / 255, "bfloat16": 32 / 255}


def record(
    job: Job, stage: Path, tokenizers: Sequence[Tokenizer], plan: Callable[[str, Schedule, Sampler], Plan]
) -> dict[str, Golden]:
    """Record every golden of a bundle below ``stage``. ``plan`` builds a plan over the bundle's graphs."""
    family, checkpoint, directory = job.family, job.checkpoint, stage / "golden"
    recorded: dict[str, Golden] = {}
    text = family.text([real_module(family, checkpoint, c) for c in family.text_components])
    names = [c.conditioning.name for c in job.conditioning if c.conditioning.source == "text"]
    conditioning: dict[str, torch.Tensor] = {}
    batch = job.settings.batch[0]
    for half, prompt in (("positive", GOLDEN_PROMPT), ("negative", "")):
        ids = {t.input: torch.tensor([_ids(stage / t.file, t, prompt)]) for t in tokenizers}
        with torch.no_grad():
            outputs = dict(zip(names, text(*ids.values()), strict=True))
        if half == "positive":
            recorded["text"] = _record_graph(
                directory / "text.safetensors", TEXT_GRAPH, ids, outputs, TOLERANCES[job.dtype]
            )
        conditioning |= {f"{n}.{half}": v.expand(batch, *v.shape[1:]) for n, v in outputs.items()}
        conditioning |= {
            f"{c.conditioning.name}.{half}": torch.tensor(c.conditioning.value).expand(batch, -1)
            for c in job.conditioning
            if c.conditioning.source == "constant"
        }
    del text
    if not job.guided:
        conditioning = {name: value for name, value in conditioning.items() if name.endswith(".positive")}

    denoiser = real_module(family, checkpoint, family.denoiser)
    noise = torch.randn((batch, *job.latents), generator=torch.Generator().manual_seed(GOLDEN_SEED))
    by_name = {variant.name: variant for variant in job.variants}
    final = noise
    schedules = _schedules(
        fidelity_reuse=job.settings.fidelity_interval > 1, guided=job.guided, lead_in=job.sampler.lead_in
    )
    for name, schedule in schedules.items():
        sampler = compile_sampler(job.sampler.name, checkpoint.scheduler_config(), schedule.steps)
        short = plan(name, schedule, sampler)
        latents = walk(short, family, denoiser, by_name, noise, conditioning, job.guidance_scale)
        final = latents[-1]
        recorded[name] = _record_plan(directory / f"{name}.safetensors", short, latents, noise, conditioning, job.dtype)
    del denoiser

    decoder = Decoder(real_module(family, checkpoint, family.decoder), checkpoint.config(family.decoder), torch.float32)
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


def _ids(file: Path, tokenizer: Tokenizer, prompt: str) -> list[int]:
    ids = list(tokenizers_library.Tokenizer.from_file(str(file)).encode(prompt).ids)
    if len(ids) > tokenizer.length:
        ids = [*ids[: tokenizer.length - 1], ids[-1]]
    return ids + [tokenizer.pad_id] * (tokenizer.length - len(ids))


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
    return {
        "gated": gated,
        **(
            {"guidance_stopped": Schedule(steps=steps, gate=2, warm_up=0, lead_in=lead_in, reuse=False)}
            if guided
            else {}
        ),
    }


def walk(
    plan: Plan,
    family: Family,
    denoiser: nn.Module,
    variants: Mapping[str, Variant],
    noise: Tensor,
    conditioning: Mapping[str, Tensor],
    guidance_scale: float,
) -> list[Tensor]:
    """Run a plan in eager PyTorch, float32. Returns the latents before the first step and after each.

    ``noise``: unit variance, [B, C, h, w]. ``conditioning``: ``<name>.<half>``, each [B, ...].
    """
    names = tuple(dict.fromkeys(name.rpartition(".")[0] for name in conditioning))
    sites = family.attention(denoiser)
    batch = noise.shape[0]
    latents = [noise * plan.sampler.initial_scale]
    outputs: list[Tensor] = []
    carries: dict[str, Tensor] = {}
    nothing = torch.zeros_like(noise)
    for step in plan.steps:
        gated = GatedStep(denoiser, family.denoise, sites, variants[step.graph], names, torch.float32)
        named = {
            **conditioning,
            **carries,
            "latents": latents[-1],
            "step": torch.from_numpy(step_row(step.call, guidance_scale)).expand(batch, -1),
            **{f"latents.{j}": latents[-1 - j] if j < len(latents) else nothing for j in range(1, HISTORY + 1)},
            **{f"output.{j}": outputs[-j] if j <= len(outputs) else nothing for j in range(1, HISTORY + 1)},
        }
        with torch.no_grad(), gated.attached():
            results = dict(zip(gated.output_names, gated(*(named[n] for n in gated.input_names)), strict=True))
        latents.append(results["next_latents"])
        outputs.append(results["output"])
        carries.update({name: results[name] for name in step.writes})
    return latents


def _record_plan(
    path: Path, plan: Plan, latents: Sequence[Tensor], noise: Tensor, conditioning: Mapping[str, Tensor], dtype: str
) -> Golden:
    """Save a walked plan: ``latents.0`` is the noise, ``latents.<i+1>`` the latents after step i."""
    tensors = {
        "latents.0": noise,
        **{f"latents.{i}": x for i, x in enumerate(latents) if i > 0},
        **{f"conditioning.{name}": value for name, value in conditioning.items()},
        "guidance_scale": torch.tensor(plan.guidance_scale),
    }
    _save(path, tensors)
    return Golden(file=f"{path.parent.name}/{path.name}", tolerance=TOLERANCES[dtype], plan=plan)


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
