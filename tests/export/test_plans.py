"""Plans over a bundle's graphs: baselines, what is taken from where, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tests import toy_bundle
from tests.toy_bundle import TABLE_STEPS, Toy, build
from tgate_engine.bundle import Bundle
from tgate_engine.errors import BundleError, ExportError, MethodError, PlanError
from tgate_engine.step import step_row
from tgate_export.methods.base import Settings
from tgate_export.plans import add_plan, check_guidance, sampler_of

STEPS = next(steps for steps in reversed(TABLE_STEPS) if steps != 8)
"""A number of steps that the toy has a table of, and no plan."""


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return build(tmp_path / "toy", Toy(settings={"default": Settings(steps=8, gate=5, self_interval=2)}))


def test_a_plan_of_the_same_steps_shares_its_baselines(bundle: Path) -> None:
    before = Bundle.open(bundle).manifest.plans
    plans = add_plan(bundle, name="fast", m=3)
    assert list(plans) == ["fast", "fast.guidance_stopped"], "it stops guidance elsewhere, and ungated is there"
    assert plans["fast"].baselines == ("ungated", "fast.guidance_stopped")
    after = Bundle.open(bundle).manifest.plans
    assert set(after) == {*before, *plans}
    graphs = [step.graph for step in after["fast"].steps]
    assert graphs == ["full"] * 3 + ["reuse_cross"] * 5
    stopped = [step.graph for step in after["fast.guidance_stopped"].steps]
    assert stopped == ["full"] * 3 + ["unguided"] * 5


def test_a_gate_that_never_closes_has_one_baseline_and_is_told(bundle: Path, caplog: pytest.LogCaptureFixture) -> None:
    """At m = n there is no step left to stop guidance at: both baselines are one plan, which is named once."""
    plans = add_plan(bundle, name="late", m=8, k=5)
    assert "plan late: m = n = 8, so that no step comes after the gate; take a smaller m" in caplog.messages
    assert list(plans) == ["late"]
    assert plans["late"].baselines == ("ungated",)
    assert Bundle.open(bundle).manifest.plan("late") == plans["late"]  # and the bundle can be read again
    caplog.clear()
    add_plan(bundle, name="less", m=7, k=5)
    assert caplog.messages == []


def test_an_interval_that_reuses_nothing_is_told_with_what_would(
    bundle: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add_plan(bundle, name="soon", m=3, k=3, save=False)
    add_plan(bundle, name="late", m=8, fidelity_interval=3, save=False)
    before, after, _ = caplog.messages  # the last one says that m = n
    assert before == "plan soon: k = 3 reuses nothing at n = 8, m = 3, w = 2; take a larger m, or a smaller k or w"
    assert after == "plan late: f = 3 reuses nothing at n = 8, m = 8, w = 2; take a smaller m or f"


def test_other_steps_come_from_the_table_with_baselines_of_their_own(bundle: Path) -> None:
    plans = add_plan(bundle, name="other", m=2, steps=STEPS, save=False)
    assert list(plans) == ["other", "other.ungated", "other.guidance_stopped"]
    assert "other" not in Bundle.open(bundle).manifest.plans, "save=False leaves the bundle as it is"
    compiled = toy_bundle.sampler(STEPS)
    for step, call in zip(plans["other"].steps, compiled.calls, strict=True):
        assert np.array_equal(step_row(step.call, 3.0), step_row(call, 3.0))


def test_what_is_left_out_is_the_default_plans(bundle: Path) -> None:
    default = Bundle.open(bundle).manifest.plan("default")
    plan = add_plan(bundle, name="same", m=5, k=2, save=False)["same"]
    assert plan.settings == default.settings
    assert plan.same_program(default)
    assert add_plan(bundle, name="plain", m=5, save=False)["plain"].settings["k"] == 1


def test_a_name_is_taken_once(bundle: Path) -> None:
    add_plan(bundle, name="fast", m=3)
    with pytest.raises(BundleError, match="already has a plan 'fast'"):
        add_plan(bundle, name="fast", m=4)
    add_plan(bundle, name="fast", m=4, force=True)
    manifest = Bundle.open(bundle).manifest
    assert manifest.plan("fast").settings["m"] == 4
    assert manifest.plan("fast.guidance_stopped").settings["m"] == 4, "its baselines follow"


def test_a_baseline_stays_what_others_are_measured_against(bundle: Path) -> None:
    with pytest.raises(PlanError, match="plan 'ungated' is what default is measured against"):
        add_plan(bundle, name="ungated", m=3, force=True)
    add_plan(bundle, name="fast", m=3)
    add_plan(bundle, name="default", m=4, steps=STEPS, force=True)
    manifest = Bundle.open(bundle).manifest
    assert manifest.plan("default").baselines == ("default.ungated", "default.guidance_stopped")
    assert len(manifest.plan("ungated").steps) == 8, "which fast is measured against"


def test_what_cannot_be_changes_nothing(bundle: Path) -> None:
    before = (bundle / "manifest.json").read_bytes()
    with pytest.raises(MethodError, match="between 1 and the number of steps n = 8"):
        add_plan(bundle, name="late", m=9)
    with pytest.raises(ExportError, match="does not fit a bundle exported with guidance"):
        add_plan(bundle, name="free", m=3, guidance_scale=1.0)
    assert (bundle / "manifest.json").read_bytes() == before


def test_a_bundle_of_another_method_is_named(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    default = opened.manifest.plan("default")
    odd = replace(default, settings={**default.settings, "method": "toca"})
    opened.save_plans({"default": odd}, force=True)
    with pytest.raises(PlanError, match=r"of method 'toca'.* tgate, guidance_delta"):
        add_plan(bundle, name="fast", m=3)


def test_a_sampler_beyond_the_table_needs_the_extra(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Bundle.open(bundle)
    assert sampler_of(opened, "toy", 8) is opened.manifest.plan("default").sampler
    assert sampler_of(opened, "toy", STEPS).steps == STEPS
    monkeypatch.setattr("builtins.__import__", _without("torch", __import__))
    with pytest.raises(ExportError, match=r"no table of sampler 'toy' for 977 steps .*tgate-engine\[export\]"):
        sampler_of(opened, "toy", 977)


def _without(library: str, real: object) -> object:
    def importing(name: str, *args: object, **options: object) -> object:
        if name == "tgate_export.sampling":
            raise ModuleNotFoundError(f"No module named {library!r}", name=library)
        return real(name, *args, **options)  # type: ignore[operator]

    return importing


@pytest.mark.parametrize("scale", [-1.0, float("nan"), float("inf")])
def test_guidance_that_means_nothing(scale: float) -> None:
    with pytest.raises(ExportError, match="must be a finite number"):
        check_guidance(scale)
