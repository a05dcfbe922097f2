"""DeepCache (arXiv 2312.00858): most network calls compute the first and the last layer of a U-Net alone.

What the layers between them give changes slowly from step to step. Every c-th call is a full one and keeps it; the
others are shallow: a first convolution, the last layer, which takes the kept tensor, and the output; or with a deeper
branch (``--cache-branch``) some layers more on both sides. Intervals are uniform, as the authors' package has them by
default.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tgate_engine.errors import MethodError
from tgate_engine.plan import Call
from tgate_export.methods.base import FULL, PLANNING, UNGUIDED, Halves, Method, Network, Settings, Variant, ungated
from tgate_export.methods.tgate import REUSE_CROSS, Tgate

SHALLOW = "shallow"
"""The last layers alone, for the halves that :data:`~tgate_export.methods.base.FULL` computes."""
SHALLOW_CROSS = "shallow_reuse_cross"
"""The same after the gate, for one half, its cross-attention reused."""


class _Cached(Method):
    """What both methods have in common."""

    takes = frozenset({"c"})
    caches = 3

    def settings(self, *, steps: int, gate: int | None, defaults: Mapping[str, int], **named: Any) -> Settings:
        if (r := named.get("r") or 1) > 1:
            raise MethodError(
                f"--forecast {r} and method {self.name} don't go together: full calls would "
                "be among those that are left out; give another --method, or leave it out"
            )
        settings = super().settings(steps=steps, gate=gate, defaults=defaults, **named)
        at = f"n = {steps}" + (f", m = {settings.gate}" if self.gated else "")
        if self.program(settings) == self.program(replace(settings, cache_interval=1)):
            raise MethodError(
                f"method {self.name} with c = {settings.cache_interval} caches nothing at {at}: every network call is "
                "full; take a --cache-interval of 2 or more, and enough --steps"
            )
        c = settings.cache_interval
        if (
            named.get("c") is not None
            and c > 2
            and self.program(settings) == self.program(replace(settings, cache_interval=c - 1))
        ):
            raise MethodError(
                f"--cache-interval {c} of method {self.name} makes the same calls as {c - 1} at {at}; take a smaller "
                "one"
            )
        return settings

    def _deep(self, network: Network) -> str:
        if network.deep is None:
            raise MethodError(
                f"method {self.name} keeps what a U-Net's last layers take of those below, beside skip connections; "
                "this network has none that are known. Take another --method"
            )
        return network.deep


class DeepCache(_Cached):
    """The method alone: it has no gate, and guides throughout."""

    name = "deepcache"
    gated = False

    def program(self, settings: Settings, lead_in: int = 0) -> tuple[Call, ...]:
        # PNDM's lead-in computes everything, as everywhere, and step 0 after it does so too: the interval counts steps.
        graphs = (SHALLOW if i % settings.cache_interval else FULL for i in range(settings.steps))
        return (*(Call(PLANNING, FULL),) * lead_in, *(Call(PLANNING, graph) for graph in graphs))

    def baselines(self, settings: Settings, lead_in: int = 0, *, guided: bool) -> dict[str, tuple[Call, ...]]:
        return {"ungated": ungated(settings.steps, lead_in)}

    def variants(self, network: Network, settings: Settings) -> tuple[Variant, ...]:
        from tgate_export.methods.deepcache.feature import KeepFeature, TakeFeature

        module, halves = self._deep(network), _halves(network)
        return (
            Variant(name=FULL, halves=halves, parts=(KeepFeature(module, network.rows),)),
            Variant(name=SHALLOW, halves=halves, parts=(TakeFeature(module, network.rows),)),
        )

    def short(self, settings: Settings) -> Settings:
        return Settings(steps=4, gate=4, warm_up=0, cache_interval=2)


class TgateDeepCache(_Cached):
    """With the paper's gate: from step m on guidance is off and cross-attention reused, in full and in shallow calls.

    Self-attention is never reused. The gate step is a full call, and the interval begins anew at m: what the layers
    gave for both halves of guidance is of no use for one.
    """

    def __init__(self, gate: Tgate) -> None:
        self._gate = gate
        self.name = f"{gate.name}+{DeepCache.name}"

    def program(self, settings: Settings, lead_in: int = 0) -> tuple[Call, ...]:
        shallow = {FULL: SHALLOW, REUSE_CROSS: SHALLOW_CROSS}
        plain = replace(settings, self_interval=1, fidelity_interval=1)
        calls = []
        for i, call in enumerate(self._gate.program(plain, lead_in), -lead_in):
            since = i if i < settings.gate else i - settings.gate
            full = i < 0 or i == settings.gate - 1 or since % settings.cache_interval == 0
            calls.append(call if full else Call(call.phase, shallow[call.graph]))
        return tuple(calls)

    def variants(self, network: Network, settings: Settings) -> tuple[Variant, ...]:
        from tgate_export.methods.deepcache.feature import KeepFeature, TakeFeature
        from tgate_export.methods.tgate.cache import Cached, cache

        module, rows, both = self._deep(network), network.rows, _halves(network)
        one: Halves = network.after_gate if network.guided else both
        cross: Cached = (("cross", "mean" if network.guided else "all"),)
        store, reuse = cache(network.sites, stores=cross), cache(network.sites, reuses=cross)
        half = one if network.guided else ""  # a carry of one half of two is another than that of both
        graphs = [
            Variant(name=FULL, halves=both, parts=(store, KeepFeature(module, rows))),
            Variant(name=SHALLOW, halves=both, parts=(TakeFeature(module, rows),)),
            Variant(name=REUSE_CROSS, halves=one, parts=(reuse, KeepFeature(module, rows, half))),
            Variant(name=SHALLOW_CROSS, halves=one, parts=(reuse, TakeFeature(module, rows, half))),
        ]
        if network.guided:
            graphs.append(Variant(name=UNGUIDED, halves="positive"))
        return tuple(graphs)

    def short(self, settings: Settings) -> Settings:
        return Settings(steps=5, gate=3, warm_up=0, cache_interval=2)


def _halves(network: Network) -> Halves:
    return "both" if network.guided else "positive"
