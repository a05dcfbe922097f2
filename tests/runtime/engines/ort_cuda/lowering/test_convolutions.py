"""Convolutions in half precision take pictures and weights with their channels last; all others stay."""

from __future__ import annotations

import pytest

from tests.runtime.engines.ort_cuda.lowering.small import Edits, rewritten, small
from tgate_runtime.engines.ort_cuda.lowering.convolutions import lower_convolutions

WEIGHT = ", ".join(str(i % 7 - 3) for i in range(3 * 2 * 3 * 2))
PLAIN = f"""(float[n, 2, 6, 5] x) => (float[n, 3, a, b] y)
    <float[3, 2, 3, 2] w = {{{WEIGHT}}}, float[3] c = {{1, 2, 3}}>
    {{ y = Conv<pads = [1, 0, 2, 1], strides = [2, 1], dilations = [1, 2]>(x, w, c) }}"""
LOWERED = ["Transpose", "NhwcConv", "Transpose"]


@pytest.mark.parametrize(
    "edits",
    [(), (("(x, w, c)", "(x, w)"), (", float[3] c = {1, 2, 3}", "")), (("pads = [1, 0, 2, 1], ", ""),)],
    ids=["all said", "no bias", "no pads"],
)
def test_they_are_lowered(edits: Edits) -> None:
    assert rewritten(small(PLAIN, edits, half=True), lower_convolutions, 2e-3) == LOWERED


def test_a_weight_that_is_read_elsewhere_too_stays_there() -> None:
    data = small(
        PLAIN,
        (("{ y = ", "{ z = ReduceMax<keepdims = 0>(w)  y0 = "), ("w, c) }", "w, c)  y = Add(y0, z) }")),
        half=True,
    )
    assert rewritten(data, lower_convolutions, 2e-3) == ["ReduceMax", *LOWERED, "Add"]


@pytest.mark.parametrize(
    "edits",
    [
        (("x) =>", "x, float[3, 2, 3, 2] v) =>"), ("(x, w, c)", "(x, v, c)")),
        (("pads = [1, 0, 2, 1]", 'auto_pad = "SAME_UPPER"'), ("dilations = [1, 2]", "dilations = [1, 1]")),
    ],
    ids=["weights from outside", "pads not said"],
)
def test_all_others_stay(edits: Edits) -> None:
    assert rewritten(small(PLAIN, edits, half=True), lower_convolutions, 2e-3) == ["Conv"]


def test_groups_stay() -> None:
    data = small(
        """(float[n, 2, 6, 5] x) => (float[n, 2, 6, 5] y) <float[2, 1, 1, 1] w = {2, 3}>
        { y = Conv<group = 2>(x, w) }""",
        half=True,
    )
    assert rewritten(data, lower_convolutions, 2e-3) == ["Conv"]


def test_in_single_precision_they_stay() -> None:
    assert rewritten(small(PLAIN), lower_convolutions) == ["Conv"]
