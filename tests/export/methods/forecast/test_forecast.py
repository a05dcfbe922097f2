"""The method: which calls are left out, and its settings."""

from __future__ import annotations

import pytest

from tgate_engine.errors import MethodError
from tgate_export.methods import METHODS, find_method
from tgate_export.methods.base import FULL, UNGUIDED, Network, Settings


def test_every_rth_call_from_the_gate_on_is_made() -> None:
    assert Settings(steps=10, gate=4, forecast_interval=2).left_out() == (5, 7, 9)
    assert Settings(steps=10, gate=4, forecast_interval=3).left_out() == (5, 6, 8, 9)
    assert Settings(steps=10, gate=4, forecast_interval=3).left_out(lead_in=1) == (6, 7, 9, 10)
    assert Settings(steps=10, gate=4).left_out() == ()


@pytest.mark.parametrize("guided", [True, False])
def test_it_has_no_graph_of_its_own(guided: bool) -> None:
    method = find_method("forecast")
    graphs = [variant.name for variant in method.variants(Network(sites=(), guided=guided), Settings(steps=4, gate=2))]
    assert graphs == ([FULL, UNGUIDED] if guided else [FULL])
    assert {call.graph for call in method.program(Settings(steps=4, gate=2), lead_in=1)} == {FULL}


def test_it_forecasts_where_nothing_is_said_and_other_methods_do_not() -> None:
    for name in (name for name, method in METHODS.items() if "c" not in method.takes and method.gated):
        method = find_method(name)
        assert method.settings(steps=8, gate=4, defaults={}).forecast_interval == (2 if name == "forecast" else 1)
        told = method.settings(steps=8, gate=4, r=3, defaults={})
        assert told.forecast_interval == 3
        assert method.facts(told)["r"] == 3
        assert "r" not in method.facts(Settings(steps=8, gate=4))


@pytest.mark.parametrize("gate", [7, 8])
def test_a_forecast_that_leaves_nothing_out_is_refused(gate: int) -> None:
    with pytest.raises(MethodError, match=f"--forecast 2 would change nothing: from step m = {gate}"):
        find_method("tgate").settings(steps=8, gate=gate, r=2, defaults={})


@pytest.mark.parametrize(("r", "says"), [(0, "got r = 0"), (10**9, "at most 1000"), (True, "got True")])
def test_intervals_that_there_are_not(r: int, says: str) -> None:
    with pytest.raises(MethodError, match=says):
        Settings(steps=8, gate=4, forecast_interval=r)


def test_the_method_that_does_nothing_else_is_told_to_forecast() -> None:
    with pytest.raises(MethodError, match="--forecast 1 would change nothing: method forecast does nothing else"):
        find_method("forecast").settings(steps=8, gate=4, r=1, defaults={})
    assert find_method("tgate").settings(steps=8, gate=4, r=1, defaults={}).forecast_interval == 1


def test_a_refusal_names_no_option_that_was_not_given() -> None:
    with pytest.raises(MethodError, match="method forecast would change nothing: from step m = 8") as caught:
        find_method("forecast").settings(steps=8, gate=8, defaults={})
    assert "--forecast" not in str(caught.value)


@pytest.mark.parametrize("gate", [4, 5])
def test_self_attention_at_an_interval_of_its_own_is_refused(gate: int) -> None:
    """With m = 5 every step that computes it would be left out, with m = 4 every step that reuses it."""
    with pytest.raises(MethodError, match="--fidelity-interval 2 and --forecast 2 don't go together"):
        find_method("tgate").settings(steps=12, gate=gate, f=2, r=2, defaults={})
    assert find_method("tgate").settings(steps=12, gate=gate, f=2, r=1, defaults={}).fidelity_interval == 2
