"""Sums before a layer normalization are taken into it, with the bias before them; whoever reads a sum still gets it."""

from __future__ import annotations

import pytest

from tests.runtime.engines.ort_cuda.lowering.small import Edits, rewritten, small
from tgate_runtime.engines.ort_cuda.lowering.residuals import lower_residuals

BLOCK = """(float[n, 3, 4] x, float[n, 3, 4] skip) => (float[n, 3, 4] y)
    <float[4] b = {1, -1, 2, -2}, float[4] scale = {1, 2, 3, 4}, float[4] shift = {4, 3, 2, 1}>
    { a = Add(x, b)  s = Add(a, skip)  y = LayerNormalization<epsilon = 0.5>(s, scale, shift) }"""
READ_AGAIN: Edits = (("y = Layer", "z = Layer"), ("shift) }", "shift)  y = Mul(z, s) }"))


@pytest.mark.parametrize(
    ("edits", "operators"),
    [
        ((), ["SkipLayerNormalization"]),
        ((("Add(x, b)", "Add(b, x)"), ("Add(a, skip)", "Add(skip, a)")), ["SkipLayerNormalization"]),
        ((("scale, shift)", "scale)"),), ["SkipLayerNormalization"]),
        (READ_AGAIN, ["SkipLayerNormalization", "Mul"]),
        (
            (("y = Layer", "z = Layer"), ("shift) }", "shift)  y = Mul(z, a) }")),
            ["Add", "SkipLayerNormalization", "Mul"],
        ),
        ((("skip) =>", "skip, float[4] c) =>"), ("(x, b)", "(x, c)")), ["Add", "SkipLayerNormalization"]),
        ((("a = Add(x, b)", "a = Neg(x)"),), ["Neg", "SkipLayerNormalization"]),
    ],
    ids=["plain", "turned round", "no shift", "sum read again", "biased read again", "bias from outside", "no bias"],
)
def test_they_are_lowered(edits: Edits, operators: list[str]) -> None:
    assert rewritten(small(BLOCK, edits), lower_residuals) == operators


@pytest.mark.parametrize(
    "edits",
    [
        (("skip) => (float[n, 3, 4] y)", "skip) => (float[n, 3, 4] y, float[n, 3, 4] s)"),),
        (
            ("epsilon = 0.5", "epsilon = 0.5, axis = 1"),
            ("float[4] scale = {1, 2, 3, 4}", "float[3, 4] scale = {1, 2, 3, 4, 1, 2, 3, 4, 1, 2, 3, 4}"),
        ),
        (("float[n, 3, 4] skip", "float[1, 3, 4] skip"),),
        (("float[n, 3, 4] skip", "float[4] skip"),),
        (("y = Layer", "y, mean = Layer"), ("(float[n, 3, 4] y)", "(float[n, 3, 4] y, float[n, 3, 1] mean)")),
    ],
    ids=["sum put out", "another axis", "one skip for all", "no skip", "mean put out"],
)
def test_all_others_stay(edits: Edits) -> None:
    assert rewritten(small(BLOCK, edits), lower_residuals) == ["Add", "Add", "LayerNormalization"]
