"""Programs of two networks: who runs when, what begins anew, and that nobody reads what the other one kept."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests import toy_bundle
from tests.toy_bundle import Toy, build, edit_manifest
from tgate_engine.bundle import Bundle
from tgate_engine.errors import ExportError, MethodError, PlanError
from tgate_engine.graph import DENOISE
from tgate_engine.plan import Call, Plan
from tgate_engine.sampler import Sampler
from tgate_export.adapt import adapt
from tgate_export.candidates import candidates
from tgate_export.methods import find_method
from tgate_export.methods.base import Settings, guidance_stopped, ungated
from tgate_export.methods.late import PREFIX, Late, has_late, shared_out
from tgate_export.plans import add_plan, make_plans

STEPS = 8


def graphs(program: tuple[Call, ...]) -> list[str]:
    return [call.graph for call in program]


def below(sampler: Sampler, first: int) -> float:
    """The timestep at which the call before ``first`` is the last of the first network."""
    return sampler.calls[first - 1].timestep if first < len(sampler.calls) else 0.0


def test_a_timestep_at_the_boundary_is_the_first_networks() -> None:
    sampler = toy_bundle.sampler(STEPS)
    at = sampler.calls[3].timestep
    assert Late(below=at).calls(sampler) == (False,) * 4 + (True,) * 4
    assert Late(below=at + 1e-9).calls(sampler) == (False,) * 4 + (True,) * 4, "in float32, as PyTorch compares"
    assert Late(below=at + 0.5).calls(sampler) == (False,) * 3 + (True,) * 5
    assert Late(below=0.0).calls(sampler) == (False,) * STEPS
    assert Late(below=2000.0).calls(sampler) == (True,) * STEPS


@pytest.mark.parametrize(
    ("first", "want"),
    [
        # before the gate (m = 4): self-attention goes on being computed at every 2nd step, and at the first one
        (1, "full late_full late_full late_full late_reuse_cross late_reuse_cross late_reuse_cross late_reuse_cross"),
        (3, "full full full late_full late_reuse_cross late_reuse_cross late_reuse_cross late_reuse_cross"),
        # at the gate and behind it: one step more that computes both halves of guidance
        (4, "full full full full late_full late_reuse_cross late_reuse_cross late_reuse_cross"),
        (6, "full full full full reuse_cross reuse_cross late_full late_reuse_cross"),
        (7, "full full full full reuse_cross reuse_cross reuse_cross late_full"),
        (8, "full full full full reuse_cross reuse_cross reuse_cross reuse_cross"),
    ],
)
def test_the_first_step_after_the_change_computes_everything(first: int, want: str) -> None:
    program = find_method("tgate").program(Settings(steps=8, gate=4, warm_up=2))
    late = [i >= first for i in range(8)]
    assert graphs(shared_out(program, late)) == want.split()
    assert [call.phase for call in shared_out(program, late)] == [call.phase for call in program], "m stays where it is"


def test_k_and_f_go_on_counting_the_whole_schedule() -> None:
    settings = Settings(steps=12, gate=7, self_interval=3, warm_up=0, fidelity_interval=2)
    program = find_method("tgate").program(settings)
    own = "full reuse_self reuse_self full reuse_self reuse_self full"
    own += " reuse_both reuse_cross reuse_both reuse_cross reuse_both"
    assert graphs(program) == own.split()
    early = "full reuse_self reuse_self full late_full late_reuse_self late_full"
    early += " late_reuse_both late_reuse_cross late_reuse_both late_reuse_cross late_reuse_both"
    assert graphs(shared_out(program, [i >= 4 for i in range(12)])) == early.split()
    behind = [*own.split()[:9], "late_full", "late_reuse_cross", "late_reuse_both"]
    assert graphs(shared_out(program, [i >= 9 for i in range(12)])) == behind


def test_nothing_reused_stays_as_it_is() -> None:
    settings = Settings(steps=6, gate=2)
    for program in (ungated(6), guidance_stopped(settings)):
        late = [i >= 4 for i in range(6)]
        want = [PREFIX * late[i] + call.graph for i, call in enumerate(program)]
        assert graphs(shared_out(program, late)) == want


def test_a_refresh_of_guidance_and_the_change_are_both_full() -> None:
    program = find_method("guidance_delta").program(Settings(steps=9, gate=2, refresh_interval=3))
    full = [i for i, call in enumerate(shared_out(program, [i >= 6 for i in range(9)])) if call.graph.endswith("full")]
    assert full == [0, 1, 4, 6, 7]


# --- plans --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Read only."""
    root = tmp_path_factory.mktemp("late")
    return Bundle.open(build(root / "toy", Toy(settings={"default": Settings(steps=8, gate=4)}), goldens=False))


