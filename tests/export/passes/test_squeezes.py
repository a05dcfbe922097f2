"""Squeezes that PyTorch ignores, and ONNX refuses, are dropped; real ones stay."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from tests.export.passes.small import by_reference, by_runtime, model, noise, operators
from tgate_export.passes.squeezes import drop_vain_squeezes


@pytest.mark.parametrize("axis", [1, -2])
def test_a_squeeze_of_more_than_one_is_dropped(axis: int) -> None:
    graph = (
        f"(float[2, 3, 1] x) => (float[2, 3, 1] y) <int64[1] axis = {{{axis}}}> {{ a = Squeeze(x, axis)  y = Neg(a) }}"
    )
    small, inputs = model(graph), noise(x=(2, 3, 1))
    with pytest.raises(Fail, match="must be 1 instead of 3"):
        by_runtime(small, inputs)
    drop_vain_squeezes(small.graph)
    assert operators(small) == ["Neg"]
    assert np.array_equal(by_runtime(small, inputs), -torch.from_numpy(inputs["x"]).squeeze(axis).numpy())


@pytest.mark.parametrize(
    ("graph", "size"),
    [
        ("(float[2, 1] x) => (float[2] y) <int64[1] axis = {1}> { a = Squeeze(x, axis)  y = Neg(a) }", (2, 1)),
        ("(float[2, n] x) => (float[2] y) <int64[1] axis = {1}> { a = Squeeze(x, axis)  y = Neg(a) }", (2, 1)),
        ("(float[1, 1] x) => (float y) <int64[2] axes = {0, 1}> { a = Squeeze(x, axes)  y = Neg(a) }", (1, 1)),
        ("(float[2, 1] x) => (float[2] y) { a = Squeeze(x)  y = Neg(a) }", (2, 1)),
    ],
    ids=["of one", "of an unknown size", "of two dimensions", "of whatever is one"],
)
def test_a_squeeze_that_does_something_stays(graph: str, size: tuple[int, ...]) -> None:
    small, inputs = model(graph), noise(x=size)
    drop_vain_squeezes(small.graph)
    assert operators(small) == ["Squeeze", "Neg"]
    assert np.array_equal(by_reference(small, inputs), -inputs["x"].squeeze())


@pytest.mark.parametrize(
    "graph",
    [
        "(float[2, 3] x) => (float[2, 3] y) <int64[1] axis = {1}> { y = Squeeze(x, axis) }",
        "(float[3, 1] x) => (float[n] y) <int64[2] axes = {0, 1}> { a = Squeeze(x, axes)  y = Neg(a) }",
        "(float[2, 3] x, int64[1] axis) => (float[n] y) { a = Squeeze(x, axis)  y = Neg(a) }",
    ],
    ids=["the graph's output", "one dimension of two in vain", "told by an input"],
)
def test_a_squeeze_that_cannot_be_dropped_stays(graph: str) -> None:
    small = model(graph)
    before = operators(small)
    drop_vain_squeezes(small.graph)
    assert operators(small) == before
