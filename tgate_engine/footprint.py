"""What a trajectory takes in memory: every buffer that a host allocates before the first step, and the totals."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

from tgate_engine.control import controls_for
from tgate_engine.graph import CONTROL, DENOISE, GraphSpec, TensorSpec
from tgate_engine.manifest import Manifest, Shape
from tgate_engine.plan import Plan
from tgate_engine.step import STEP_OUTPUTS


def buffers(graphs: Mapping[str, GraphSpec], plans: Iterable[Plan]) -> dict[str, TensorSpec]:
    """The tensors that walking ``plans`` over ``graphs`` needs, by name: what their graphs take and
    the ControlNets beside them, what every step gives, and the carries that are written. Each has one buffer, the same
    for all graphs."""
    tensors: dict[str, TensorSpec] = {}
    for plan in plans:
        for step in plan.steps:
            graph = graphs[step.graph]
            tensors.update((t.name, t) for t in graph.inputs)
            tensors.update((t.name, t) for t in graph.outputs if t.name in (*STEP_OUTPUTS, *step.writes))
        for beside in controls_for(graphs, plan.graphs()).values():
            tensors.update((t.name, t) for t in beside.inputs)
    return tensors


def carry_bytes(plan: Plan, graphs: Mapping[str, GraphSpec], *, batch: int) -> int:
    """The memory that a request's carries take."""
    tensors = buffers(graphs, [plan])
    return sum(tensors[name].size_bytes(batch) for name in plan.carries())


def memory(plan: Plan, manifest: Manifest, shape: Shape, *, batch: int = 1) -> dict[str, int]:
    """What a request for ``batch`` images takes, in bytes, on an engine that keeps one copy of the weights.

    ``weights``: of all graphs, once. ``request``: the buffers of one request, carries among them. ``scratch``: what the
    graph at work holds besides: for the hungriest step of the plan, outputs that it does not keep among it, or, where
    they take more, the ControlNets beside it, or the graphs before and after, which encode and decode one image at a
    time, with what they read and give. ``peak``: all of it; each further request that runs at the same time adds
    ``request`` and ``scratch``. The engine's own code, and what it packs anew, are not in it.
    """
    weights = manifest.files[manifest.weights].bytes if manifest.weights else 0
    request = sum(tensor.size_bytes(batch) for tensor in buffers(shape.graphs, [plan]).values())
    scratch = 0
    for graph, writes in {(step.graph, step.writes) for step in plan.steps}:
        scratch = max(scratch, _scratch(shape.graphs[graph], writes, batch))
    for around in shape.graphs.values():
        if around.role == CONTROL:
            scratch = max(scratch, batch * around.scratch_bytes)
        elif around.role != DENOISE:
            least = around.batch[0]
            tensors = (*around.inputs, *around.outputs)
            scratch = max(scratch, least * around.scratch_bytes + sum(t.size_bytes(least) for t in tensors))
    return {"weights": weights, "request": request, "scratch": scratch, "peak": weights + request + scratch}


def _scratch(graph: GraphSpec, writes: Collection[str], batch: int) -> int:
    dropped = [t for t in graph.outputs if t.name not in writes and t.name not in STEP_OUTPUTS]
    return batch * graph.scratch_bytes + sum(tensor.size_bytes(batch) for tensor in dropped)
