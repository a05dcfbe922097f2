"""What is added before a group normalization is taken into it; whoever reads the sum still gets it."""

from __future__ import annotations

import onnx
import pytest

from tests.runtime.engines.ort_cuda.lowering.small import Edits, lowered, small
from tgate_runtime.engines.ort_cuda.lowering import lower

# The second half of a residual block, whose picture comes and goes with its channels last.
BLOCK = """(float[n, 3, 5, 8] x, float[n, 3, 5, 8] z, float[n, 8] e) => (float[n, 3, 5, 8] y)
    <float[8] scale = {1, 2, 3, 4, 5, 6, 7, 8}, float[8] shift = {8, 7, 6, 5, 4, 3, 2, 1}, int64[2] places = {2, 3}>
    {
        a = Transpose<perm = [0, 3, 1, 2]>(x)  b = Transpose<perm = [0, 3, 1, 2]>(z)
        s = Add(a, b)  g = GroupNormalization<num_groups = 2>(s, scale, shift)
        y = Transpose<perm = [0, 2, 3, 1]>(g)
    }"""
TIME: Edits = (("s = Add(a, b)", "w = Unsqueeze(e, places)  s = Add(w, a)"),)


@pytest.mark.parametrize(
    ("edits", "operators"),
    [
        ((), ["SkipGroupNorm"]),
        (TIME, ["Unsqueeze", "Reshape", "SkipGroupNorm"]),
        ((("(g)", "(h)"), ("shift)", "shift)  h = Mul(g, s)")), ["SkipGroupNorm", "Mul"]),
        ((("s = Add(a, b)", "s = Sub(a, b)"),), ["Sub", "GroupNorm"]),
    ],
    ids=["a way around", "the time", "sum read again", "no sum"],
)
def test_sums_go_into_the_normalization(edits: Edits, operators: list[str]) -> None:
    assert lowered(small(BLOCK, edits)) == operators


def test_a_number_for_all_pictures_is_added_before() -> None:
    text = BLOCK.replace("int64[2] places", "float[1, 8, 1, 1] all = {1, 2, 3, 4, 5, 6, 7, 9}, int64[2] places")
    assert lowered(small(text, (("Add(a, b)", "Add(a, all)"),))) == ["Reshape", "Add", "GroupNorm"]


# Both halves of a residual block: the first convolution's bias, and the second's, go along.
CONVOLUTIONS = """(float[n, 2, 3, 5] x, float[n, 8] e) => (float[n, 8, 3, 5] y)
    <float[8] scale = {1, 2, 3, 4, 5, 6, 7, 8}, float[8] shift = {8, 7, 6, 5, 4, 3, 2, 1}, int64[2] places = {2, 3},
    float[8, 2, 1, 1] w = {1, -1, 2, -2, 3, -3, 4, -4, 5, -5, 6, -6, 7, -7, 8, -8},
    float[8] c = {1, 2, 3, 4, 5, 6, 7, 8}>
    {
        a = Conv(x, w, c)  b = Unsqueeze(e, places)  s = Add(a, b)
        g = GroupNormalization<num_groups = 2>(s, scale, shift)  y = Neg(g)
    }"""


@pytest.mark.parametrize(
    ("edits", "biases", "there"),
    [((), 1, False), ((("(x, w, c)", "(x, w)"),), 0, False), ((("y = Neg(g)", "y = Sub(g, a)"),), 0, True)],
    ids=["its own", "none", "read again"],
)
def test_the_bias_of_a_convolution_goes_along(edits: Edits, biases: int, there: bool) -> None:
    data = small(CONVOLUTIONS, edits, half=True)
    assert "SkipGroupNorm" in lowered(data, 2e-3)
    nodes = {node.op_type: node for node in onnx.load_model_from_string(lower(data).data).graph.node}
    assert len(nodes["SkipGroupNorm"].input) == 4 + biases
    assert ("c" in nodes["NhwcConv"].input, "c" in nodes["SkipGroupNorm"].input) == (there, biases == 1)
