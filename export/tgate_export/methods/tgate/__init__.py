"""TGATE (arXiv 2404.02747): cross-attention is reused after the gate, self-attention now and then before it."""

from __future__ import annotations

from tgate_engine.plan import Call
from tgate_export.methods.base import FULL, UNGUIDED, Halves, Method, Network, Settings, Variant
from tgate_export.methods.guidance_delta import GuidanceDelta
from tgate_export.methods.tgate.rule import Action, Use, actions

REUSE_SELF = "reuse_self"
REUSE_CROSS = "reuse_cross"
REUSE_BOTH = "reuse_both"


class Tgate(Method):
    """The paper's method. With ``guidance``, that method's way to go on after the gate: the prompt's half alone, guided
    by the kept difference, over the prompt's half of cross-attention instead of the mean of both."""

    takes = frozenset({"k", "w", "f"})

    def __init__(self, guidance: GuidanceDelta | None = None) -> None:
        self._guidance = guidance
        if guidance is not None:
            self.takes |= guidance.takes
        self.name = "tgate" if guidance is None else f"tgate+{guidance.name}"

    def check(self, *, guided: bool) -> None:
        if self._guidance is not None:
            self._guidance.check(guided=guided)

    def program(self, settings: Settings, lead_in: int = 0) -> tuple[Call, ...]:
        program = tuple(Call(action.phase, _graph(action)) for action in actions(settings, lead_in))
        return program if self._guidance is None else self._guidance.refreshed(settings, program, lead_in)

    def variants(self, network: Network, settings: Settings) -> tuple[Variant, ...]:
        from tgate_export.methods.guidance_delta.difference import KeepDifference, ReuseDifference
        from tgate_export.methods.tgate.cache import Cached, Kept, cache

        def attention(reuses: Cached = (), stores: Cached = ()) -> object:
            return cache(network.sites, reuses=reuses, stores=stores)

        kept: Kept = "mean" if self._guidance is None else "positive"
        one: Halves = network.after_gate if self._guidance is None else "positive"
        both: Halves = "both"
        if not network.guided:  # one half all along: there is no mean, and carries are as they were before the gate
            kept, one, both = "all", "positive", "positive"
        after: Cached = (("self", kept),) if settings.fidelity_interval > 1 else ()
        at_gate: Cached = (("cross", kept), *(after if kept != "all" else ()))
        keep = () if self._guidance is None else (KeepDifference(),)
        reuse = () if self._guidance is None else (ReuseDifference(),)
        graphs = [
            Variant(name=FULL, halves=both, parts=(attention(stores=(("self", "all"), *at_gate)), *keep)),
            Variant(name=REUSE_SELF, halves=both, parts=(attention(reuses=(("self", "all"),)),)),
            Variant(
                name=REUSE_CROSS,
                halves=one,
                parts=(attention(reuses=(("cross", kept),), stores=after), *reuse),
            ),
        ]
        if after:
            graphs.append(
                Variant(name=REUSE_BOTH, halves=one, parts=(attention(reuses=(*after, ("cross", kept))), *reuse))
            )
        if network.guided:
            graphs.append(Variant(name=UNGUIDED, halves="positive"))
        return tuple(graphs)

    def short(self, settings: Settings) -> Settings:
        reuses = settings.fidelity_interval > 1
        return Settings(
            steps=6 if reuses else 4, gate=3, self_interval=3, warm_up=0, fidelity_interval=2 if reuses else 1
        )


def _graph(action: Action) -> str:
    if action.cross is Use.REUSE:
        return REUSE_BOTH if action.self_ is Use.REUSE else REUSE_CROSS
    return REUSE_SELF if action.self_ is Use.REUSE else FULL
