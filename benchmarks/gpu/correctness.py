"""Whether an engine computes what eager PyTorch does."""

from __future__ import annotations

import json
import time
from typing import Any

import numpy as np

from benchmarks.gpu.setting import CASES, Setting, session_of
from tgate_engine.plan import Plan
from tgate_engine.plan_build import build_plan
from tgate_runtime.state import State
from tgate_runtime.verify import relative_error

TOLERANCES = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 2e-1, "f16": 3e-2, "bf16": 2e-1}
"""As ``tgate verify`` allows, by the bundle's dtype and the engine's precision."""


def reference(setting: Setting) -> dict[str, Any]:
    """Four steps through every graph in eager PyTorch and float32, with the bundle's own weights, kept in a file."""
    if setting.reference_file.exists():
        return {"file": str(setting.reference_file), "brought": True}
    import torch

    from tgate_export.goldens import both_halves, walk
    from tgate_export.job import prepare
    from tgate_export.modules import real_module

    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    manifest, device = setting.open().manifest, torch.device(setting.device)
    shape = manifest.shapes[0]
    size = {"height": shape.height, "width": shape.width}
    job = prepare(CASES[setting.model].settings(setting.model, steps=4, m=3, k=2, warm_up=0, **size))
    plan = build_plan(
        "short",
        job.method.program(job.method_settings, job.sampler.lead_in),
        sampler=job.sampler,
        guidance_scale=job.guidance_scale,
        graphs=shape.graphs,
        carries=manifest.carries,
        settings=job.method.facts(job.method_settings),
    )
    generator = torch.Generator().manual_seed(setting.seed)
    positive, negative = (
        {
            c.conditioning.name: torch.ones(1, *c.shape) if c.mask else torch.randn((1, *c.shape), generator=generator)
            for c in job.conditioning
        }
        for _ in range(2)
    )
    rows = both_halves(job, positive, negative)
    start = torch.randn((1, *job.latents), generator=generator)
    # Rounded as the bundle's weights are, so that what is compared is arithmetic alone.
    denoiser = real_module(job.family, job.checkpoint, job.family.denoiser, getattr(torch, manifest.dtype))
    denoiser = denoiser.float().to(device)

    begin = time.perf_counter()
    variants = {variant.name: variant for variant in job.variants}
    on_device = {name: row.to(device) for name, row in rows.items()}
    latents = walk(job, plan, denoiser, variants, start.to(device), on_device)
    tensors = {f"latents.{i}": x.cpu().numpy() for i, x in enumerate(latents)}
    tensors |= {f"conditioning.{name}": row.numpy() for name, row in rows.items()}
    np.savez(setting.reference_file, plan=np.array(json.dumps(plan.to_json())), **tensors)
    return {"file": str(setting.reference_file), "brought": False, "walk_s": time.perf_counter() - begin}


def check(setting: Setting) -> dict[str, Any]:
    """Every step of the reference on the engine, each from the reference's latents. Errors are the largest difference
    over the largest value: of the latents, and of what the step changed them by, which hides less."""
    opened = setting.open()
    with np.load(setting.reference_file) as file:
        tensors = {name: file[name] for name in file.files}
    plan = Plan.from_json(json.loads(str(tensors.pop("plan"))))
    wanted = [tensors[f"latents.{i}"] for i in range(len(plan.steps) + 1)]
    rows = {name.removeprefix("conditioning."): t for name, t in tensors.items() if name.startswith("conditioning.")}
    with session_of(setting, opened, {"short": plan}) as session:
        state, image = State(session, plan), range(1)
        steps: list[dict[str, Any]] = []
        conditioning = {name: row[0] for name, row in rows.items()}
        state.begin(0, wanted[0][0], conditioning, guidance_scale=plan.guidance_scale)
        state.replace_latents(0, wanted[0][0])  # which the sampler's scale is in already
        for step in plan.steps:
            call, _ = state.take(image)
            call()
            state.turn(image)
            got, before, after = state.latents(), wanted[step.index], wanted[step.index + 1]
            errors = (relative_error(got, after), relative_error(got - before, after - before))
            # Not finite: null, since JSON has no NaN.
            error, change_error = errors if np.isfinite(got).all() else (None, None)
            steps.append({"graph": step.graph, "error": error, "change_error": change_error})
            state.replace_latents(0, after[0])
        options = session.engine.options
    tolerance = max(TOLERANCES[opened.manifest.dtype], TOLERANCES.get(options.precision or "", 0.0))
    errors_there = [step["error"] for step in steps if step["error"] is not None]
    worst = max(errors_there) if len(errors_there) == len(steps) else None
    agrees = worst is not None and worst <= tolerance
    return {"worst": worst, "tolerance": tolerance, "agrees": agrees, "precision": options.precision, "steps": steps}
