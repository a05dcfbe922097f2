"""The plans that a bundle's graphs can run, to choose from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.toy_bundle import Toy, build
from tgate_engine.bundle import Bundle
from tgate_engine.errors import PlanError
from tgate_export.candidates import candidates
from tgate_export.methods.base import Settings
from tgate_export.plans import add_plan


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Read only."""
    return Bundle.open(build(tmp_path_factory.mktemp("candidates") / "toy", goldens=False))


def test_every_candidate_is_a_program_of_its_own_that_runs(bundle: Bundle) -> None:
    found = candidates(bundle)
    plans = [found.ungated, *found.plans.values()]
    assert not [b.name for i, a in enumerate(plans) for b in plans[i + 1 :] if a.same_program(b)]
    assert {len(plan.steps) + len(Settings(steps=8, gate=m, forecast_interval=r).left_out()) for plan in plans
            for m, r in [(int(plan.settings.get("m") or 8), int(plan.settings.get("r") or 1))]} == {8}  # fmt: skip
    bundle.with_plans(found.plans)  # each is proved
    assert found.ungated.same_program(bundle.manifest.plan("ungated"))
    gates = {plan.settings["m"] for plan in found.plans.values()}
    assert gates == set(range(1, 9))
    assert "m=8" not in found.plans  # which is the ungated one
    assert not [label for label in found.plans if "f=" in label and "r=" in label]  # `tgate plan` refuses them
    assert set(found.start) <= found.plans.keys()


def test_those_of_the_bundle_are_among_them(bundle: Bundle) -> None:
    found = candidates(bundle)
    for name in ("default", "guidance_stopped"):
        stored = bundle.manifest.plan(name)
        assert [label for label, plan in found.plans.items() if plan.same_program(stored)], name


@pytest.mark.parametrize("label", ["m=6 k=3 w=2", "m=3 f=2", "m=4 k=2 w=0 f=3", "m=5 r=2", "m=6 k=3 w=2 r=2"])
def test_a_candidate_is_what_tgate_plan_makes_of_its_settings(tmp_path: Path, label: str) -> None:
    bundle = Bundle.open(build(tmp_path / "toy", goldens=False))
    plan = candidates(bundle).plans[label]
    m, k, w, f, r = (int(plan.settings.get(name) or (name == "r")) for name in "mkwfr")
    made = add_plan(
        bundle.path, name="other", m=m, k=k, warm_up=w, fidelity_interval=f, forecast_interval=r, save=False
    )
    assert made["other"].same_program(plan)
    assert candidates(bundle).named(bundle, label, "other") == made


def test_neighbours_are_one_place_away(bundle: Bundle) -> None:
    found = candidates(bundle)
    near = found.near("m=6 k=3 w=2")
    assert {"m=7 k=3 w=2", "m=6 k=2 w=2", "m=5 k=2 w=0", "m=6 k=3 w=2 f=2"} <= set(near)
    assert not {"m=6 k=3 w=2", "m=8 k=3 w=2", "m=6 k=3 w=2 f=3", "m=6"} & set(near)
    assert "m=6 k=3 w=2 r=2" in near
    assert "m=6 k=3 w=2 r=3" not in near
    assert "m=6 k=3 w=2 r=2" not in found.start
    assert "m=5 guidance stopped" in found.near("m=5")
    assert "m=5" in found.near("m=5 guidance stopped")
    assert [found.kind(label) for label in ("m=6 k=3 w=2 r=2", "m=5 guidance stopped", "m=5 r=2 alone")] == [0, 1, 2]


def test_a_plan_that_stops_guidance_has_the_ungated_one_to_be_measured_against(tmp_path: Path) -> None:
    bundle = Bundle.open(build(tmp_path / "toy", goldens=False))
    found = candidates(bundle, steps=6)
    plans = found.named(bundle, "m=3 guidance stopped", "mine")
    assert list(plans) == ["mine", "mine.ungated"]
    assert plans["mine"].baselines == ("mine.ungated",)
    assert bundle.save_plans(plans).manifest.plan("mine").same_program(found.plans["m=3 guidance stopped"])
    assert not [label for label in candidates(bundle, others=False).plans if "stopped" in label or "alone" in label]


def test_forecasts_alone_need_no_method_of_the_bundle(tmp_path: Path) -> None:
    """They keep guidance, are among the first to be looked at, and stand beside those that stop it."""
    bundle = Bundle.open(build(tmp_path / "toy", goldens=False))
    found = candidates(bundle)
    plan = found.plans["m=2 r=3 alone"]
    assert dict(plan.settings) == {"method": "forecast", "n": 8, "m": 2, "r": 3}
    assert [step.graph for step in plan.steps] == ["full"] * 4  # 0, 1, 2 and 5
    assert "m=2 r=2 alone" in found.start
    assert {"m=2 r=2 alone", "m=2 r=4 alone", "m=3 r=3 alone"} <= set(found.near("m=2 r=3 alone"))
    plans = found.named(bundle, "m=2 r=3 alone", "mine")
    assert bundle.save_plans(plans).manifest.plan("mine").same_program(plan)
    assert plans["mine"].baselines[0] in ("ungated", "mine.ungated")


def test_only_what_the_graphs_can_do(tmp_path: Path) -> None:
    """Without guidance there is none to stop; with one step there is nothing to reuse."""
    bundle = Bundle.open(build(tmp_path / "toy", Toy(guided=False), goldens=False))
    assert not [label for label in candidates(bundle).plans if "stopped" in label]
    with pytest.raises(PlanError, match="no plan of 1 steps reuses anything"):
        candidates(bundle, steps=1)


def test_the_own_settings_of_a_bundle_are_tried(tmp_path: Path) -> None:
    settings = {"default": Settings(steps=12, gate=9, self_interval=4, warm_up=1)}
    bundle = Bundle.open(build(tmp_path / "toy", Toy(settings=settings), goldens=False))
    assert "m=9 k=4 w=1" in candidates(bundle).plans


def test_methods_with_shallow_calls_have_their_own(tiny_bundle: Callable[..., Path]) -> None:
    """Intervals, with a gate or without, and nothing that `tgate plan` refuses."""
    gated = Bundle.open(tiny_bundle("conv_projection", method="tgate+deepcache", batch=(2, 2)))
    found = candidates(gated, steps=8)
    assert {"m=4 c=2", "m=4 c=3", "m=8 c=5", "m=4 guidance stopped"} <= found.plans.keys()
    assert not {"m=4", "m=4 c=2 r=2"} & found.plans.keys()
    assert {"m=5 c=2", "m=4 c=3"} <= set(found.near("m=4 c=2"))
    made = add_plan(gated.path, name="other", m=4, cache_interval=2, steps=8, save=False)
    assert made["other"].same_program(found.plans["m=4 c=2"])
    alone = Bundle.open(tiny_bundle("conv_projection", method="deepcache", batch=(2, 2)))
    assert list(candidates(alone, steps=8, others=False).plans) == ["c=2", "c=3", "c=5", "c=8"]
    assert list(candidates(alone, steps=2, others=False).plans) == ["c=2"]
