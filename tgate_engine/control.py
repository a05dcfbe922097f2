"""ControlNets: networks beside the denoiser that look at a picture, and what of theirs the denoiser adds to its own.

Each is a graph of its own, of role ``"control"``, and what it gives are inputs of the denoising graphs by these names.
Which one a step runs follows from the signatures: the graph that gives exactly what the step's graph takes of a
ControlNet. The denoising graph takes a scale beside it, a number for each image; where that is 0, nothing is added,
whatever lies in the buffers, so a step runs a ControlNet for those images alone that want it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from tgate_engine.errors import BundleError, RequestError, shown
from tgate_engine.graph import BATCH, CONTROL, DENOISE, GraphSpec, TensorSpec
from tgate_engine.plan import Plan

MOST_SCALE = 1e4
"""Of a ControlNet in a request; what is usual is 0.3 to 1.5."""

_PREFIX = "control."
_PICTURE = "picture"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")


def check_control_name(name: object) -> str:
    """``name``, if a ControlNet can be called so. Raises :class:`RequestError`."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            "a ControlNet's name is 1 to 64 letters, digits, dashes and underscores, and begins with one of the first "
            f"two, got '{shown(name, 80)}'"
        )
    return name


def scale_name(net: str) -> str:
    """Input of the denoiser, float32 [B]: what a ControlNet's residuals are multiplied with."""
    return f"{_PREFIX}{net}"


def picture_name(net: str) -> str:
    """Input of a ControlNet, uint8 [B, H, W, 3]: the picture that it looks at, RGB."""
    return f"{_PREFIX}{net}.{_PICTURE}"


def residual_name(net: str, index: int) -> str:
    """What a ControlNet gives and the denoiser takes, by half (:func:`~tgate_engine.step.half`), [B, ...]: the
    ``index``-th tensor that is added, those of the way down first and that of the middle last."""
    return f"{_PREFIX}{net}.{index}"


def nets_of(graph: GraphSpec) -> tuple[str, ...]:
    """The ControlNets of which a denoising graph takes something, in the order of its inputs."""
    return tuple(_taken(graph))


def nets_in(graphs: Mapping[str, GraphSpec]) -> tuple[str, ...]:
    """Those of all graphs of a shape, each once."""
    denoisers = (graph for graph in graphs.values() if graph.role == DENOISE)
    return tuple(dict.fromkeys(net for graph in denoisers for net in nets_of(graph)))


def is_control(name: str) -> bool:
    """Whether an input of a denoising graph comes from a ControlNet, or from whoever asks for one."""
    return name.startswith(_PREFIX)


def control_graph(graphs: Mapping[str, GraphSpec], denoiser: str, net: str) -> GraphSpec:
    """The graph of a shape that gives what one of its denoising graphs takes of a ControlNet. Raises
    :class:`BundleError` where there is none, or it gives it in another form."""
    return _given(_by_outputs(graphs), denoiser, net, _taken(graphs[denoiser])[net])


def controls_for(graphs: Mapping[str, GraphSpec], names: Iterable[str]) -> dict[str, GraphSpec]:
    """The ControlNets' graphs, by their names, that run beside the denoising graphs of ``names``. Raises as
    :func:`control_graph` does, and for a graph that takes residuals without their scale, or a scale alone."""
    known, files = _by_outputs(graphs), set[str]()
    for name in names:
        there = set(graphs[name].input_names())
        for net, tensors in _taken(graphs[name]).items():
            if scale_name(net) not in there or not tensors:
                what = "residuals without their scale" if tensors else "a scale without residuals"
                raise BundleError(f"graph {name!r} takes of ControlNet {net!r:.80} {what}; export the bundle again")
            files.add(_given(known, name, net, tensors).file)
    return {name: spec for name, spec in graphs.items() if spec.role == CONTROL and spec.file in files}


