"""ToMe for Stable Diffusion (arXiv 2303.17604): self-attention over the finest grid, of fewer tokens.

Before such a layer tokens that are alike are merged, after it each has what its own gave. Nothing is reused from step
to step: every network call does the same, and no plan but another export merges more. The authors draw the tokens
that others are merged into at random; here they are the same at every step, as the authors' package has it without
randomness, so that a seed's picture is one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tgate_engine.errors import MethodError
from tgate_engine.plan import Call
from tgate_export.methods.base import FULL, PLANNING, UNGUIDED, Halves, Method, Network, Settings, Variant, ungated
from tgate_export.methods.tgate import Tgate

MERGED = "merged"
"""What :data:`~tgate_export.methods.base.FULL` computes, with merged tokens."""


def merged(graph: str) -> str:
    """A graph of another method, by its name, with merged tokens."""
    return MERGED if graph == FULL else f"{MERGED}_{graph}"


class _Merging(Method):
    """What both methods have in common."""

    merges = 0.5

    def _part(self, network: Network, settings: Settings) -> Any:
        from tgate_export.methods.tome.merge import MergeTokens

        if not network.finest:
            raise MethodError(
                f"method {self.name} merges tokens before the self-attention of a U-Net's finest level; this network "
                "has none that is known. Take another --method"
            )
        return MergeTokens(network.finest, settings.merge_ratio)


class Tome(_Merging):
    """The method alone: it has no gate, and guides throughout."""

    name = "tome"
    gated = False

    def settings(self, *, steps: int, gate: int | None, defaults: Mapping[str, int], **named: Any) -> Settings:
        if (r := named.get("r") or 1) > 1:
            raise MethodError(
                f"--forecast {r} would change nothing: method {self.name} has no gate from which on to forecast; take "
                "--method tgate+tome, or leave it out"
            )
        return super().settings(steps=steps, gate=gate, defaults=defaults, **named)

    def program(self, settings: Settings, lead_in: int = 0) -> tuple[Call, ...]:
        return (Call(PLANNING, MERGED),) * (lead_in + settings.steps)

    def baselines(self, settings: Settings, lead_in: int = 0, *, guided: bool) -> dict[str, tuple[Call, ...]]:
        return {"ungated": ungated(settings.steps, lead_in)}

    def variants(self, network: Network, settings: Settings) -> tuple[Variant, ...]:
        halves = _halves(network)
        return (
            Variant(name=FULL, halves=halves),
            Variant(name=MERGED, halves=halves, parts=(self._part(network, settings),)),
        )

    def short(self, settings: Settings) -> Settings:
        return Settings(steps=3, gate=3, warm_up=0)


class TgateTome(_Merging):
    """With the paper's gate: each of its graphs, with merged tokens where it computes self-attention.

    The paper's appendix G compares the two, and both at once. Baselines merge nothing.
    """

    takes = Tgate.takes

    def __init__(self, gate: Tgate) -> None:
        self._gate = gate
        self.name = f"{gate.name}+{Tome.name}"

    def program(self, settings: Settings, lead_in: int = 0) -> tuple[Call, ...]:
        return tuple(Call(call.phase, merged(call.graph)) for call in self._gate.program(settings, lead_in))

    def variants(self, network: Network, settings: Settings) -> tuple[Variant, ...]:
        gated = self._gate.variants(network, settings)
        # Merged first: what a graph stores of a layer is what the layer gives once each token has its own again, and a
        # layer that a graph reuses is replaced with all that belongs to it.
        return (
            Variant(name=FULL, halves=_halves(network)),
            *(
                replace(each, name=merged(each.name), parts=(self._part(network, settings), *each.parts))
                for each in gated
                if each.name != UNGUIDED
            ),
            *(each for each in gated if each.name == UNGUIDED),
        )

    def short(self, settings: Settings) -> Settings:
        return self._gate.short(settings)


def _halves(network: Network) -> Halves:
    return "both" if network.guided else "positive"
