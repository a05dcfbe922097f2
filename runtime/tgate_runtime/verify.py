"""Replays a bundle's goldens, so that it can prove itself on this machine and engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Unpack

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from tgate_engine.bundle import Bundle
from tgate_engine.dtypes import decode, encode, storage
from tgate_engine.errors import BundleError, RequestError
from tgate_engine.graph import BATCH, GraphSpec
from tgate_engine.manifest import Golden, Shape
from tgate_engine.plan import Plan
from tgate_runtime.engines.protocol import Engine, OnBuild, Options
from tgate_runtime.graph_call import GraphCall
from tgate_runtime.runner import run
from tgate_runtime.session import Session, graphs_of
from tgate_runtime.state import State

_ROUNDING = {"f16": 3e-2, "bf16": 2e-1}
"""What an engine that computes in less than the bundle's dtype is allowed, as the exporter allows such bundles."""

Tensors = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, kw_only=True)
class Checked:
    """One golden, replayed. ``error``: the largest absolute difference over the largest absolute value, the worst
    of its tensors; NaN where the engine gave something not finite."""

    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        """Within tolerance. NaN is not."""
        return self.error <= self.tolerance


def verify(
    bundle: Bundle,
    *,
    engine: str | Engine = "ort-cpu",
    on_golden: Callable[[int, int, str], None] | None = None,
    on_build: OnBuild | None = None,
    **options: Unpack[Options],
) -> list[Checked]:
    """Replay every golden of an opened bundle, whose digests and plans ``Bundle.open`` has checked.

    ``on_golden(done, total, name)`` is called after each. Returns one entry per golden, in the manifest's order;
    it is the caller's to judge them. Raises :class:`BundleError` for a golden that cannot be replayed and
    :class:`~tgate_engine.errors.EngineError` for a graph that cannot be loaded or run.
    """
    goldens = bundle.manifest.goldens
    if not goldens:
        return []
    plans = _plans(bundle)
    checked = []
    with Session.open(bundle, engine=engine, plans=plans, on_build=on_build, **options) as session:
        rounding = _ROUNDING.get(session.engine.options.precision or "", 0.0)
        for done, (name, golden) in enumerate(goldens.items(), start=1):
            try:
                tensors = load(bundle.read(golden.file))
                error = _replay(session, golden, tensors, each_step=rounding > 0)
            except (KeyError, ValueError, SafetensorError, RequestError) as fault:
                raise BundleError(f"{bundle.path}: golden {name} is malformed ({fault!s:.200}); export again") from None
            tolerance = max(golden.tolerance, rounding)
            checked.append(Checked(name=name, error=error, tolerance=tolerance))
            if on_golden is not None:
                on_golden(done, len(goldens), name)
    return checked


def check_goldens(bundle: Bundle) -> None:
    """Raises what :func:`verify` would for the manifest alone, before an engine is loaded."""
    if bundle.manifest.goldens:
        graphs_of(bundle, _plans(bundle))


def _plans(bundle: Bundle) -> list[Plan]:
    """The bundle's, and those that goldens walk."""
    goldens = bundle.manifest.goldens.values()
    return [*bundle.manifest.plans.values(), *(golden.plan for golden in goldens if golden.plan is not None)]


def relative_error(values: NDArray[Any], recorded: NDArray[Any]) -> float:
    """max |values - recorded| / max |recorded|, in float64. NaN where ``values`` are not finite; absolute where what is
    recorded is 0."""
    a, b = values.astype(np.float64), recorded.astype(np.float64)
    if a.shape != b.shape:
        raise ValueError(f"shape {a.shape} where {b.shape} is recorded")
    if not np.isfinite(a).all():
        return math.nan
    scale = float(np.abs(b).max(initial=0.0))
    return float(np.abs(a - b).max(initial=0.0)) / (scale or 1.0)


def _replay(session: Session, golden: Golden, tensors: Tensors, *, each_step: bool) -> float:
    """The worst error of a golden, on every shape of its size."""
    shapes = session.shapes(golden.size)
    if golden.plan is None:
        graphs = {shape.graphs[golden.graph].file: shape.graphs[golden.graph] for shape in shapes}
        return _worst([_replay_graph(session, graph, tensors) for graph in graphs.values()])
    plan = golden.plan
    return _worst([_replay_plan(session, shape, plan, tensors, each_step=each_step) for shape in shapes])


def _replay_plan(session: Session, shape: Shape, plan: Plan, tensors: Tensors, *, each_step: bool) -> float:
    """Walk a golden's plan from ``latents.0`` [1, ...], on as few rows as the shape takes, all alike; the worst error
    of ``latents.<i+1>`` after step i.

    With ``each_step``, every step begins with the recorded latents. A few steps of a trained network make much of
    what an engine rounds in the first: where it rounds on purpose, only single steps say whether it computes right.
    """
    rows = shape.batch[0]
    state = State(session, plan, rows, size=shape.size)
    prefix = "conditioning."
    steps = run(
        state,
        latents=np.repeat(tensors["latents.0"], rows, axis=0),
        conditioning={name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)},
        guidance_scale=float(tensors["guidance_scale"].reshape(-1)[0]),
        step_noise=lambda _, index: tensors[f"noise.{index}"][0],
    )
    errors = []
    for step in steps:
        recorded = tensors[f"latents.{step.index + 1}"]
        errors.append(relative_error(state.latents(), np.repeat(recorded, rows, axis=0)))
        if each_step:
            for row in range(rows):
                state.replace_latents(row, recorded[0])
    return _worst(errors)


def _replay_graph(session: Session, graph: GraphSpec, tensors: Tensors) -> float:
    """Run one graph once on ``input.*``; the worst error of ``output.*``. Of one image, on as few as the graph takes,
    all alike."""
    batch = graph.batch_of({t.name: tensors[f"input.{t.name}"].shape for t in graph.inputs})
    rows = graph.batch[0] if batch == 1 else batch
    by_image = {t.name for t in (*graph.inputs, *graph.outputs) if t.shape[:1] == (BATCH,)}

    def recorded_of(kind: str, name: str) -> NDArray[Any]:
        values = tensors[f"{kind}.{name}"]
        return np.repeat(values, rows // batch, axis=0) if name in by_image else values

    call = GraphCall(session, graph, rows)
    for name, buffer in call.inputs.items():
        values = recorded_of("input", name)
        if values.shape != buffer.shape:
            raise ValueError(f"input {name} has shape {values.shape}, the graph takes {buffer.shape}")
        buffer.write(values if values.dtype == storage(buffer.dtype) else encode(values, buffer.dtype))
    call()
    recorded = {name: buffer for name, buffer in call.outputs.items() if f"output.{name}" in tensors}
    if not recorded:
        raise ValueError("it records no output")
    return _worst(
        [relative_error(decode(b.read(), b.dtype), recorded_of("output", name)) for name, b in recorded.items()]
    )


def _worst(errors: list[float]) -> float:
    """The largest; NaN if any is."""
    return math.nan if any(math.isnan(e) for e in errors) else max(errors, default=0.0)
