"""Group normalizations become the operator that CUDA has, where its kernel takes them, and no others."""

from __future__ import annotations

import pytest

from tests.runtime.engines.ort_cuda.lowering.small import Edits, rewritten, small
from tgate_runtime.engines.ort_cuda.lowering.group_norms import lower_group_norms

ALONE = """(float[n, 8, 3, 5] x) => (float[n, 8, 3, 5] y)
    <float[8] scale = {1, 2, 3, 4, 5, 6, 7, 8}, float[8] shift = {8, 7, 6, 5, 4, 3, 2, 1}>
    { y = GroupNormalization<num_groups = 2, epsilon = 0.5>(x, scale, shift) }"""
SILU: Edits = (("{ y = ", "{ a = "), ("shift) }", "shift)  s = Sigmoid(a)  y = Mul(a, s) }"))


@pytest.mark.parametrize(
    ("edits", "operators"),
    [
        ((), ["Transpose", "GroupNorm", "Transpose"]),
        (SILU, ["Transpose", "GroupNorm", "Transpose"]),
        ((*SILU[:1], (SILU[1][0], SILU[1][1].replace("(a, s)", "(s, a)"))), ["Transpose", "GroupNorm", "Transpose"]),
        (
            (*SILU[:1], ("shift) }", "shift)  s = Sigmoid(a)  b = Mul(a, s)  y = Add(a, b) }")),
            ["Transpose", "GroupNorm", "Transpose", "Sigmoid", "Mul", "Add"],
        ),
        (
            (*SILU[:1], ("shift) }", "shift)  s = Sigmoid(a)  b = Mul(a, s)  y = Add(b, s) }")),
            ["Transpose", "GroupNorm", "Transpose", "Sigmoid", "Mul", "Add"],
        ),
    ],
    ids=["alone", "SiLU", "SiLU the other way round", "read before SiLU", "sigmoid read again"],
)
def test_they_are_lowered(edits: Edits, operators: list[str]) -> None:
    assert rewritten(small(ALONE, edits), lower_group_norms) == operators


def test_in_half_precision_scales_are_float32() -> None:
    assert rewritten(small(ALONE, half=True), lower_group_norms, 2e-3) == ["Transpose", "GroupNorm", "Transpose"]


@pytest.mark.parametrize(
    "edits",
    [
        (("num_groups = 2", "num_groups = 8"),),
        (("num_groups = 2", "num_groups = 2, stash_type = 10"),),
        (("(float[n, 8, 3, 5] x)", "(float[n, 8, 15] x)"), ("=> (float[n, 8, 3, 5] y)", "=> (float[n, 8, 15] y)")),
        (("x) =>", "x, float[8] s) =>"), ("(x, scale, ", "(x, s, ")),
    ],
    ids=["an odd number of channels", "statistics in half precision", "three dimensions", "scales from outside"],
)
def test_all_others_stay(edits: Edits) -> None:
    assert rewritten(small(ALONE, edits), lower_group_norms) == ["GroupNormalization"]
