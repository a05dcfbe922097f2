"""Transposes go down to where they cancel, past what works in either layout, and past nothing else."""

from __future__ import annotations

import pytest

from tests.runtime.engines.ort_cuda.lowering.small import rewritten, small
from tgate_runtime.engines.ort_cuda.lowering.layouts import settle_layouts

TOP = "(float[n, 4, 5, 2] x, float[n, 4, 5, 2] z, float[n, 2] e)"
CONSTANTS = (
    "<float half = {0.5}, float[2, 1, 1] each = {3, -3}, float[4] twice = {1, 1, 2, 2}, float[5] row = {1, 2, 3, 4, 5}>"
)
DOWN = "a = Transpose<perm = [0, 3, 1, 2]>(x)  b = Transpose<perm = [0, 3, 1, 2]>(z)"
UP = "y = Transpose<perm = [0, 2, 3, 1]>(c)"


def graph(middle: str, *, result: str = "n, 4, 5, 2", up: str = UP, down: str = DOWN) -> bytes:
    return small(f"{TOP} => (float[{result}] y) {CONSTANTS} {{ {down}  {middle}  {up} }}")


@pytest.mark.parametrize(
    ("middle", "result", "operators"),
    [
        ("c = Identity(a)", "n, 4, 5, 2", ["Identity"]),
        ("c = Add(a, b)", "n, 4, 5, 2", ["Add"]),
        ("s = Sigmoid(a)  p = Mul(s, a)  c = Sub(p, b)", "n, 4, 5, 2", ["Sigmoid", "Mul", "Sub"]),
        ("c = Mul(half, a)", "n, 4, 5, 2", ["Mul"]),
        ("c = Add(a, each)", "n, 4, 5, 2", ["Reshape", "Add"]),
        ("c = Concat<axis = 1>(a, b, a)", "n, 4, 5, 6", ["Concat"]),
        ('c = Resize<mode = "nearest">(a, , twice)', "n, 8, 10, 2", ["Resize"]),
    ],
    ids=["one", "two", "several", "a number", "a number for each channel", "concatenation", "enlarging"],
)
def test_a_pair_cancels_across(middle: str, result: str, operators: list[str]) -> None:
    assert rewritten(graph(middle, result=result), settle_layouts) == operators


def test_an_embedding_is_reshaped_and_not_transposed() -> None:
    middle = "two = Constant<value_ints = [2, 3]>()  w = Unsqueeze(e, two)  c = Add(w, a)"
    assert rewritten(graph(middle), settle_layouts) == ["Constant", "Unsqueeze", "Reshape", "Add"]


@pytest.mark.parametrize(
    ("middle", "result", "operators"),
    [
        ("c = Softmax<axis = 1>(a)", "n, 4, 5, 2", ["Transpose", "Softmax", "Transpose"]),
        ("c = Concat<axis = 2>(a, b)", "n, 8, 5, 2", ["Transpose", "Transpose", "Concat", "Transpose"]),
        ('c = Resize<mode = "linear">(a, , twice)', "n, 8, 10, 2", ["Transpose", "Resize", "Transpose"]),
        ("c = Add(a, row)", "n, 4, 5, 2", ["Transpose", "Add", "Transpose"]),
    ],
    ids=["along the channels", "one above the other", "enlarging smoothly", "a row for all"],
)
def test_nothing_goes_past_all_others(middle: str, result: str, operators: list[str]) -> None:
    assert rewritten(graph(middle, result=result), settle_layouts) == operators


def test_tokens_and_places_are_reshapes() -> None:
    """As attention in a decoder takes a picture apart, and puts it together."""
    data = small(
        """(float[n, 4, 5, 2] x) => (float[n, 4, 5, 2] y) <int64[3] flat = {-1, 2, 20}, int64[4] square = {-1, 2, 4, 5}>
        {
            a = Transpose<perm = [0, 3, 1, 2]>(x)  b = Reshape(a, flat)  c = Transpose<perm = [0, 2, 1]>(b)
            d = Softmax<axis = 1>(c)
            e = Transpose<perm = [0, 2, 1]>(d)  f = Reshape(e, square)  y = Transpose<perm = [0, 2, 3, 1]>(f)
        }"""
    )
    assert rewritten(data, settle_layouts) == ["Reshape", "Softmax", "Reshape"]


def test_an_output_of_the_graph_is_transposed_once() -> None:
    """What goes on with it takes it as it is put out."""
    data = small(
        """(float[n, 4, 5, 2] x) => (float[n, 2, 4, 5] y, float[n, 2, 4, 5] z)
        { y = Transpose<perm = [0, 3, 1, 2]>(x)  z = Neg(y) }"""
    )
    assert rewritten(data, settle_layouts) == ["Transpose", "Neg"]


def test_a_transpose_that_is_read_elsewhere_too_stays_there() -> None:
    data = small(
        """(float[n, 4, 5, 2] x) => (float[n, 2, 4, 5] y, float[n, 4, 5, 2] z)
        {
            a = Transpose<perm = [0, 3, 1, 2]>(x)  y = Softmax<axis = 1>(a)
            c = Neg(a)  z = Transpose<perm = [0, 2, 3, 1]>(c)
        }"""
    )
    assert rewritten(data, settle_layouts) == ["Transpose", "Softmax", "Neg"]
