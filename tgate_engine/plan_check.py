"""The proof that plans can run, before anything does."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import NamedTuple

from tgate_engine.errors import PlanError
from tgate_engine.graph import DENOISE, Dim, GraphSpec, TensorSpec
from tgate_engine.plan import Plan, Step

_AGAIN = "Make the plan again with `tgate plan`."

_Form = tuple[str, tuple[Dim, ...]]
"""A carry's dtype and shape."""


class _Carried(NamedTuple):
    """The carries among a graph's inputs and its outputs, in their order."""

    takes: dict[str, _Form]
    gives: dict[str, _Form]


_Denoisers = dict[str, _Carried]
"""Those of one shape, by name, in the bundle's order."""

_Handed = tuple[str, str, str]
"""Two graphs and a carry: the second takes what the first has given."""


class PlanCheck:
    """Proves that plans can run on the graphs of every one of some shapes. Not for several threads at once.

    For each shape: every graph exists; the carries that a step reads are exactly those its graph takes; each was
    written by an earlier step with the shape and dtype it is read in; and a step writes exactly those carries that a
    later step reads. So images at different steps of one graph can share a call: what it writes for one of them beyond
    its own step is read by nobody.

    However many shapes there are, a sound plan is walked on the first of them alone: what it needs of the others
    follows from that walk, and is asked of each of them once for all plans.
    """

    def __init__(self, shapes: Iterable[Mapping[str, GraphSpec]], carries: Collection[str]) -> None:
        """``shapes``: the graphs of each, by name. ``carries``: which of their inputs and outputs are carries."""
        same: dict[_Form, _Form] = {}  # equal forms are one object, which compares at once
        self._shapes = [
            {
                name: _Carried(_carried(spec.inputs, carries, same), _carried(spec.outputs, carries, same))
                for name, spec in graphs.items()
                if spec.role == DENOISE
            }
            for graphs in shapes
        ]
        self._agreed: set[_Handed] = set()  # of one form in every shape

    def __call__(self, plan: Plan) -> None:
        """Raises :class:`PlanError` at the first fault."""
        if not plan.steps or len(plan.steps) != len(plan.sampler.calls):
            raise PlanError(
                f"plan {plan.name!r} has {len(plan.steps)} steps and {len(plan.sampler.calls)} sampler calls, which "
                f"must be as many, and one at least. {_AGAIN}"
            )
        for denoisers in self._shapes[:1]:
            _walk(plan, denoisers)
        if len(self._shapes) > 1:
            takes, spared, handed = _needs(plan)
            handed -= self._agreed
            for denoisers in self._shapes[1:]:
                if not _meets(denoisers, takes, spared, handed):
                    _walk(plan, denoisers)  # and say what it is
            self._agreed |= handed


def _needs(plan: Plan) -> tuple[dict[str, set[str]], dict[str, set[str]], set[_Handed]]:
    """What a plan that runs on one shape needs of another to run there: which carries each graph takes, which it must
    not give, because a later step reads an earlier one's, and what is handed on, which must be of one form."""
    takes = {step.graph: set(step.reads) for step in plan.steps}
    writer: dict[str, str] = {}
    handed: set[_Handed] = set()
    for step in plan.steps:
        handed.update((writer[name], step.graph, name) for name in step.reads)
        writer.update(dict.fromkeys(step.writes, step.graph))
    spared: dict[str, set[str]] = {name: set() for name in takes}
    live: set[str] = set()
    for step in reversed(plan.steps):
        live.difference_update(step.writes)
        spared[step.graph] |= live
        live.update(step.reads)
    return takes, spared, handed


def _meets(
    denoisers: _Denoisers,
    takes: Mapping[str, set[str]],
    spared: Mapping[str, set[str]],
    handed: Collection[_Handed],
) -> bool:
    return (
        takes.keys() <= denoisers.keys()
        and all(denoisers[name].takes.keys() == carries for name, carries in takes.items())
        and all(denoisers[name].gives.keys().isdisjoint(carries) for name, carries in spared.items())
        and all(denoisers[giver].gives.get(name) == denoisers[taker].takes[name] for giver, taker, name in handed)
    )


def _walk(plan: Plan, denoisers: _Denoisers) -> None:
    """The proof on one shape, step by step."""
    _check_carries(plan, denoisers)
    _check_writes(plan, denoisers)


def _check_carries(plan: Plan, denoisers: _Denoisers) -> None:
    """Forwards: graphs and carries are there when a step asks for them."""
    written: dict[str, _Form] = {}
    for position, step in enumerate(plan.steps):
        where = f"plan {plan.name!r}, step {step.index}"
        if step.index != position:
            raise PlanError(f"{where}: expected index {position}. {_AGAIN}")
        graph = denoisers.get(step.graph)
        if graph is None:
            have = ", ".join(denoisers)
            raise PlanError(f"{where} runs graph {step.graph!r}; the bundle has {have}. Export the bundle again.")
        if not (graph.takes.keys() == set(step.reads) and graph.takes.items() <= written.items()):
            raise PlanError(f"{where}{_misread(step, graph.takes, written)}")
        for name in step.writes:
            if name not in graph.gives:
                raise PlanError(f"{where} writes {name}, which graph {step.graph!r} does not give")
            written[name] = graph.gives[name]


def _misread(step: Step, takes: Mapping[str, _Form], written: Mapping[str, _Form]) -> str:
    """What is wrong with a step's carries. ``written``: what those before it have left."""
    for name in step.reads:
        if name not in written:
            return f" reads {name}, which no earlier step writes; the steps before it write {_some(written)}. {_AGAIN}"
    if odd := sorted(set(step.reads) ^ takes.keys()):
        return f": graph {step.graph!r} reads {_some(takes)}, the plan differs in {_some(odd)}"
    name = next(name for name in step.reads if written[name] != takes[name])
    return f" reads {name} as {takes[name]}, but it was written as {written[name]}"


def _check_writes(plan: Plan, denoisers: _Denoisers) -> None:
    """Backwards: a step writes what its graph gives and a later step reads before it is written again."""
    live: set[str] = set()
    fault: tuple[Step, set[str]] | None = None  # the first one is the last that this comes to
    for step in reversed(plan.steps):
        proper = denoisers[step.graph].gives.keys() & live
        if odd := proper.symmetric_difference(step.writes):
            fault = step, odd
        live -= proper
        live.update(step.reads)
    if fault is not None:
        step, odd = fault
        raise PlanError(
            f"plan {plan.name!r}, step {step.index}: a step writes the carries of its graph that a later step "
            f"reads, no others; the plan differs in {_some(sorted(odd))}. {_AGAIN}"
        )


def _carried(tensors: Iterable[TensorSpec], carries: Collection[str], same: dict[_Form, _Form]) -> dict[str, _Form]:
    """Those of a graph's inputs or outputs that are carries. ``same``: the one object of every form there is."""
    forms = {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors if tensor.name in carries}
    return {name: same.setdefault(form, form) for name, form in forms.items()}


def _some(names: Collection[str]) -> str:
    listed = list(names)
    if not listed:
        return "nothing"
    return ", ".join(listed) if len(listed) <= 4 else f"{listed[0]}, {listed[1]} … {listed[-1]} ({len(listed)} in all)"
