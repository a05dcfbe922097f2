"""The difference of both halves as a carry."""

from __future__ import annotations

import torch

from tgate_export.methods.guidance_delta.difference import DIFFERENCE, KeepDifference, ReuseDifference


def test_what_one_step_keeps_another_is_guided_by() -> None:
    keep, reuse = KeepDifference(), ReuseDifference()
    difference = torch.randn(2, 4, 3, 3)
    carried = keep.end(difference)
    assert set(carried) == set(keep.writes) == set(reuse.reads) == set(keep.facts) == {DIFFERENCE}
    assert torch.equal(carried[DIFFERENCE], difference)
    assert carried[DIFFERENCE] is not difference, "an output of a graph may not be the tensor of another one"
    reuse.begin(carried, 2, 1)
    assert reuse.difference() is carried[DIFFERENCE]
    assert reuse.end(None) == {}
    assert keep.difference() is None, "a step that computes both halves has its own"