def of_two(bundle: Bundle) -> dict[str, Any]:
    """The toy's graphs as those of two networks."""
    own = bundle.manifest.shapes[0].graphs
    return {**own, **{PREFIX + name: spec for name, spec in own.items() if spec.role == DENOISE}}


def plans(bundle: Bundle, settings: Settings, late: Late | None, **more: Any) -> dict[str, Plan]:
    return make_plans(
        "case",
        find_method("tgate"),
        settings,
        sampler=toy_bundle.sampler(settings.steps),
        guidance_scale=4.0,
        guided=True,
        graphs=of_two(bundle),
        carries=bundle.manifest.carries,
        late=late,
        **more,
    )


def test_no_step_reads_what_the_other_network_wrote(toy: Bundle) -> None:
    """Whatever the settings and the boundary: followed from each carry's last writer, by the graphs' signatures."""
    specs, carries, sampler = of_two(toy), toy.manifest.carries, toy_bundle.sampler(STEPS)
    seen = 0
    for m, k, f, first in itertools.product((1, 3, 4, 8), (1, 2, 3), (1, 2), range(1, STEPS + 1)):
        settings = Settings(steps=STEPS, gate=m, self_interval=k, fidelity_interval=f, warm_up=1)
        for plan in plans(toy, settings, Late(below=below(sampler, first))).values():
            writer: dict[str, bool] = {}
            for step in plan.steps:
                second = step.graph.startswith(PREFIX)
                assert second is (step.index >= first)
                assert all(writer[name] is second for name in step.reads), (plan.name, m, k, f, first, step.index)
                seen += second and bool(step.reads)
                given = specs[step.graph].output_names()
                writer |= {name: second for name in given if name in carries}
    assert seen > 300


def test_plans_tell_when_and_how_the_second_network_is_guided(toy: Bundle) -> None:
    late = Late(below=500.0, guidance=3.0, beside=7.0)
    made = plans(toy, Settings(steps=8, gate=4), late)  # at a guidance scale of 4
    facts = {"late_below": 500.0, "late_guidance": 2.0}
    assert all(plan.settings.items() >= facts.items() for plan in made.values())
    assert Late.of(made["case"].settings, 4.0) == late.at(4.0) == Late(below=500.0, guidance=2.0, beside=4.0)
    assert late.at(4.0).share == pytest.approx(late.share)
    assert Late.of(toy.manifest.plan("default").settings, 4.0) is None
    zero = Late(below=500.0, guidance=0.0, beside=3.0)
    assert Late.of(zero.facts(), 3.0) == zero
    unguided = Late(below=500.0)
    assert Late.of(unguided.facts(), 1.0) == unguided
    assert (unguided.share, unguided.facts()) == (1.0, {"late_below": 500.0})


@pytest.mark.parametrize("facts", [{"late_below": "x"}, {"late_below": 5.0, "late_guidance": "x"}])
def test_facts_that_are_no_numbers_are_refused(facts: Mapping[str, Any]) -> None:
    with pytest.raises(MethodError, match="a plan's late_below and late_guidance are numbers, got"):
        Late.of(facts, 4.0)


def test_graphs_of_two_networks_want_a_boundary(toy: Bundle) -> None:
    assert has_late(of_two(toy))
    assert not has_late(toy.manifest.shapes[0].graphs)
    with pytest.raises(PlanError, match="of two networks, and nothing says at which timesteps each of them runs"):
        plans(toy, Settings(steps=8, gate=4), None)


def test_forecasts_are_refused(toy: Bundle) -> None:
    with pytest.raises(MethodError, match=r"forecasts .every 3 steps. are not made of a model of two networks"):
        plans(toy, Settings(steps=8, gate=4, forecast_interval=3), Late(below=500.0))


