"""A bias and a residual after a product become one sum, in the widths that the kernel knows."""

from __future__ import annotations

import pytest

from tests.runtime.engines.ort_cuda.lowering.small import Edits, rewritten, small
from tgate_runtime.engines.ort_cuda.lowering.sums import lower_sums

ONES = ", ".join(["1"] * 320)
BLOCK = f"""(float[n, 2, 3] x, float[n, 2, 320] skip, float[3, 320] w) => (float[n, 2, 320] y)
    <float[320] b = {{{ONES}}}> {{ p = MatMul(x, w)  a = Add(p, b)  y = Add(a, skip) }}"""
NARROW: Edits = (
    ("float[n, 2, 320] skip", "float[n, 2, 4] skip"),
    ("float[3, 320] w", "float[3, 4] w"),
    ("(float[n, 2, 320] y)", "(float[n, 2, 4] y)"),
    (f"float[320] b = {{{ONES}}}", "float[4] b = {1, 2, 3, 4}"),
)


@pytest.mark.parametrize(
    "edits", [(), (("Add(p, b)", "Add(b, p)"), ("Add(a, skip)", "Add(skip, a)"))], ids=["plain", "turned round"]
)
def test_it_is_lowered(edits: Edits) -> None:
    assert rewritten(small(BLOCK, edits), lower_sums) == ["MatMul", "BiasAdd"]


@pytest.mark.parametrize(
    ("edits", "operators"),
    [
        (NARROW, ["MatMul", "Add", "Add"]),
        ((("(float[n, 2, 320] y)", "(float[n, 2, 320] y, float[n, 2, 320] a)"),), ["MatMul", "Add", "Add"]),
        ((("float[n, 2, 320] skip", "float[1, 2, 320] skip"),), ["MatMul", "Add", "Add"]),
        ((("p = MatMul(x, w)", "q = MatMul(x, w)  p = Neg(q)"),), ["MatMul", "Neg", "Add", "Add"]),
    ],
    ids=["another width", "read again", "one skip for all", "no product"],
)
def test_all_else_stays(edits: Edits, operators: list[str]) -> None:
    assert rewritten(small(BLOCK, edits), lower_sums) == operators
