"""Plans of the toy bundle, and of any graphs whose carries are a letter each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tests.toy_bundle import Toy, carries, make_plan, sampler
from tgate_engine.graph import BATCH, DENOISE, GraphSpec, Macs, TensorSpec
from tgate_engine.plan import Call, Plan
from tgate_engine.plan_build import build_plan
from tgate_export.methods.base import Settings

CARRIES = carries(Toy())


def planned(graphs: Mapping[str, GraphSpec], *, lead_in: int = 0, **settings: Any) -> Plan:
    return make_plan("p", Settings(**settings), Toy(), graphs, lead_in=lead_in)


def changed(plan: Plan, index: int, **changes: Any) -> Plan:
    steps = [replace(step, **changes) if step.index == index else step for step in plan.steps]
    return replace(plan, steps=tuple(steps))


def build(graphs: Mapping[str, GraphSpec], program: Sequence[str], **more: Any) -> Plan:
    """A plan over any graphs whose carries are one letter each."""
    return build_plan(
        "p",
        [Call("phase", graph) for graph in program],
        sampler=sampler(len(program)),
        guidance_scale=3.0,
        graphs=graphs,
        carries=[*"abcd"],
        settings={},
        **more,
    )


def graph(reads: str, writes: str, shape: tuple[int | str, ...] = (BATCH, 3)) -> GraphSpec:
    """A graph that takes and gives carries of one letter, beside something that is no carry."""

    def tensors(names: str) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name=name, dtype="float32", shape=shape) for name in ("z", *names))

    return GraphSpec(
        file="g.onnx",
        role=DENOISE,
        batch=(1, 4),
        inputs=tensors(reads),
        outputs=tensors(writes),
        macs=Macs(paper=0, all=0),
    )
