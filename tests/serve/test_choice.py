"""Which plan a request means."""

from __future__ import annotations

import pytest

from tests.toy_bundle import build
from tgate_engine.bundle import Bundle
from tgate_engine.errors import RequestError
from tgate_engine.plan import Plan
from tgate_export.plans import add_plan
from tgate_serve.choice import Choice, steps_of


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> list[Plan]:
    """One of 8 steps that makes 6 calls, and one that makes as many for 6."""
    bundle = build(tmp_path_factory.mktemp("choice") / "bundle")
    add_plan(bundle, name="forecast", m=4, steps=8, forecast_interval=2)
    add_plan(bundle, name="short", m=3, steps=6)
    manifest = Bundle.open(bundle).manifest
    return [manifest.plan(name) for name in ("forecast", "short")]


def test_steps_are_those_that_a_plan_was_made_for(plans: list[Plan]) -> None:
    assert [len(plan.steps) for plan in plans] == [6, 6]
    assert [steps_of(plan) for plan in plans] == [8, 6]
    assert [Choice(steps=steps).of(plans).name for steps in (8, 6)] == ["forecast", "short"]
    with pytest.raises(RequestError, match=r"no plan of steps=7 is served; there is forecast \(steps=8, m=4"):
        Choice(steps=7).of(plans)