def _taken(graph: GraphSpec) -> dict[str, dict[str, TensorSpec]]:
    """By ControlNet, what a denoising graph takes of it beside its scale, by name."""
    found: dict[str, dict[str, TensorSpec]] = {}
    for tensor in graph.inputs:
        if is_control(tensor.name):
            net, dot, _ = tensor.name.removeprefix(_PREFIX).partition(".")
            own = found.setdefault(net, {})
            if dot:
                own[tensor.name] = tensor
    return found


def _by_outputs(graphs: Mapping[str, GraphSpec]) -> dict[frozenset[str], GraphSpec]:
    """The ControlNets' graphs, by the names of all that each gives."""
    return {frozenset(graph.output_names()): graph for graph in graphs.values() if graph.role == CONTROL}


def _given(
    known: Mapping[frozenset[str], GraphSpec], denoiser: str, net: str, wanted: Mapping[str, TensorSpec]
) -> GraphSpec:
    graph = known.get(frozenset(wanted))
    if graph is None:
        raise BundleError(
            f"graph {denoiser!r} takes {len(wanted)} tensors of ControlNet {net!r:.80}, which no graph gives as they "
            "are; export the bundle again"
        )
    if odd := [tensor.name for tensor in graph.outputs if wanted[tensor.name] != tensor]:
        raise BundleError(
            f"graph {denoiser!r} takes {odd[0]:.80} in another form than {graph.file} gives it; export the bundle again"
        )
    return graph


def check_control(shape: Sequence[int], batch: tuple[int, int], name: str, graph: GraphSpec) -> None:
    """Raises :class:`BundleError` for a ControlNet's graph that is not for pictures of ``shape``, (height, width), and
    for calls of ``batch`` images."""
    net = graph.output_names()[0].removeprefix(_PREFIX).partition(".")[0] if graph.outputs else ""
    pictures = [tensor for tensor in graph.inputs if tensor.name == picture_name(net)]
    if [(t.dtype, t.shape) for t in pictures] != [("uint8", (BATCH, *shape, 3))]:
        raise BundleError(
            f"graph {name!r} does not take one picture for each image, of {shape[1]} x {shape[0]} pixels; export the "
            "bundle again"
        )
    if graph.batch != batch:
        raise BundleError(
            f"graph {name!r} is for {graph.batch[0]} to {graph.batch[1]} images, and its shape for {batch[0]} to "
            f"{batch[1]}; export the bundle again"
        )


def scales_by_step(
    plan: Plan, *, scale: float, start: float = 0.0, end: float = 1.0, until_gate: bool = False
) -> tuple[float, ...]:
    """What a ControlNet's residuals are multiplied with at each of a plan's network calls, 0 where it does not run.

    ``start``, ``end``: which part of the calls, as diffusers counts them: of n calls, call i is one of them unless
    i / n < start or (i + 1) / n > end. ``until_gate``: none from the gate on (:attr:`~tgate_engine.plan.Plan.gate`).
    Raises :class:`RequestError` where no call is left, and where ``until_gate`` would change nothing.
    """
    calls = len(plan.steps)
    runs = [not (i / calls < start or (i + 1) / calls > end) for i in range(calls)]
    if until_gate:
        gate = calls if plan.gate is None else plan.gate
        if not any(runs[gate:]):
            why = "has no gate" if plan.gate is None else f"has its gate at call {gate} of {calls}, after the last one"
            raise RequestError(
                f"a ControlNet that stops at the gate would change nothing: plan '{shown(plan.name)}' {why}; leave it "
                "out"
            )
        runs = [runs[i] and i < gate for i in range(calls)]
    if not any(runs):
        raise RequestError(
            f"a ControlNet from {start:g} to {end:g} of the way{' and not beyond the gate' if until_gate else ''} runs "
            f"at none of the {calls} network calls of plan '{shown(plan.name)}'; take more of it"
        )
    return tuple(scale if run else 0.0 for run in runs)
