"""The program of one trajectory: which graph runs at each step, and which carries it reads and writes.

A plan is made at export (:func:`build_plan`) from a :class:`~tgate_engine.schedule.Schedule`, a compiled
:class:`~tgate_engine.sampler.Sampler` and the graphs there are. Run time only reads it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from tgate_engine.errors import PlanError
from tgate_engine.sampler import Sampler, SamplerStep
from tgate_engine.schedule import Action, Phase, Schedule, Use

if TYPE_CHECKING:
    from tgate_engine.manifest import Carry, GraphSpec, Manifest

FULL = "full"
REUSE_SELF = "reuse_self"
REUSE_CROSS = "reuse_cross"
REUSE_BOTH = "reuse_both"
UNGUIDED = "unguided"
DENOISING_GRAPHS = (FULL, REUSE_SELF, REUSE_CROSS, REUSE_BOTH, UNGUIDED)

_SAMPLER_STEP_FIELDS = ("timestep", "input_scale", "latents", "outputs", "noise")


@dataclass(frozen=True, kw_only=True)
class Step:
    """One network call.

    ``call`` holds its timestep and sampler coefficients. ``reads`` are carries that the graph takes as inputs,
    all written by earlier steps; ``writes`` are those of its outputs that a later step reads.
    """

    index: int
    phase: Phase
    graph: str
    call: SamplerStep
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An immutable program of :class:`Step`, with the settings that made it."""

    name: str
    schedule: Schedule
    sampler: Sampler
    guidance_scale: float
    steps: tuple[Step, ...]

    def graphs(self) -> tuple[str, ...]:
        """The graphs this plan runs, each once, in order of first use."""
        return tuple(dict.fromkeys(step.graph for step in self.steps))

    def carries(self) -> tuple[str, ...]:
        """The carries this plan reads, each once, in order of first use."""
        return tuple(dict.fromkeys(name for step in self.steps for name in step.reads))

    def check(self, manifest: Manifest) -> None:
        """Prove that the plan can run on this bundle.

        Every graph exists; the carries a step reads are exactly those its graph takes; and each was written by
        an earlier step with the shape and dtype it is read in. Raises :class:`PlanError` at the first fault.
        """
        if len(self.steps) != self.schedule.calls or len(self.sampler.calls) != self.schedule.calls:
            raise PlanError(
                f"plan {self.name!r} has {len(self.steps)} steps and {len(self.sampler.calls)} sampler calls; "
                f"its schedule wants {self.schedule.calls} of each. Make it again with `tgate plan`."
            )
        carries = manifest.carry_specs()
        written: dict[str, tuple[str, tuple[int | str, ...]]] = {}
        for position, step in enumerate(self.steps):
            where = f"plan {self.name!r}, step {step.index}"
            if step.index != position:
                raise PlanError(f"{where}: expected index {position}. Make the plan again with `tgate plan`.")
            if step.graph not in manifest.graphs or step.graph not in DENOISING_GRAPHS:
                have = ", ".join(name for name in DENOISING_GRAPHS if name in manifest.graphs)
                raise PlanError(f"{where} runs graph {step.graph!r}; the bundle has {have}. Export the bundle again.")
            graph = manifest.graphs[step.graph]
            takes = {t.name: (t.dtype, t.shape) for t in graph.inputs if t.name in carries}
            gives = {t.name: (t.dtype, t.shape) for t in graph.outputs if t.name in carries}
            for name in step.reads:
                if name not in written:
                    raise PlanError(
                        f"{where} reads {name}, which no earlier step writes; "
                        f"the steps before it write {_some(written)}. Make the plan again with `tgate plan`."
                    )
            if set(step.reads) != set(takes):
                odd = sorted(set(step.reads) ^ set(takes))
                raise PlanError(f"{where}: graph {step.graph!r} reads {_some(takes)}, the plan differs in {_some(odd)}")
            for name in step.reads:
                if written[name] != takes[name]:
                    raise PlanError(f"{where} reads {name} as {takes[name]}, but it was written as {written[name]}")
            for name in step.writes:
                if name not in gives:
                    raise PlanError(f"{where} writes {name}, which graph {step.graph!r} does not give")
                written[name] = gives[name]

    def macs(self, graphs: Mapping[str, GraphSpec]) -> tuple[int, int]:
        """Multiply-accumulates of the whole trajectory for one image: (paper's count, all)."""
        specs = [graphs[step.graph].macs for step in self.steps]
        return sum(m.paper for m in specs), sum(m.all for m in specs)

    def to_json(self) -> dict[str, Any]:
        sampler = self.sampler.to_json()
        calls = sampler.pop("calls")
        steps = []
        for step, call in zip(self.steps, calls, strict=True):
            head = {"index": step.index, "phase": str(step.phase), "graph": step.graph}
            steps.append({**head, **call, "reads": list(step.reads), "writes": list(step.writes)})
        return {
            "name": self.name,
            "schedule": asdict(self.schedule),
            "guidance_scale": self.guidance_scale,
            "sampler": sampler,
            "steps": steps,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Plan:
        """The plan written by :meth:`to_json`. Raises :class:`PlanError` (or the schedule's or sampler's error)."""
        try:
            name, guidance, steps = data["name"], data["guidance_scale"], data["steps"]
            schedule = Schedule(**data["schedule"])
            calls = [{key: step[key] for key in _SAMPLER_STEP_FIELDS} for step in steps]
            sampler = Sampler.from_json({**data["sampler"], "calls": calls})
            if not isinstance(name, str) or isinstance(guidance, bool) or not isinstance(guidance, (int, float)):
                raise PlanError(f"a plan needs a name and a guidance scale, got {name!r} and {guidance!r}")
            if not math.isfinite(guidance):
                raise PlanError(f"plan {name!r} needs a finite guidance scale, got {guidance}")
            return Plan(
                name=name,
                schedule=schedule,
                sampler=sampler,
                guidance_scale=float(guidance),
                steps=tuple(
                    Step(
                        index=int(step["index"]),
                        phase=Phase(step["phase"]),
                        graph=str(step["graph"]),
                        call=call,
                        reads=tuple(str(r) for r in step["reads"]),
                        writes=tuple(str(w) for w in step["writes"]),
                    )
                    for step, call in zip(steps, sampler.calls, strict=True)
                ),
            )
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise PlanError(f"a plan is malformed ({type(error).__name__}: {error}); export the bundle again") from None


def build_plan(
    name: str,
    *,
    schedule: Schedule,
    sampler: Sampler,
    guidance_scale: float,
    graphs: Mapping[str, GraphSpec],
    carries: Sequence[Carry],
) -> Plan:
    """The plan of ``schedule`` over ``graphs``; a step writes a carry only if a later step reads that value.

    Raises :class:`PlanError` where the schedule needs a graph or a carry that is not there.
    """
    if len(sampler.calls) != schedule.calls:
        raise PlanError(f"the sampler makes {len(sampler.calls)} network calls, the schedule {schedule.calls}")
    specs = {carry.name: carry for carry in carries}
    has_means = any(carry.attention == "self" and carry.mean for carry in carries)
    steps: list[Step] = []
    for index, (action, call) in enumerate(zip(schedule.actions(), sampler.calls, strict=True)):
        graph = _graph_for(action)
        if graph not in graphs:
            raise PlanError(
                f"step {index} needs graph {graph!r}, which the bundle does not hold "
                f"(it has {', '.join(g for g in DENOISING_GRAPHS if g in graphs)}). {_ADVICE.get(graph, '')}".rstrip()
            )
        reads = tuple(n for n in graphs[graph].input_names() if n in specs)
        outputs = (n for n in graphs[graph].output_names() if n in specs)
        writes = tuple(n for n in outputs if _stores(action, specs[n], has_means))
        steps.append(Step(index=index, phase=action.phase, graph=graph, call=call, reads=reads, writes=writes))
    return Plan(
        name=name, schedule=schedule, sampler=sampler, guidance_scale=guidance_scale, steps=_without_dead_writes(steps)
    )


_ADVICE = {
    REUSE_BOTH: "Export again with --fidelity-interval above 1.",
    UNGUIDED: "The bundle was exported without guidance, so there is nothing to stop.",
}


def _graph_for(action: Action) -> str:
    if action.cross is Use.REUSE:
        return REUSE_BOTH if action.self_ is Use.REUSE else REUSE_CROSS
    if not action.guided:
        return UNGUIDED
    return REUSE_SELF if action.self_ is Use.REUSE else FULL


def _stores(action: Action, carry: Carry, has_means: bool) -> bool:
    """Whether ``action`` stores ``carry``.

    Where there are means of self-attention, they are stored at the gate and after it, both halves before it.
    """
    if carry.attention == "cross":
        return action.cross is Use.STORE
    wants_mean = action.gate or action.phase is Phase.FIDELITY
    return action.self_ is Use.STORE and (not has_means or carry.mean == wants_mean)


def _without_dead_writes(steps: Sequence[Step]) -> tuple[Step, ...]:
    live: set[str] = set()
    kept: list[Step] = []
    for step in reversed(steps):
        writes = tuple(name for name in step.writes if name in live)
        live = (live - set(writes)) | set(step.reads)
        kept.append(replace(step, writes=writes))
    return tuple(reversed(kept))


def _some(names: Mapping[str, object] | Sequence[str]) -> str:
    listed = list(names)
    if not listed:
        return "nothing"
    return ", ".join(listed) if len(listed) <= 4 else f"{listed[0]}, {listed[1]} … {listed[-1]} ({len(listed)} in all)"
