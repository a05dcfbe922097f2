"""Settings, what a method takes of them, and the plain programs that it is measured against."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tgate_engine.errors import MethodError
from tgate_export.methods import METHODS, find_method
from tgate_export.methods.base import Settings, guidance_stopped, settings_of, ungated

DEFAULTS = {"k": 5, "w": 2}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"steps": 0, "gate": 1}, "steps (n) must be from 1 to 1000, got 0"),
        ({"steps": 25, "gate": 30}, "between 1 and the number of steps n = 25, got m = 30"),
        ({"steps": 25, "gate": 0}, "got m = 0"),
        ({"steps": 25, "gate": 5, "self_interval": 0}, "got k = 0"),
        ({"steps": 25, "gate": 5, "warm_up": -1}, "got -1"),
        ({"steps": 25, "gate": 5, "fidelity_interval": 0}, "got f = 0"),
        ({"steps": 25, "gate": 5, "cache_interval": 0}, "got c = 0"),
        ({"steps": 25, "gate": 5, "refresh_interval": 1}, "got g = 1"),
        ({"steps": 25, "gate": 5, "refresh_interval": -1}, "got g = -1"),
        ({"steps": 25, "gate": True}, "gate must be a whole number, got True"),
        ({"steps": 25.0, "gate": 5}, "steps must be a whole number, got 25.0"),
    ],
)
def test_settings_that_no_method_has(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(MethodError) as error:
        Settings(**settings)
    assert says in str(error.value)


@pytest.mark.parametrize("name", METHODS)
def test_a_user_who_names_nothing_gets_the_models_defaults_where_they_mean_something(name: str) -> None:
    method = find_method(name)
    settings = method.settings(steps=25, gate=10 if method.gated else None, defaults=DEFAULTS)
    idle = Settings(steps=25, gate=10, self_interval=1, warm_up=0, fidelity_interval=1)
    taken = Settings(steps=25, gate=10, self_interval=5, warm_up=2, fidelity_interval=1)
    own = {
        "guidance_delta": idle,
        "deepcache": replace(idle, gate=25, cache_interval=3),
        "tgate+deepcache": replace(idle, cache_interval=3),
        "forecast": replace(idle, forecast_interval=2),
        "tome": replace(idle, gate=25, merge_ratio=0.5),
        "tgate+tome": replace(taken, merge_ratio=0.5),
    }
    assert settings == own.get(name, taken)


@pytest.mark.parametrize("name", ["tgate", "tgate+guidance_delta"])
def test_what_a_user_names_comes_before_the_defaults(name: str) -> None:
    settings = find_method(name).settings(steps=8, gate=4, k=3, w=0, f=2, defaults=DEFAULTS)
    assert settings == Settings(steps=8, gate=4, self_interval=3, warm_up=0, fidelity_interval=2)


@pytest.mark.parametrize(
    ("named", "option"), [({"k": 2}, "--k 2"), ({"w": 1}, "--warm-up 1"), ({"f": 3}, "--fidelity-interval 3")]
)
def test_a_setting_that_would_change_nothing_is_refused(named: dict[str, int], option: str) -> None:
    with pytest.raises(MethodError, match=f"{option} would change nothing: method guidance_delta"):
        find_method("guidance_delta").settings(steps=25, gate=10, defaults=DEFAULTS, **named)


def test_what_keeps_no_difference_refreshes_none() -> None:
    with pytest.raises(MethodError, match="--refresh 4 would change nothing: method tgate keeps no difference"):
        find_method("tgate").settings(steps=25, gate=10, g=4, defaults=DEFAULTS)


def test_a_gate_is_named_where_there_is_one() -> None:
    with pytest.raises(MethodError, match="method tgate wants the step at which its gate closes; give --m"):
        find_method("tgate").settings(steps=25, gate=None, defaults=DEFAULTS)
    with pytest.raises(MethodError, match="--m 25 would change nothing: method deepcache has no gate"):
        find_method("deepcache").settings(steps=25, gate=25, defaults=DEFAULTS)


def test_a_setting_that_says_what_is_so_anyway_is_not_refused() -> None:
    settings = find_method("guidance_delta").settings(steps=25, gate=10, k=1, w=0, f=1, defaults=DEFAULTS)
    assert (settings.self_interval, settings.warm_up, settings.fidelity_interval) == (1, 0, 1)


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("tgate", {"method": "tgate", "n": 25, "m": 10, "k": 5, "w": 2, "f": 1}),
        ("guidance_delta", {"method": "guidance_delta", "n": 25, "m": 10}),
        ("tgate+guidance_delta", {"method": "tgate+guidance_delta", "n": 25, "m": 10, "k": 5, "w": 2, "f": 1}),
        ("deepcache", {"method": "deepcache", "n": 25, "c": 3}),
        ("tgate+deepcache", {"method": "tgate+deepcache", "n": 25, "m": 10, "c": 3}),
        ("tome", {"method": "tome", "n": 25, "ratio": 0.5}),
        ("tgate+tome", {"method": "tgate+tome", "n": 25, "m": 10, "k": 5, "w": 2, "f": 1, "ratio": 0.5}),
    ],
)
def test_facts_of_a_plan_name_what_the_method_takes(name: str, facts: dict[str, Any]) -> None:
    method = find_method(name)
    assert method.facts(method.settings(steps=25, gate=10 if method.gated else None, defaults=DEFAULTS)) == facts


@st.composite
def counts(draw: st.DrawFn) -> tuple[int, int, int]:
    """n, m and a sampler's calls before the first step."""
    steps = draw(st.integers(1, 60))
    return steps, draw(st.integers(1, steps)), draw(st.integers(0, 2))


