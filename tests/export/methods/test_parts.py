"""A part that does nothing leaves a step as it is."""

from __future__ import annotations

from torch import nn

from tgate_export.methods.parts import Part


def test_a_part_that_says_nothing_changes_nothing() -> None:
    part, module = Part(), nn.Linear(2, 2)
    with part.attached(module):
        part.begin({}, 1, 2)
        assert part.difference() is None
        assert part.end(None) == {}
    assert (part.reads, part.writes, part.facts, part.ends_text) == ((), (), {}, False)
    assert not module._forward_hooks
    assert not module._forward_pre_hooks
