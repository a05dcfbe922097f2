"""What is added before a group normalization is taken into it; whoever reads the sum still gets it."""

from __future__ import annotations

import pytest

from tests.runtime.engines.ort_cuda.lowering.small import Edits, lowered, small

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
