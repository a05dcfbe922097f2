"""What each denoising step computes, stores and reuses: the paper's rule, as a function of numbers.

TGATE (arXiv 2404.02747, section 4) decides from the step index alone. Nothing here knows about
graphs, tensors or samplers.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from tgate_engine.errors import MethodError
from tgate_export.methods.base import FIDELITY, PLANNING, Settings


class Use(StrEnum):
    """What a step does with the outputs of one kind of attention."""

    COMPUTE = "compute"
    STORE = "compute-and-store"
    REUSE = "reuse"


@dataclass(frozen=True, kw_only=True)
class Action:
    """What one network call does.

    ``guided``: both halves of classifier-free guidance run (2B rows); otherwise one half (B rows).
    ``gate``: this is the gate step, whose stored outputs are the mean of both halves.
    """

    phase: str
    guided: bool
    cross: Use
    self_: Use
    gate: bool = False


def action(settings: Settings, call: int, lead_in: int = 0) -> Action:
    """What network call ``call`` (0-based) does. Raises :class:`MethodError` outside 0..lead_in+n-1."""
    calls = lead_in + settings.steps
    if not 0 <= call < calls:
        raise MethodError(f"call {call} is outside 0..{calls - 1}")
    i = call - lead_in
    if i < 0:
        return Action(phase=PLANNING, guided=True, cross=Use.COMPUTE, self_=Use.COMPUTE)
    if i < settings.gate - 1:
        return Action(phase=PLANNING, guided=True, cross=Use.COMPUTE, self_=_planning_self(settings, i))
    if i == settings.gate - 1:
        return Action(phase=PLANNING, guided=True, cross=Use.STORE, self_=Use.STORE, gate=True)
    self_ = Use.STORE if i % settings.fidelity_interval == 0 else Use.REUSE
    return Action(phase=FIDELITY, guided=False, cross=Use.REUSE, self_=self_)


def actions(settings: Settings, lead_in: int = 0) -> tuple[Action, ...]:
    """Every call's action, in order."""
    return tuple(action(settings, call, lead_in) for call in range(lead_in + settings.steps))


def _planning_self(settings: Settings, i: int) -> Use:
    if i < settings.warm_up:
        return Use.COMPUTE
    if i == settings.warm_up or i % settings.self_interval == 0:
        return Use.STORE
    return Use.REUSE
