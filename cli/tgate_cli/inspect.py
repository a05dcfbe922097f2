"""What a bundle does and costs, as data: the numbers behind ``tgate inspect``. Needs the contract alone."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

from tgate_engine.bundle import Bundle
from tgate_engine.errors import PlanError
from tgate_engine.manifest import Dim, Manifest, resolve
from tgate_engine.plan import Plan, build_plan
from tgate_engine.sampler import HISTORY

ITEM_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2, "int64": 8, "uint8": 1}


def describe(bundle: Bundle) -> dict[str, Any]:
    """The bundle as JSON values. MACs are for one image; sizes are in bytes, carries' for a request of one image."""
    m = bundle.manifest
    return {
        "model": m.model,
        "family": m.family,
        "licence": m.licence,
        "dtype": m.dtype,
        "height": m.height,
        "width": m.width,
        "latents": list(m.latents),
        "batch": list(m.batch),
        "frames": m.frames,
        "fps": m.fps,
        "guidance": m.guidance,
        "guidance_rescale": m.guidance_rescale,
        "clip_skip": m.clip_skip,
        "bytes": {
            "total": bundle.size_bytes(),
            "weights": m.files[m.weights].bytes if m.weights else 0,
            "graphs": sum(m.files[file].bytes for file in {graph.file for graph in m.graphs.values()}),
        },
        "graphs": {
            name: {
                "file": graph.file,
                "bytes": m.files[graph.file].bytes,
                "macs": {"paper": graph.macs.paper, "all": graph.macs.all},
            }
            for name, graph in m.graphs.items()
        },
        "plans": {name: describe_plan(plan, m) for name, plan in m.plans.items()},
        "goldens": {name: golden.oracle for name, golden in m.goldens.items()},
        "tools": dict(m.tools),
    }


def describe_plan(plan: Plan, manifest: Manifest) -> dict[str, Any]:
    """One plan as JSON values, step by step, with its totals and those of the ungated plan beside it."""
    schedule = plan.schedule
    paper, every = plan.macs(manifest.graphs)
    ungated_paper, ungated_every = ungated(plan, manifest).macs(manifest.graphs)
    return {
        "steps_n": schedule.steps,
        "gate_m": schedule.gate,
        "self_interval_k": schedule.self_interval,
        "warm_up": schedule.warm_up,
        "fidelity_interval": schedule.fidelity_interval,
        "sampler": plan.sampler.name,
        "guidance_scale": plan.guidance_scale,
        "macs": {"paper": paper, "all": every},
        "macs_ungated": {"paper": ungated_paper, "all": ungated_every},
        "carry_bytes": carry_bytes(plan, manifest, batch=1),
        "memory": memory(plan, manifest),
        "steps": [
            {
                "index": step.index,
                "phase": str(step.phase),
                "graph": step.graph,
                "timestep": step.call.timestep,
                "reads": list(step.reads),
                "writes": list(step.writes),
                "macs": {
                    "paper": manifest.graphs[step.graph].macs.paper,
                    "all": manifest.graphs[step.graph].macs.all,
                },
            }
            for step in plan.steps
        ],
    }


def ungated(plan: Plan, manifest: Manifest) -> Plan:
    """The same trajectory with nothing reused and guidance throughout."""
    return build_plan(
        "ungated",
        schedule=plan.schedule.ungated(),
        sampler=plan.sampler,
        guidance_scale=plan.guidance_scale,
        graphs=manifest.graphs,
        carries=manifest.carries,
    )


def guidance_stopped(plan: Plan, manifest: Manifest) -> Plan | None:
    """The same trajectory with attention untouched and guidance stopped at m; None where the bundle cannot."""
    try:
        return build_plan(
            "guidance_stopped",
            schedule=plan.schedule.guidance_stopped(),
            sampler=plan.sampler,
            guidance_scale=plan.guidance_scale,
            graphs=manifest.graphs,
            carries=manifest.carries,
        )
    except PlanError:
        return None


def carry_bytes(plan: Plan, manifest: Manifest, *, batch: int) -> int:
    """The memory that one request's carries take."""
    specs = manifest.carry_specs()
    used = [specs[name] for name in plan.carries()]
    return sum(math.prod(resolve(carry.shape, batch)) * ITEM_BYTES[carry.dtype] for carry in used)


def memory(plan: Plan, manifest: Manifest, *, batch: int = 1) -> dict[str, int]:
    """What a request for ``batch`` images takes, in bytes, on an engine that keeps one copy of the weights.

    ``weights``: of all graphs, once. ``request``: the buffers of one request, carries among them. ``scratch``: what the
    graph at work holds besides, outputs that the step does not keep among it, for the hungriest step of the plan.
    ``peak``: all of it; each further request that runs at the same time adds ``request`` and ``scratch``. The engine's
    own code, and what it packs anew, are not in it.
    """
    weights = manifest.files[manifest.weights].bytes if manifest.weights else 0
    sizes = {name: _nbytes(spec.shape, spec.dtype, batch) for name, spec in manifest.carry_specs().items()}
    for graph in plan.graphs():
        spec = manifest.graphs[graph]
        sizes |= {t.name: _nbytes(t.shape, t.dtype, batch) for t in (*spec.inputs, *spec.outputs)}
    named = {t.name for graph in plan.graphs() for t in manifest.graphs[graph].inputs} | {*plan.carries()}
    ring = 2 * (HISTORY + 2) * _nbytes(manifest.latents, "float32", batch) * batch
    request = ring + sum(sizes[name] for name in named if not _in_ring(name))
    scratch = 0
    for step in plan.steps:
        spec = manifest.graphs[step.graph]
        dropped = [
            t.name for t in spec.outputs if t.name not in step.writes and t.name not in ("next_latents", "output")
        ]
        scratch = max(scratch, batch * spec.scratch_bytes + sum(sizes[name] for name in dropped))
    return {"weights": weights, "request": request, "scratch": scratch, "peak": weights + request + scratch}


def _nbytes(shape: Sequence[Dim], dtype: str, batch: int) -> int:
    return math.prod(resolve(tuple(shape), batch)) * ITEM_BYTES[dtype]


def _in_ring(name: str) -> bool:
    return name.partition(".")[0] in ("latents", "output")


def shortened(names: Sequence[str]) -> str:
    """Carry names for a reader: runs that differ in one number only are written as ``self.0 … self.69 (70)``."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name in names:
        match = re.fullmatch(r"(\D*)\d+(.*)", name)
        groups.setdefault(match.groups() if match else (name, ""), []).append(name)  # type: ignore[arg-type]
    parts = [
        ", ".join(group) if len(group) < 3 else f"{group[0]} … {group[-1]} ({len(group)})" for group in groups.values()
    ]
    return ", ".join(parts)
