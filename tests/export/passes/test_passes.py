"""The rewrites together: their order, and what the libraries' own passes do between them."""

from __future__ import annotations

import numpy as np
import pytest

from tests.export.passes.small import by_reference, by_runtime, model, noise, operators
from tgate_export.graphs import OPSET
from tgate_export.passes import simplify


def test_every_rewrite_happens_and_the_numbers_stay() -> None:
    small = model(
        """(float[2, 5, 24] q, float[2, 7, 24] k, float[2, 7, 24] v, float[2, 1, 1, 7] mask) => (float[2, 5, 24] y)
        <int64[4] parts = {0, 0, 3, 8}, int64[3] whole = {0, 0, 24}, float two = {2}, int64[1] axis = {1}>
        {
            q_parts = Reshape(q, parts)  q_heads = Transpose<perm = [0, 2, 1, 3]>(q_parts)
            k_parts = Reshape(k, parts)  k_heads = Transpose<perm = [0, 2, 1, 3]>(k_parts)
            v_parts = Reshape(v, parts)  v_heads = Transpose<perm = [0, 2, 1, 3]>(v_parts)
            heads = Attention(q_heads, k_heads, v_heads, mask)
            a_parts = Transpose<perm = [0, 2, 1, 3]>(heads)  a = Reshape(a_parts, whole)
            unread = Neg(heads)  one = Div(two, two)  scaled = Div(a, one)  same = Identity(scaled)  y = Mul(same, two)
        }"""
    )
    inputs = noise(q=(2, 5, 24), k=(2, 7, 24), v=(2, 7, 24), mask=(2, 1, 1, 7))
    before = by_reference(small, inputs)
    simplify(small)
    assert operators(small) == ["Expand", "Attention", "Mul"]
    assert np.abs(by_runtime(small, inputs) - before).max() < 1e-6


def test_a_squeeze_in_vain_goes_where_folding_tells_its_dimension() -> None:
    small = model(
        """(float[2, 3] x) => (float[2, 3] y) <int64[1] two = {2}, int64[1] one = {1}>
        { axis = Sub(two, one)  a = Squeeze(x, axis)  y = Neg(a) }"""
    )
    simplify(small)
    assert operators(small) == ["Neg"]
    inputs = noise(x=(2, 3))
    assert np.array_equal(by_runtime(small, inputs), -inputs["x"])


def test_doubles_and_leftovers_go() -> None:
    small = model(
        """(float[2, 3] x) => (float[2, 3] y) <float a = {2}, float b = {2}>
        { p = Mul(x, a)  q = Mul(x, b)  unread = Neg(p)  one = Exp(p)  two = Exp(q)  y = Sub(one, two) }"""
    )
    small.opset_imports["pkg.onnxscript.torch_lib"] = 1
    simplify(small)
    assert small.opset_imports == {"": OPSET}
    assert operators(small) == ["Mul", "Exp", "Sub"]
    assert len(small.graph.initializers) == 1
    inputs = noise(x=(2, 3))
    assert np.array_equal(by_runtime(small, inputs), np.zeros((2, 3)))


def test_layers_that_share_a_mask_share_the_wide_one() -> None:
    small = model(
        """(float[2, 3, 5, 8] q, float[2, 3, 5, 8] k, float[2, 3, 5, 8] v, float[2, 1, 1, 5] mask)
        => (float[2, 3, 5, 8] y) { a = Attention(q, k, v, mask)  y = Attention(a, k, v, mask) }"""
    )
    simplify(small)
    assert operators(small) == ["Expand", "Attention", "Attention"]


@pytest.mark.parametrize(("size", "folded"), [(8, ["Add"]), (2048, ["Expand", "Add"])], ids=["small", "large"])
def test_only_small_constants_are_computed(size: int, folded: list[str]) -> None:
    small = model(
        f"""(float[{size}, {size}] x) => (float[{size}, {size}] y)
        <float one = {{1}}, int64[2] shape = {{{size}, {size}}}> {{ ones = Expand(one, shape)  y = Add(x, ones) }}"""
    )
    simplify(small)
    assert operators(small) == folded
    assert np.array_equal(by_runtime(small, {"x": np.zeros((size, size), np.float32)}), np.ones((size, size)))


def test_constants_become_initializers_and_weights_stay_inputs() -> None:
    small = model(
        """(float[2] x, float[2] weight) => (float[2] y)
        { two = Constant<value = float {2}>()  product = Mul(weight, two)  y = Add(x, product) }"""
    )
    simplify(small)
    assert operators(small) == ["Mul", "Add"]
    assert [value.name for value in small.graph.inputs] == ["x", "weight"]
    assert len(small.graph.initializers) == 1
    inputs = noise(x=(2,), weight=(2,))
    assert np.array_equal(by_runtime(small, inputs), inputs["x"] + 2 * inputs["weight"])


def test_an_identity_before_an_output_goes_and_the_name_stays() -> None:
    small = model("(float[2] x) => (float[2] y) { a = Neg(x)  y = Identity(a) }")
    simplify(small)
    assert operators(small) == ["Neg"]
    assert [value.name for value in small.graph.outputs] == ["y"]
