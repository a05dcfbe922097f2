"""What each denoising step computes, stores and reuses: the paper's rule, as a function of numbers.

TGATE (arXiv 2404.02747, section 4) decides from the step index alone. Nothing here knows about
graphs, tensors or samplers; :mod:`tgate_engine.plan` turns the answers into a plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from tgate_engine.errors import ScheduleError


class Phase(StrEnum):
    """A stretch of the trajectory, in the paper's words."""

    PLANNING = "semantics-planning"
    FIDELITY = "fidelity-improving"


class Use(StrEnum):
    """What a step does with the outputs of one kind of attention."""

    COMPUTE = "compute"
    STORE = "compute-and-store"
    REUSE = "reuse"


@dataclass(frozen=True, kw_only=True)
class Action:
    """What one network call does.

    ``guided``: both halves of classifier-free guidance run (batch 2B); otherwise one half (batch B).
    ``gate``: this is the gate step, whose stored outputs are the mean of both halves.
    """

    phase: Phase
    guided: bool
    cross: Use
    self_: Use
    gate: bool = False


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The settings of the method.

    ``steps``: n, denoising steps, at least 1.
    ``gate``: m, in 1..n. Steps 0..m-1 are guided; from step m on cross-attention is reused and guidance
    is off. m = n never leaves the planning phase.
    ``self_interval``: k, at least 1. In the planning phase, self-attention is computed at every k-th step.
    k = 1 switches its reuse off: TGATE (CA); k > 1 is TGATE (CA, SA).
    ``warm_up``: w, at least 0. Steps before w compute everything, and step w stores self-attention.
    ``fidelity_interval``: f, at least 1, the same interval after the gate. 1: always computed.
    ``lead_in``: network calls a sampler makes before the rules begin (PNDM: 1). They are plain full calls.
    ``reuse``: False leaves attention untouched and only stops guidance at m ("guidance stopped").

    Raises :class:`ScheduleError` naming the value got and the value wanted.
    """

    steps: int
    gate: int
    self_interval: int = 1
    warm_up: int = 2
    fidelity_interval: int = 1
    lead_in: int = 0
    reuse: bool = True

    def __post_init__(self) -> None:
        for name in ("steps", "gate", "self_interval", "warm_up", "fidelity_interval", "lead_in"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ScheduleError(f"{name} must be a whole number, got {value!r}")
        if self.steps < 1:
            raise ScheduleError(f"steps (n) must be at least 1, got {self.steps}")
        if not 1 <= self.gate <= self.steps:
            raise ScheduleError(
                f"the gate step m must be between 1 and the number of steps n = {self.steps}, got m = {self.gate}"
            )
        if self.self_interval < 1:
            raise ScheduleError(
                "the self-attention interval k must be at least 1 (1 switches its reuse off), "
                f"got k = {self.self_interval}"
            )
        if self.warm_up < 0:
            raise ScheduleError(f"the warm-up must be at least 0 steps, got {self.warm_up}")
        if self.fidelity_interval < 1:
            raise ScheduleError(
                "the fidelity interval f must be at least 1 (1 always computes self-attention after the gate), "
                f"got f = {self.fidelity_interval}"
            )
        if self.lead_in < 0:
            raise ScheduleError(f"lead_in must be at least 0 calls, got {self.lead_in}")

    @property
    def calls(self) -> int:
        """Network calls in all: the lead-in and n steps."""
        return self.lead_in + self.steps

    def action(self, call: int) -> Action:
        """What network call ``call`` (0-based) does. Raises :class:`ScheduleError` outside 0..calls-1."""
        if not 0 <= call < self.calls:
            raise ScheduleError(f"call {call} is outside 0..{self.calls - 1}")
        i = call - self.lead_in
        if i < 0:
            return Action(phase=Phase.PLANNING, guided=True, cross=Use.COMPUTE, self_=Use.COMPUTE)
        if not self.reuse:
            guided = i < self.gate
            phase = Phase.PLANNING if guided else Phase.FIDELITY
            return Action(phase=phase, guided=guided, cross=Use.COMPUTE, self_=Use.COMPUTE)
        if i < self.gate - 1:
            return Action(phase=Phase.PLANNING, guided=True, cross=Use.COMPUTE, self_=self._planning_self(i))
        if i == self.gate - 1:
            return Action(phase=Phase.PLANNING, guided=True, cross=Use.STORE, self_=Use.STORE, gate=True)
        self_ = Use.STORE if i % self.fidelity_interval == 0 else Use.REUSE
        return Action(phase=Phase.FIDELITY, guided=False, cross=Use.REUSE, self_=self_)

    def actions(self) -> tuple[Action, ...]:
        """Every call's action, in order."""
        return tuple(self.action(call) for call in range(self.calls))

    def _planning_self(self, i: int) -> Use:
        if i < self.warm_up:
            return Use.COMPUTE
        if i == self.warm_up or i % self.self_interval == 0:
            return Use.STORE
        return Use.REUSE

    def ungated(self) -> Schedule:
        """The same number of steps with nothing reused and guidance throughout."""
        return Schedule(steps=self.steps, gate=self.steps, warm_up=0, lead_in=self.lead_in)

    def guidance_stopped(self) -> Schedule:
        """Attention untouched, guidance stopped at m: what remains of the saving without any reuse."""
        return Schedule(steps=self.steps, gate=self.gate, warm_up=0, lead_in=self.lead_in, reuse=False)
