"""What eager PyTorch computes from a few inputs, recorded beside the bundle so that it can prove itself anywhere.

The trajectories are as short as they can be while running every graph: they walk real plans, in float32, with the
checkpoint's own modules, so they check tracing, conversion, weights, plan and runtime at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from tgate_engine.manifest import Golden
from tgate_engine.plan import Plan
from tgate_engine.rows import step_row
from tgate_engine.sampler import HISTORY
from tgate_engine.schedule import Schedule
from tgate_export.families.base import Family
from tgate_export.gating import GatedStep, Variant

TOLERANCES = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 2e-1}
"""Largest absolute difference over largest absolute value, by the dtype of the graphs: a few steps of rounding."""

IMAGE_TOLERANCES = {"float32": 2 / 255, "float16": 8 / 255, "bfloat16": 32 / 255}


def golden_schedules(*, fidelity_reuse: bool, guided: bool, lead_in: int) -> dict[str, Schedule]:
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
    return {"gated": gated, **({"guidance_stopped": Schedule(
        steps=steps, gate=2, warm_up=0, lead_in=lead_in, reuse=False
    )} if guided else {})}


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


def record_plan(path: Path, plan: Plan, latents: Sequence[Tensor], noise: Tensor, conditioning: Mapping[str, Tensor], dtype: str) -> Golden:
    """Save a walked plan: ``latents.0`` is the noise, ``latents.<i+1>`` the latents after step i."""
    tensors = {
        "latents.0": noise,
        **{f"latents.{i}": x for i, x in enumerate(latents) if i > 0},
        **{f"conditioning.{name}": value for name, value in conditioning.items()},
        "guidance_scale": torch.tensor(plan.guidance_scale),
    }
    _save(path, tensors)
    return Golden(file=f"{path.parent.name}/{path.name}", tolerance=TOLERANCES[dtype], plan=plan)


def record_graph(
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
