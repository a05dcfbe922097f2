"""Gated feed-forward layers of the widths that the kernel knows become one operator, in every form that means it."""

from __future__ import annotations

import pytest

from tests.runtime.engines.ort_cuda.lowering.small import Edits, rewritten, small
from tgate_runtime.engines.ort_cuda.lowering.feed_forwards import lower_feed_forwards

BIAS = ", ".join(str(i % 5 - 2) for i in range(2560))
GATED = f"""(float[n, 2, 2560] x) => (float[n, 2, 1280] y)
    <float[2560] b = {{{BIAS}}}, int64[2] halves = {{1280, 1280}}>
    {{ t = Add(x, b)  l, r = Split<axis = -1>(t, halves)  g = Gelu(r)  y = Mul(l, g) }}"""


@pytest.mark.parametrize(
    "edits",
    [
        (),
        (("Mul(l, g)", "Mul(g, l)"), ("Add(x, b)", "Add(b, x)"), ("axis = -1", "axis = 2")),
        (("Split<axis = -1>(t, halves)", "Split<axis = -1, num_outputs = 2>(t)"),),
    ],
    ids=["plain", "the other way round", "halves not said"],
)
def test_they_are_lowered(edits: Edits) -> None:
    assert rewritten(small(GATED, edits), lower_feed_forwards) == ["BiasSplitGelu"]


@pytest.mark.parametrize(
    "edits",
    [
        (("Gelu(r)", 'Gelu<approximate = "tanh">(r)'),),
        (("Gelu(r)", "Gelu(l)"), ("Mul(l, g)", "Mul(r, g)")),
        (("y = Mul(l, g)", "z = Mul(l, g)  y = Add(z, g)"),),
        (("y = Mul(l, g)", "z = Mul(l, g)  y = Add(z, l)"),),
        (("y = Mul(l, g)", "z = Mul(l, g)  q = ReduceMax<keepdims = 0>(t)  y = Add(z, q)"),),
        (("2560] x", "2560] x, float[2560] c"), ("Add(x, b)", "Add(x, c)")),
        (("[n, 2, 2560]", "[n, 1, 2, 2560]"), ("[n, 2, 1280]", "[n, 1, 2, 1280]")),
    ],
    ids=["another", "of the left", "gate read again", "half read again", "sum read again", "bias from outside", "4-D"],
)
def test_all_others_stay(edits: Edits) -> None:
    assert "BiasSplitGelu" not in rewritten(small(GATED, edits), lower_feed_forwards)


def test_other_widths_stay() -> None:
    text = GATED.replace("2560", "2564").replace("1280", "1282").replace("= {", "= {1, 1, 1, 1, ", 1)
    assert rewritten(small(text), lower_feed_forwards) == ["Add", "Split", "Gelu", "Mul"]