@given(counts())
def test_the_plain_programs(numbers: tuple[int, int, int]) -> None:
    steps, gate, lead_in = numbers
    assert [call.graph for call in ungated(steps, lead_in)] == ["full"] * (lead_in + steps)
    stopped = guidance_stopped(Settings(steps=steps, gate=gate), lead_in)
    assert [call.graph for call in stopped] == ["full"] * (lead_in + gate) + ["unguided"] * (steps - gate)


@pytest.mark.parametrize("name", METHODS)
@given(numbers=counts())
def test_every_method_is_measured_against_them_the_plainest_first(name: str, numbers: tuple[int, int, int]) -> None:
    steps, gate, lead_in = numbers
    settings = Settings(steps=steps, gate=gate)
    guided = find_method(name).baselines(settings, lead_in, guided=True)
    stopped = [("guidance_stopped", guidance_stopped(settings, lead_in))] if find_method(name).gated else []
    assert list(guided.items()) == [("ungated", ungated(steps, lead_in)), *stopped]
    assert list(find_method(name).baselines(settings, lead_in, guided=False)) == ["ungated"]


@pytest.mark.parametrize(
    ("name", "settings", "says"),
    [
        ("tgate", Settings(steps=25, gate=5, self_interval=3, warm_up=2), "k = 3 reuses nothing"),
        ("tgate", Settings(steps=25, gate=6, self_interval=3, warm_up=2), ""),  # step 4
        ("tgate", Settings(steps=25, gate=5, self_interval=1, warm_up=2), ""),
        ("tgate", Settings(steps=8, gate=8, self_interval=9, warm_up=2, fidelity_interval=3), "f = 3 reuses nothing"),
        ("tgate", Settings(steps=8, gate=3, self_interval=3, fidelity_interval=3), "k = 3 reuses nothing at"),
        ("guidance_delta", Settings(steps=8, gate=3), ""),
    ],
)
def test_settings_that_ask_for_reuse_and_bring_none_are_told(name: str, settings: Settings, says: str) -> None:
    told = find_method(name).idle(settings)
    assert told.startswith(says)
    assert bool(told) == bool(says)


@pytest.mark.parametrize("name", METHODS)
def test_facts_say_what_the_settings_were(name: str) -> None:
    method = find_method(name)
    numbers = {"k": 3, "w": 1, "c": 2, "g": 4}
    named: dict[str, Any] = {letter: value for letter, value in numbers.items() if letter in method.takes}
    named |= {} if method.takes & {"c", "g"} or name == "tome" else {"r": 2}
    named |= {"ratio": 0.3} if method.merges else {}
    settings = method.settings(steps=12, gate=6 if method.gated else None, defaults={}, **named)
    assert settings_of(method.facts(settings)) == settings