def test_a_plan_with_nothing_left_to_reuse_is_told(toy: Bundle, caplog: pytest.LogCaptureFixture) -> None:
    sampler = toy_bundle.sampler(8)
    plans(toy, Settings(steps=8, gate=7), Late(below=below(sampler, 7)))
    assert caplog.messages == [
        "plan case: nothing is left to reuse, since a network's first step computes everything, and no other step "
        "comes after the gate; take a smaller m, or more steps"
    ]
    caplog.clear()
    plans(toy, Settings(steps=8, gate=6), Late(below=below(sampler, 7)))
    assert caplog.messages == []


def test_an_interval_that_reuses_nothing_beside_the_change_is_told(
    toy: Bundle, caplog: pytest.LogCaptureFixture
) -> None:
    """Step 3 is the only one that k = 4 would reuse, and the second network's first."""
    settings = Settings(steps=8, gate=5, self_interval=4, warm_up=2)
    plans(toy, settings, Late(below=below(toy_bundle.sampler(8), 3)))
    assert caplog.messages == [
        "plan case: k = 4 reuses nothing at n = 8, m = 5, w = 2; take a larger m, or a smaller k or w"
    ]
    caplog.clear()
    plans(toy, settings, Late(below=below(toy_bundle.sampler(8), 4)))
    assert caplog.messages == []
    method = find_method("guidance_delta")
    refreshed = Settings(steps=8, gate=3, refresh_interval=4)  # step 6

    def made(first: int) -> Callable[[tuple[Call, ...]], tuple[Call, ...]]:
        return lambda program: shared_out(program, [i >= first for i in range(8)])

    assert method.idle(refreshed, 0, made(6)).startswith("g = 4 refreshes nothing at")
    assert method.idle(refreshed, 0, made(5)) == ""


# --- a bundle of two networks -------------------------------------------------------------------


@pytest.fixture
def bundle(toy: Bundle, tmp_path: Path) -> Path:
    """The toy's graphs stand for both networks', under both names."""
    root = build(tmp_path / "toy", Toy(settings={"default": Settings(steps=8, gate=4)}), goldens=False)

    def edit(data: dict[str, Any]) -> None:
        for shape in data["shapes"]:
            own = shape["graphs"]
            shape["graphs"] = {**own, **{PREFIX + n: spec for n, spec in own.items() if spec["role"] == DENOISE}}
        scale = data["guidance_scale"]
        late = Late(below=below(toy_bundle.sampler(8), 4), guidance=1 + (scale - 1) / 2, beside=scale)
        data["plans"]["default"]["settings"] |= late.facts()

    edit_manifest(root, edit)
    return root


def test_a_plan_that_is_added_changes_networks_where_the_bundles_own_does(bundle: Path) -> None:
    own = add_plan(bundle, name="other", m=2, guidance_scale=5.0, save=False)["other"]
    want = ["full", "full", "reuse_cross", "reuse_cross", "late_full", *["late_reuse_cross"] * 3]
    assert [step.graph for step in own.steps] == want
    assert own.settings["late_guidance"] == pytest.approx(3.0)
    other = add_plan(bundle, name="other", m=2, steps=6, save=False)["other"]
    boundary = Late.of(own.settings, 5.0)
    assert boundary is not None
    late = [step.graph.startswith(PREFIX) for step in other.steps]
    assert late == [step.call.timestep < boundary.below for step in other.steps]
    assert any(late)
    assert not all(late)
    with pytest.raises(MethodError, match=r"forecasts .every 2 steps. are not made"):
        add_plan(bundle, name="other", m=2, forecast_interval=2)


def test_a_lora_for_requests_is_refused(bundle: Path) -> None:
    with pytest.raises(ExportError, match=r"has two networks, and which of them LoRA .* is for is not known; fuse it"):
        adapt(bundle, bundle / "x.safetensors", name="x")


def test_candidates_are_programs_of_both_networks(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    found = candidates(opened)
    every = [found.ungated, *found.plans.values()]
    for plan in every:
        assert [step.graph.startswith(PREFIX) for step in plan.steps] == [False] * 4 + [True] * 4
        assert "r" not in plan.settings
    assert not [b.name for i, a in enumerate(every) for b in every[i + 1 :] if a.same_program(b)]
    label = "m=5 k=2 w=0 f=2"
    made = add_plan(bundle, name="x", m=5, k=2, warm_up=0, fidelity_interval=2, save=False)
    assert made["x"].same_program(found.plans[label])
    assert found.named(opened, label, "x") == made
