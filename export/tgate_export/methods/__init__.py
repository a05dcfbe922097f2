"""The methods: one folder each, the only place that knows a method's rule. Absent at run time."""

from __future__ import annotations

from collections.abc import Mapping

from tgate_engine.errors import MethodError
from tgate_export.methods.base import Method
from tgate_export.methods.deepcache import DeepCache, TgateDeepCache
from tgate_export.methods.forecast import Forecast
from tgate_export.methods.guidance_delta import GuidanceDelta
from tgate_export.methods.tgate import Tgate
from tgate_export.methods.tome import TgateTome, Tome

METHODS: Mapping[str, Method] = {
    method.name: method
    for method in (
        Tgate(),
        GuidanceDelta(),
        Tgate(guidance=GuidanceDelta()),
        DeepCache(),
        TgateDeepCache(Tgate()),
        Forecast(),
        Tome(),
        TgateTome(Tgate()),
    )
}
"""The methods there are, by the name that ``--method`` takes."""


def find_method(name: str) -> Method:
    """The method of that name. Raises :class:`MethodError` listing the names there are."""
    if name not in METHODS:
        raise MethodError(f"unknown method {name!r}; choose one of {', '.join(METHODS)}")
    return METHODS[name]
