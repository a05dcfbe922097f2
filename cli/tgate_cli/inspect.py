"""What a bundle does and costs, as data: the numbers behind ``tgate inspect``. Needs the contract alone."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from tgate_engine.bundle import Bundle
from tgate_engine.control import nets_in, picture_name
from tgate_engine.footprint import carry_bytes, memory
from tgate_engine.graph import GraphSpec
from tgate_engine.manifest import Manifest, Shape
from tgate_engine.plan import Plan
from tgate_engine.plan_report import report_of


def describe(bundle: Bundle, size: str | None = None) -> dict[str, Any]:
    """The bundle as JSON values. MACs are for one image; sizes are in bytes, carries' for a request of one image.

    ``shapes`` holds what was exported for each size and range of batches. ``plans`` are described on the graphs of
    ``size``, None being the default; the entry ``size`` says which. Raises
    :class:`~tgate_engine.errors.BundleError` for a size that is not there.
    """
    m = bundle.manifest
    shape = m.shapes_of(size)[0]
    return {
        "model": m.model,
        "family": m.family,
        "licence": m.licence,
        "dtype": m.dtype,
        "frames": m.frames,
        "fps": m.fps,
        "guidance": m.guidance,
        "guidance_rescale": m.guidance_rescale,
        "clip_skip": m.clip_skip,
        "bytes": {
            "total": bundle.size_bytes(),
            "weights": m.files[m.weights].bytes if m.weights else 0,
            "graphs": sum(m.files[file].bytes for file in {g.file for s in m.shapes for g in s.graphs.values()}),
        },
        "shapes": [_describe_shape(s, m) for s in m.shapes],
        "size": shape.size,
        "plans": {
            name: {**describe_plan(plan, m, shape), "report": _report(bundle, plan)} for name, plan in m.plans.items()
        },
        "adapters": {
            name: {"layers": each.layers, "rank": each.rank, "bytes": m.files[each.file].bytes}
            for name, each in m.adapters.items()
        },
        "controls": {
            net: {name: _graph_macs(spec) for name, spec in _graphs_of_control(shape, net).items()}
            for net in nets_in(shape.graphs)
        },
        "goldens": {name: golden.oracle for name, golden in m.goldens.items()},
        "tools": dict(m.tools),
    }


def _graphs_of_control(shape: Shape, net: str) -> dict[str, GraphSpec]:
    """Of a ControlNet, by their names."""
    return {name: spec for name, spec in shape.graphs.items() if picture_name(net) in spec.input_names()}


def describe_plan(plan: Plan, manifest: Manifest, shape: Shape) -> dict[str, Any]:
    """One plan as JSON values, step by step, with its totals on the graphs of a shape, and its baselines' beside
    them."""
    return {
        "settings": dict(plan.settings),
        "sampler": plan.sampler.name,
        "guidance_scale": plan.guidance_scale,
        "macs": _plan_macs(plan, shape),
        "baselines": {name: {"macs": _plan_macs(manifest.plan(name), shape)} for name in plan.baselines},
        "carry_bytes": carry_bytes(plan, shape.graphs, batch=1),
        "memory": memory(plan, manifest, shape),
        "steps": [
            {
                "index": step.index,
                "phase": step.phase,
                "graph": step.graph,
                "timestep": step.call.timestep,
                "reads": list(step.reads),
                "writes": list(step.writes),
                "macs": _graph_macs(shape.graphs[step.graph]),
            }
            for step in plan.steps
        ],
    }


def _describe_shape(shape: Shape, manifest: Manifest) -> dict[str, Any]:
    return {
        "width": shape.width,
        "height": shape.height,
        "batch": list(shape.batch),
        "latents": list(shape.latents),
        "graphs": {
            name: {
                "file": graph.file,
                "role": graph.role,
                "bytes": manifest.files[graph.file].bytes,
                "macs": _graph_macs(graph),
            }
            for name, graph in shape.graphs.items()
        },
    }


def _report(bundle: Bundle, plan: Plan) -> dict[str, Any] | None:
    """What `tgate tune` measured of it; None where nothing was."""
    report = report_of(bundle, plan)
    return None if report is None else report.to_json()


def _graph_macs(graph: GraphSpec) -> dict[str, int]:
    return {"paper": graph.macs.paper, "all": graph.macs.all}


def _plan_macs(plan: Plan, shape: Shape) -> dict[str, int]:
    paper, every = plan.macs(shape.graphs)
    return {"paper": paper, "all": every}


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
