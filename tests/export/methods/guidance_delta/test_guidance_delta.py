"""Which graph each call runs, what each graph reads and stores, and the difference itself."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tgate_engine.errors import MethodError
from tgate_export.attention import AttentionSite
from tgate_export.methods.base import Network, Settings
from tgate_export.methods.guidance_delta import GuidanceDelta
from tgate_export.methods.guidance_delta.difference import KeepDifference, ReuseDifference

METHOD = GuidanceDelta()
NETWORK = Network(sites=(AttentionSite("a.attn1", "self"), AttentionSite("a.attn2", "cross")), guided=True)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 2))
def test_from_m_on_the_difference_is_reused(steps: int, gate: int, lead_in: int) -> None:
    gate = min(gate, steps)
    program = METHOD.program(Settings(steps=steps, gate=gate), lead_in)
    assert [call.graph for call in program] == ["full"] * (lead_in + gate) + ["reuse_delta"] * (steps - gate)
    assert [call.phase for call in program].count("semantics-planning") == lead_in + gate


def test_every_gth_step_after_the_gate_computes_both_halves() -> None:
    settings = Settings(steps=12, gate=3, refresh_interval=4)
    full = [i for i, call in enumerate(METHOD.program(settings)) if call.graph == "full"]
    assert full == [0, 1, 2, 6, 10]
    assert [i - 1 for i, call in enumerate(METHOD.program(settings, 1)) if call.graph == "full"] == [-1, *full]


def test_a_refresh_that_comes_too_late_is_refused() -> None:
    with pytest.raises(MethodError, match="--refresh 5 would change nothing: from step m = 8 on there are 4 steps"):
        METHOD.settings(steps=12, gate=8, defaults={}, g=5)
    assert METHOD.settings(steps=12, gate=8, defaults={}, g=4).refresh_interval == 4


def test_a_refresh_and_a_forecast_are_refused_together() -> None:
    with pytest.raises(MethodError, match="--refresh 3 and --forecast 2 don't go together"):
        METHOD.settings(steps=12, gate=4, defaults={}, g=3, r=2)


def test_graphs_keep_one_tensor_and_no_attention() -> None:
    variants = METHOD.variants(NETWORK, Settings(steps=25, gate=10))
    assert [
        (v.name, v.halves, [n for p in v.parts for n in p.reads], [n for p in v.parts for n in p.writes])
        for v in variants
    ] == [
        ("full", "both", [], ["guidance_difference"]),
        ("reuse_delta", "positive", ["guidance_difference"], []),
        ("unguided", "positive", [], []),
    ]
    assert not any(part.ends_text for variant in variants for part in variant.parts)


def test_goldens_walk_every_graph() -> None:
    short = METHOD.short(Settings(steps=25, gate=10))
    assert {call.graph for call in METHOD.program(short)} == {"full", "reuse_delta"}


def test_without_guidance_there_is_no_difference() -> None:
    METHOD.check(guided=True)
    with pytest.raises(MethodError, match="--method tgate, or a --guidance-scale above 1"):
        METHOD.check(guided=False)


def test_what_one_part_gives_the_other_guides_by() -> None:
    keep, reuse = KeepDifference(), ReuseDifference()
    difference = torch.randn(2, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    carried = keep.end(difference)
    assert list(carried) == list(keep.writes) == list(reuse.reads)
    assert keep.difference() is None
    reuse.begin(carried, 2, 1)
    kept = reuse.difference()
    assert kept is not None
    assert torch.equal(kept, difference)
    assert reuse.end(None) == {}
