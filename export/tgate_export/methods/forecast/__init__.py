"""Forecast: from step m on, whole network calls are left out, and their outputs extrapolated.

No graph of its own: the calls that are left run what they would, and the sampler's coefficients take the rest
(:mod:`tgate_export.methods.forecast.fold`). Every method may be told to (``--forecast R``: every R-th call is made);
this one does nothing else, which is all that there is for a network whose attention is joint.
"""

from __future__ import annotations

from tgate_engine.plan import Call
from tgate_export.methods.base import FULL, UNGUIDED, Method, Network, Settings, Variant, ungated


class Forecast(Method):
    """The method; see the module."""

    name = "forecast"
    forecasts = 2

    def program(self, settings: Settings, lead_in: int = 0) -> tuple[Call, ...]:
        return ungated(settings.steps, lead_in)

    def variants(self, network: Network, settings: Settings) -> tuple[Variant, ...]:
        if not network.guided:
            return (Variant(name=FULL, halves="positive"),)
        return (Variant(name=FULL, halves="both"), Variant(name=UNGUIDED, halves="positive"))

    def short(self, settings: Settings) -> Settings:
        return Settings(steps=4, gate=2, warm_up=0)
