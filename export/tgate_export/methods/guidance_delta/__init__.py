"""Guidance with its last difference: from step m on only the prompt's half is computed.

Classifier-free guidance is ``e = e_negative + s (e_positive - e_negative)``. The difference in parentheses changes
slowly late in a trajectory. The last one, of step m - 1, is kept as one carry of the latents' size, and every later
step's output is ``e_positive + (s - 1) difference``: as many network calls as stopping guidance, without its drop of
the guidance. Known from FastVideo and SGLang. A difference ages; ``--refresh G`` computes both halves, and the
difference anew, at every G-th step after the gate, which brings pictures far nearer to ungated ones than the same
calls do before the gate (docs/paper.md).
"""

from __future__ import annotations

from collections.abc import Iterable

from tgate_engine.errors import MethodError
from tgate_engine.plan import Call
from tgate_export.methods.base import FIDELITY, FULL, UNGUIDED, Method, Network, Settings, Variant, guidance_stopped

REUSE_DELTA = "reuse_delta"


class GuidanceDelta(Method):
    """The method; see the module."""

    name = "guidance_delta"
    takes = frozenset({"g"})

    def check(self, *, guided: bool) -> None:
        if not guided:
            raise MethodError(
                f"method {self.name} keeps the difference of both halves of classifier-free guidance, and the model is "
                "exported without them; take --method tgate, or a --guidance-scale above 1"
            )

    def program(self, settings: Settings, lead_in: int = 0) -> tuple[Call, ...]:
        stopped = guidance_stopped(settings, lead_in)
        kept = (Call(FIDELITY, REUSE_DELTA) if call.graph == UNGUIDED else call for call in stopped)
        return self.refreshed(settings, kept, lead_in)

    @staticmethod
    def refreshed(settings: Settings, program: Iterable[Call], lead_in: int) -> tuple[Call, ...]:
        """The program, with the steps full at which both halves are computed again."""
        steps = enumerate(program, -lead_in)
        return tuple(Call(FIDELITY, FULL) if settings.refreshes(i) else call for i, call in steps)

    def variants(self, network: Network, settings: Settings) -> tuple[Variant, ...]:
        from tgate_export.methods.guidance_delta.difference import KeepDifference, ReuseDifference

        return (
            Variant(name=FULL, halves="both", parts=(KeepDifference(),)),
            Variant(name=REUSE_DELTA, halves="positive", parts=(ReuseDifference(),)),
            Variant(name=UNGUIDED, halves="positive"),
        )

    def short(self, settings: Settings) -> Settings:
        return Settings(steps=4, gate=2, warm_up=0)
