"""The bias of what goes out beside a sum is added where it goes out; the sum may then take it up."""

from __future__ import annotations

import pytest

from tests.runtime.engines.ort_cuda.lowering.small import Edits, operators, rewritten, small
from tgate_runtime.engines.ort_cuda.lowering.carries import lower_carries

WHOLE = """(float[2, 5, 3] x, float[2, 5, 4] skip, float[3, 4] w) => (float[2, 5, 4] y, float[1, 2, 5, 4] carry)
    <float[4] b = {1, -1, 2, -2}, int64[4] shape = {1, 2, 5, 4}>
    { p = MatMul(x, w)  a = Add(p, b)  y = Add(a, skip)  carry = Reshape(a, shape) }"""
MEAN = """(float[2, 5, 3] x, float[2, 5, 4] skip, float[3, 4] w) => (float[2, 5, 4] y, float[1, 5, 4] carry)
    <float[4] b = {1, -1, 2, -2}, int64[5] shape = {1, 2, 1, 5, 4}, int64[1] zero = {0}, int64[1] one = {1},
     int64[1] two = {2}, float half = {2}>
    { p = MatMul(x, w)  a = Add(b, p)  y = Add(a, skip)  r = Reshape(a, shape)
      s = Slice(r, zero, one, one)  t = Slice(r, one, two, one)  u = Squeeze(s, one)  v = Squeeze(t, one)
      sum = Add(u, v)  mean = Div(sum, half)  carry = Squeeze(mean, one) }"""
WHOLE_NOW = ["MatMul", "Reshape", "Add", "Add", "Add"]
MEAN_WAS = ["MatMul", "Add", "Add", "Reshape", "Slice", "Slice", "Squeeze", "Squeeze", "Add", "Div", "Squeeze"]


def test_a_carry_put_out_whole() -> None:
    assert sorted(rewritten(small(WHOLE), lower_carries)) == sorted(WHOLE_NOW)


def test_a_carry_put_out_as_the_mean_of_its_halves() -> None:
    assert sorted(rewritten(small(MEAN), lower_carries)) == sorted([*MEAN_WAS, "Add"])


@pytest.mark.parametrize(
    ("text", "edits"),
    [
        (WHOLE, (("y = Add(a, skip)", "z = Add(a, skip)  y = Mul(z, a)"),)),
        (WHOLE, (("carry = Reshape(a, shape)", "c = Reshape(a, shape)  carry = Neg(c)"),)),
        (WHOLE, (("[1, 2, 5, 4] carry", "[1, 2, 4, 5] carry"), ("{1, 2, 5, 4}", "{1, 2, 4, 5}"))),
        (MEAN, (("half = {2}", "half = {3}"),)),
        (MEAN, (("t = Slice(r, one, two, one)", "t = Slice(r, zero, one, one)"),)),
        (MEAN, (("sum = Add(u, v)", "sum = Mul(u, v)"),)),
    ],
    ids=["read three times", "not as it is", "another last dimension", "no mean", "one half twice", "no sum"],
)
def test_all_else_stays(text: str, edits: Edits) -> None:
    data = small(text, edits)
    assert rewritten(data, lower_carries) == operators(data)
