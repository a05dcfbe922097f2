"""Which graph each call runs, and what each graph reads and stores: against the rule, and against lists by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rules import step_rule
from tgate_engine.errors import MethodError
from tgate_export.attention import AttentionSite
from tgate_export.methods.base import Halves, Network, Settings, Variant
from tgate_export.methods.guidance_delta import GuidanceDelta
from tgate_export.methods.tgate import Tgate

GRAPHS = {
    ("compute", "compute"): "full",
    ("compute", "store"): "full",
    ("store", "store"): "full",
    ("compute", "reuse"): "reuse_self",
    ("reuse", "store"): "reuse_cross",
    ("reuse", "reuse"): "reuse_both",
}
"""By what a step does with cross-attention and with self-attention."""

ALONE, COMBINED = Tgate(), Tgate(guidance=GuidanceDelta())
SITES = (AttentionSite("a.attn1", "self"), AttentionSite("a.attn2", "cross"), AttentionSite("b.attn1", "self"))
SELF, CROSS = ("self.0", "self.1"), ("cross.0",)
MEAN, PROMPTS = ("self.0.mean", "self.1.mean"), ("self.0.positive", "self.1.positive")
DIFFERENCE = ("guidance_difference",)

Signature = tuple[str, Halves, tuple[str, ...], tuple[str, ...]]


@st.composite
def settings(draw: st.DrawFn) -> Settings:
    steps = draw(st.integers(1, 40))
    return Settings(
        steps=steps,
        gate=draw(st.integers(1, steps)),
        self_interval=draw(st.integers(1, 8)),
        warm_up=draw(st.integers(0, 10)),
        fidelity_interval=draw(st.integers(1, 5)),
    )


@pytest.mark.parametrize("method", [ALONE, COMBINED], ids=["tgate", "tgate+guidance_delta"])
@given(s=settings(), lead_in=st.integers(0, 2))
def test_every_call_runs_the_graph_of_the_methods_table(method: Tgate, s: Settings, lead_in: int) -> None:
    program = method.program(s, lead_in)
    assert len(program) == lead_in + s.steps
    for i, call in enumerate(program, start=-lead_in):
        rule = step_rule(i, s.steps, s.gate, s.self_interval, s.warm_up, s.fidelity_interval)
        assert call.graph == GRAPHS[rule.cross, rule.self_]
        assert call.phase == ("semantics-planning" if i < s.gate else "fidelity-improving")


def signatures(method: Tgate, *, guided: bool, f: int, after_gate: Halves = "negative") -> list[Signature]:
    """(name, halves, what it reads, what it stores) of every graph."""
    network = Network(sites=SITES, guided=guided, after_gate=after_gate)
    variants = method.variants(network, Settings(steps=6, gate=3, fidelity_interval=f))
    return [
        (v.name, v.halves, tuple(n for p in v.parts for n in p.reads), tuple(n for p in v.parts for n in p.writes))
        for v in variants
    ]


@pytest.mark.parametrize("after_gate", ["negative", "positive"])
def test_graphs_of_the_paper(after_gate: Halves) -> None:
    assert signatures(ALONE, guided=True, f=1, after_gate=after_gate) == [
        ("full", "both", (), (*SELF, *CROSS)),
        ("reuse_self", "both", SELF, ()),
        ("reuse_cross", after_gate, CROSS, ()),
        ("unguided", "positive", (), ()),
    ]


def test_graphs_of_the_paper_that_reuse_self_attention_after_the_gate() -> None:
    assert signatures(ALONE, guided=True, f=2) == [
        ("full", "both", (), (*SELF, *CROSS, *MEAN)),
        ("reuse_self", "both", SELF, ()),
        ("reuse_cross", "negative", CROSS, MEAN),
        ("reuse_both", "negative", (*MEAN, *CROSS), ()),
        ("unguided", "positive", (), ()),
    ]


@pytest.mark.parametrize("f", [1, 2])
def test_graphs_without_guidance_have_one_half_and_no_mean(f: int) -> None:
    again = SELF if f > 1 else ()
    expected: list[Signature] = [
        ("full", "positive", (), (*SELF, *CROSS)),
        ("reuse_self", "positive", SELF, ()),
        ("reuse_cross", "positive", CROSS, again),
        ("reuse_both", "positive", (*SELF, *CROSS), ()),
    ]
    assert signatures(ALONE, guided=False, f=f) == expected[: 4 if f > 1 else 3]


@pytest.mark.parametrize("after_gate", ["negative", "positive"])
def test_with_the_kept_difference_the_prompts_half_goes_on(after_gate: Halves) -> None:
    """Whatever half the paper goes on with."""
    assert signatures(COMBINED, guided=True, f=1, after_gate=after_gate) == [
        ("full", "both", (), (*SELF, *CROSS, *DIFFERENCE)),
        ("reuse_self", "both", SELF, ()),
        ("reuse_cross", "positive", (*CROSS, *DIFFERENCE), ()),
        ("unguided", "positive", (), ()),
    ]
    assert signatures(COMBINED, guided=True, f=3, after_gate=after_gate) == [
        ("full", "both", (), (*SELF, *CROSS, *PROMPTS, *DIFFERENCE)),
        ("reuse_self", "both", SELF, ()),
        ("reuse_cross", "positive", (*CROSS, *DIFFERENCE), PROMPTS),
        ("reuse_both", "positive", (*PROMPTS, *CROSS, *DIFFERENCE), ()),
        ("unguided", "positive", (), ()),
    ]


def facts(variant: Variant) -> dict[str, tuple[object, object, object]]:
    return {
        name: (facts["keeps"], facts["of"], facts["module"])
        for part in variant.parts
        for name, facts in part.facts.items()
        if "of" in facts
    }


def test_carries_say_what_they_keep() -> None:
    full = ALONE.variants(Network(sites=SITES, guided=True), Settings(steps=6, gate=3, fidelity_interval=2))[0]
    assert facts(full) == {
        "self.0": ("self-attention", "all", "a.attn1"),
        "self.1": ("self-attention", "all", "b.attn1"),
        "self.0.mean": ("self-attention", "mean", "a.attn1"),
        "self.1.mean": ("self-attention", "mean", "b.attn1"),
        "cross.0": ("cross-attention", "mean", "a.attn2"),
    }
    combined = COMBINED.variants(Network(sites=SITES, guided=True), Settings(steps=6, gate=3))[0]
    assert facts(combined)["cross.0"] == ("cross-attention", "positive", "a.attn2")


@pytest.mark.parametrize("f", [1, 3])
@pytest.mark.parametrize("lead_in", [0, 1])
@pytest.mark.parametrize("method", [ALONE, COMBINED], ids=["tgate", "tgate+guidance_delta"])
def test_goldens_walk_every_graph(method: Tgate, f: int, lead_in: int) -> None:
    """All but the one of the baseline, whose trajectory is another golden."""
    settings = Settings(steps=25, gate=10, self_interval=5, fidelity_interval=f)
    walked = {call.graph for call in method.program(method.short(settings), lead_in)}
    made = {variant.name for variant in method.variants(Network(sites=SITES, guided=True), settings)}
    assert walked == made - {"unguided"}


def test_the_kept_difference_needs_guidance() -> None:
    ALONE.check(guided=False)
    COMBINED.check(guided=True)
    with pytest.raises(MethodError, match="--method tgate, or a --guidance-scale above 1"):
        COMBINED.check(guided=False)
