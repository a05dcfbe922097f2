"""Plans made of programs: what a step reads and writes follows from the signature of the graph that it runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from tgate_engine.errors import PlanError
from tgate_engine.graph import DENOISE, GraphSpec
from tgate_engine.plan import Call, Plan, Step
from tgate_engine.plan_check import PlanCheck
from tgate_engine.sampler import Fact, Sampler, check_facts


def build_plan(
    name: str,
    program: Sequence[Call],
    *,
    sampler: Sampler,
    guidance_scale: float,
    graphs: Mapping[str, GraphSpec],
    carries: Collection[str],
    settings: Mapping[str, Fact],
    baselines: Sequence[str] = (),
) -> Plan:
    """The plan that runs the graphs of ``program``, one for each network call of ``sampler``.

    ``graphs``: those of a shape. ``carries``: which of their inputs and outputs are carries. A step reads the carries
    that its graph takes, and writes those that a later step reads. Raises :class:`PlanError` for a graph that is not
    there, or a carry that nothing wrote.
    """
    if len(sampler.calls) != len(program):
        raise PlanError(f"the sampler makes {len(sampler.calls)} network calls, the program {len(program)}")
    for index, (_, graph) in enumerate(program):
        if graph not in graphs or graphs[graph].role != DENOISE:
            have = ", ".join(n for n, spec in graphs.items() if spec.role == DENOISE)
            raise PlanError(
                f"step {index} needs graph {graph!r}, which the bundle does not hold (it has {have}). "
                "Export again with settings that need it"
            )
    steps = [
        Step(
            index=index,
            phase=call.phase,
            graph=call.graph,
            call=numbers,
            reads=tuple(n for n in graphs[call.graph].input_names() if n in carries),
            writes=(),
        )
        for index, (call, numbers) in enumerate(zip(program, sampler.calls, strict=True))
    ]
    plan = Plan(
        name=name,
        sampler=sampler,
        guidance_scale=guidance_scale,
        steps=_with_writes(steps, graphs, carries),
        settings=check_facts(dict(settings)),
        baselines=tuple(baselines),
    )
    PlanCheck([graphs], carries)(plan)
    return plan


def _with_writes(steps: Sequence[Step], graphs: Mapping[str, GraphSpec], carries: Collection[str]) -> tuple[Step, ...]:
    """The steps, each writing what its graph gives and a later step reads before it is written again."""
    outputs = {name: [n for n in spec.output_names() if n in carries] for name, spec in graphs.items()}
    live: set[str] = set()
    kept: list[Step] = []
    for step in reversed(steps):
        writes = tuple(name for name in outputs[step.graph] if name in live)
        live = (live - set(writes)) | set(step.reads)
        kept.append(replace(step, writes=writes))
    return tuple(reversed(kept))
