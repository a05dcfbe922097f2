"""Multiplications by one are dropped, and no others."""

from __future__ import annotations

import numpy as np
import pytest

from tests.export.passes.small import by_runtime, model, noise, operators
from tgate_export.passes.units import drop_units


@pytest.mark.parametrize("operator", ["Mul", "Div"])
def test_a_multiplication_by_one_is_dropped(operator: str) -> None:
    small = model(f"(float[2, 3] x) => (float[2, 3] y) <float one = {{1}}> {{ a = {operator}(x, one)  y = Neg(a) }}")
    inputs = noise(x=(2, 3))
    before = by_runtime(small, inputs)
    drop_units(small.graph)
    assert operators(small) == ["Neg"]
    assert small.graph.node(0).inputs[0] is small.graph.inputs[0]
    assert np.array_equal(by_runtime(small, inputs), before)


def test_several_in_a_row_are_dropped() -> None:
    small = model(
        """(float[2] x) => (float[2] y) <float one = {1}>
        { a = Mul(x, one)  b = Div(a, one)  c = Mul(b, one)  y = Neg(c) }"""
    )
    inputs = noise(x=(2,))
    drop_units(small.graph)
    assert operators(small) == ["Neg"]
    assert np.array_equal(by_runtime(small, inputs), -inputs["x"])


@pytest.mark.parametrize(
    "graph",
    [
        "(float[3] x) => (float[3] y) <float c = {2}> { a = Mul(x, c)  y = Neg(a) }",
        "(float[3] x, float c) => (float[3] y) { a = Mul(x, c)  y = Neg(a) }",
        "(float[3] x) => (float[3] y) <float c = {1}> { a = Add(x, c)  y = Neg(a) }",
        "(float[3] x) => (float[3] y) <float c = {1}> { a = Div(c, x)  y = Neg(a) }",
        "(float[3] x) => (float[3] y) <float c = {1}> { y = Mul(x, c) }",
        "(float x) => (float[1] y) <float[1] c = {1}> { a = Mul(x, c)  y = Neg(a) }",
        "(float[3] x) => (float[3] y) <float[3] c = {1, 1, 2}> { a = Mul(x, c)  y = Neg(a) }",
    ],
    ids=["by two", "by an input", "a sum", "of one", "the graph's output", "a dimension more", "by a vector"],
)
def test_all_others_stay(graph: str) -> None:
    small = model(graph)
    before = operators(small)
    drop_units(small.graph)
    assert operators(small) == before
