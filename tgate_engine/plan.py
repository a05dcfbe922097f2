"""The program of one trajectory: which graph runs at each step, and which carries it reads and writes.

A method says which graph each network call runs; what is read and written follows from the graphs' signatures
(:func:`tgate_engine.plan_build.build_plan`). Run time only reads plans, and proves them
(:class:`tgate_engine.plan_check.PlanCheck`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from tgate_engine.errors import BundleError, PlanError, SamplerError, TgateError
from tgate_engine.graph import GraphSpec
from tgate_engine.plain_files import open_plain, read_most
from tgate_engine.reader import Reader, parse_json
from tgate_engine.sampler import HISTORY, MOST_CALLS, MOST_LEAD_IN, MOST_STEPS, Fact, Sampler, SamplerStep, check_facts

MOST_BYTES = 8 << 20
"""How large a plan's file may be: room for the most calls there are, over 140 carries."""
MOST_GUIDANCE = 1e4
"""The largest guidance scale there is. Half precision holds six times that, and pictures go grey long before."""
_ADVICE = "make the plan again with `tgate plan`"


class Call(NamedTuple):
    """What a method says of one network call: the graph that runs, and the phase it belongs to, a word for people."""

    phase: str
    graph: str


@dataclass(frozen=True, kw_only=True)
class Step:
    """One network call.

    ``call`` holds its timestep and sampler coefficients. ``reads`` are carries that the graph takes as inputs,
    all written by earlier steps; ``writes`` are those of its outputs that a later step reads before they are
    written again.
    """

    index: int
    phase: str
    graph: str
    call: SamplerStep
    reads: tuple[str, ...]
    writes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An immutable program of :class:`Step`.

    ``settings``: what it was made from, as facts for people and for `tgate plan`; nothing at run time reads them.
    ``baselines``: names of the bundle's plans that it is to be measured against, the plainest first; empty for one
    that is a baseline itself.
    """

    name: str
    sampler: Sampler
    guidance_scale: float
    steps: tuple[Step, ...]
    settings: Mapping[str, Fact] = field(default_factory=dict, hash=False)
    baselines: tuple[str, ...] = ()

    def graphs(self) -> tuple[str, ...]:
        """The graphs this plan runs, each once, in order of first use."""
        return tuple(dict.fromkeys(step.graph for step in self.steps))

    def carries(self) -> tuple[str, ...]:
        """The carries this plan reads, each once, in order of first use."""
        return tuple(dict.fromkeys(name for step in self.steps for name in step.reads))

    @property
    def gate(self) -> int | None:
        """The index of the first step of another phase than the first one's; None where there is one phase alone."""
        later = (step.index for step in self.steps if step.phase != self.steps[0].phase)
        return next(later, None)

    def same_program(self, other: Plan) -> bool:
        """Whether both give the same pictures: the same steps, sampler and guidance, whatever they are called."""
        mine, theirs = (
            (
                p.guidance_scale,
                p.sampler.name,
                p.sampler.initial_scale,
                [(s.graph, s.call, s.reads, s.writes) for s in p.steps],
            )
            for p in (self, other)
        )
        return mine == theirs

    def macs(self, graphs: Mapping[str, GraphSpec]) -> tuple[int, int]:
        """Multiply-accumulates of the whole trajectory for one image: (paper's count, all)."""
        specs = [graphs[step.graph].macs for step in self.steps]
        return sum(m.paper for m in specs), sum(m.all for m in specs)

    def to_json(self) -> dict[str, Any]:
        """The plan as JSON values; :meth:`from_json` gives back an equal one."""
        sampler = self.sampler.to_json()
        calls = sampler.pop("calls")
        steps = []
        for step, call in zip(self.steps, calls, strict=True):
            head = {"index": step.index, "phase": step.phase, "graph": step.graph}
            steps.append({**head, **call, "reads": list(step.reads), "writes": list(step.writes)})
        return {
            "name": self.name,
            "settings": dict(self.settings),
            "baselines": list(self.baselines),
            "guidance_scale": self.guidance_scale,
            "sampler": sampler,
            "steps": steps,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Plan:
        """The plan written by :meth:`to_json`. Raises :class:`PlanError`."""
        return _plan_of(data, "plan")

    @staticmethod
    def read(r: Reader) -> Plan:
        """The same, where a reader stands. Raises :class:`BundleError`, or the sampler's error."""
        steps = r.items("steps", _step, MOST_CALLS)
        sampler = r.inner("sampler").all_of(
            lambda s: Sampler(
                name=s.word("name"),
                steps=s.whole("steps", 1, MOST_STEPS),
                initial_scale=s.number("initial_scale"),
                calls=tuple(step.call for step in steps),
                lead_in=s.whole("lead_in", 0, MOST_LEAD_IN),
                prediction_type=s.word("prediction_type"),
                options=check_facts(s.get("options", dict)),
            )
        )
        return Plan(
            name=r.word("name"),
            sampler=sampler,
            guidance_scale=r.number("guidance_scale", 0, MOST_GUIDANCE),
            steps=steps,
            settings=check_facts(r.get("settings", dict)),
            baselines=r.words("baselines"),
        )

    @staticmethod
    def load(path: str | os.PathLike[str]) -> Plan:
        """The plan of a file that ``tgate plan --output`` wrote. Raises :class:`PlanError` for a file that is none."""
        try:
            with open_plain(Path(path)) as file:
                data = parse_json(read_most(file, MOST_BYTES))
        except FileNotFoundError:
            raise PlanError(f"{os.fspath(path)}: there is no such plan file; write one with `tgate plan`") from None
        except (OSError, ValueError) as error:
            raise PlanError(f"{os.fspath(path)} is not a plan file ({error}); write one with `tgate plan`") from None
        if not isinstance(data, dict):
            raise PlanError(f"{os.fspath(path)} holds {type(data).__name__}, not a plan; write one with `tgate plan`")
        return _plan_of(data, os.fspath(path))


def _plan_of(data: Any, where: str) -> Plan:
    try:
        return Reader(data, where, _ADVICE).all_of(Plan.read)
    except PlanError:
        raise
    except SamplerError as error:
        raise PlanError(f"{where}: {error}; {_ADVICE}") from None
    except TgateError as error:
        raise PlanError(str(error)) from None


def _coefficients(r: Reader, key: str) -> tuple[float, ...]:
    values = r.get(key, list)
    if len(values) != HISTORY + 1:
        raise BundleError(f"{r.where}.{key}: expected {HISTORY + 1} coefficients, got {len(values)}; {r.advice}")
    return tuple(r.finite(key, value) for value in values)


def _step(r: Reader) -> Step:
    return Step(
        index=r.whole("index"),
        phase=r.word("phase"),
        graph=r.word("graph"),
        call=SamplerStep(
            timestep=r.number("timestep"),
            input_scale=r.number("input_scale"),
            latents=_coefficients(r, "latents"),
            outputs=_coefficients(r, "outputs"),
            noise=r.number("noise"),
        ),
        reads=r.words("reads"),
        writes=r.words("writes"),
    )
