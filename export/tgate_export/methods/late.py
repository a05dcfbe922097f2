"""A second network, which runs the late steps: how a program of calls is shared out between two networks.

Some models have one network for high noise and another one for low noise, of one architecture (Wan 2.2). Which of them
runs at a step follows from the step's timestep alone, so it is settled when the plan is made. Methods know nothing of
it: they say what one network would do at each call, and :func:`shared_out` makes of that a program over the graphs of
both. m, k, w, f and g count steps of the whole schedule. What one network kept is of no use to the other one: at the
first step after a change of networks everything is computed and kept anew, whatever the method would have reused there.

The graphs of the second network are those of the first with :data:`PREFIX` before their names. Their carries have the
same names, so that the buffers of one serve both; :func:`shared_out` sees to it that nobody reads the other one's.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from tgate_engine.errors import MethodError
from tgate_engine.plan import Call
from tgate_engine.sampler import Fact, Sampler
from tgate_export.methods.base import FULL, UNGUIDED, Settings

PREFIX = "late_"

_BELOW, _GUIDANCE = "late_below", "late_guidance"


@dataclass(frozen=True, kw_only=True)
class Late:
    """When the second network runs, and how it is guided.

    ``below``: it runs at every timestep below this one, in training steps. ``guidance``: its guidance scale where a
    plan's own is ``beside``; where requests ask for another scale, both go on from 1 in the same proportion
    (:attr:`share`), which is part of the graphs.
    """

    below: float
    guidance: float = 1.0
    beside: float = 1.0

    @staticmethod
    def of(facts: Mapping[str, Fact], scale: float) -> Late | None:
        """What :meth:`facts` told of a plan with that guidance scale; None where there is one network. Raises
        :class:`MethodError` for facts that are no numbers."""
        if _BELOW not in facts:
            return None
        below, guidance = facts[_BELOW], facts.get(_GUIDANCE, 1.0)
        if not isinstance(below, (int, float)) or not isinstance(guidance, (int, float)):
            raise MethodError(
                f"a plan's {_BELOW} and {_GUIDANCE} are numbers, got {below!r} and {guidance!r}; export the bundle "
                "again"
            )
        return Late(below=float(below), guidance=float(guidance), beside=scale)

    def facts(self) -> dict[str, Fact]:
        """For a plan's reader, and for :meth:`of`."""
        return {_BELOW: self.below, **({_GUIDANCE: self.guidance} if self.beside > 1 else {})}

    @property
    def share(self) -> float:
        """What the second network's guidance has of the first one's, both less 1; 1 without guidance."""
        return (self.guidance - 1) / (self.beside - 1) if self.beside > 1 else 1.0

    def at(self, scale: float) -> Late:
        """The same graphs where a plan's guidance scale is another one."""
        return replace(self, guidance=1 + (scale - 1) * self.share, beside=scale)

    def calls(self, sampler: Sampler) -> tuple[bool, ...]:
        """Of each of a sampler's calls, whether the second network runs it. Compared in float32, as PyTorch does."""
        return tuple(bool(np.float32(call.timestep) < np.float32(self.below)) for call in sampler.calls)

    @staticmethod
    def check(settings: Settings) -> None:
        """Raises :class:`MethodError` for settings that two networks cannot share."""
        if settings.forecast_interval > 1:
            raise MethodError(
                f"forecasts (every {settings.forecast_interval} steps) are not made of a model of two networks: at "
                "their boundary the output of one would be forecast from those of the other; leave --forecast out, and "
                "take --method tgate or guidance_delta"
            )


def shared_out(program: Sequence[Call], late: Sequence[bool]) -> tuple[Call, ...]:
    """The program over the graphs of both networks. ``late``: of each call, whether the second network runs it.

    A call that follows one of the other network is full where it would have reused anything.
    """
    calls = []
    for i, (call, second) in enumerate(zip(program, late, strict=True)):
        changed = i > 0 and second != late[i - 1]
        graph = FULL if changed and call.graph not in (FULL, UNGUIDED) else call.graph
        calls.append(Call(call.phase, PREFIX + graph if second else graph))
    return tuple(calls)


def has_late(graphs: Collection[str]) -> bool:
    """Whether graphs of those names are of two networks."""
    return PREFIX + FULL in graphs
