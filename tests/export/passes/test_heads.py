"""Attention takes merged heads where nothing else happens to them, and only there."""

from __future__ import annotations

import numpy as np
import pytest
from onnx_ir.passes.common import RemoveUnusedNodesPass

from tests.export.passes.small import by_reference, by_runtime, model, noise, operators, shape
from tgate_export.passes.heads import merge_heads

# As tracing writes it: 3 heads, 8 wide.
PLAIN = """(float[b, 5, 24] q, float[b, 7, 24] k, float[b, 7, 24] v) => (float[b, 5, 24] y)
    <int64[4] parts = {0, 0, 3, 8}, int64[3] whole = {0, 5, 24}>
    {
        q_parts = Reshape(q, parts)
        q_heads = Transpose<perm = [0, 2, 1, 3]>(q_parts)
        k_parts = Reshape(k, parts)
        k_heads = Transpose<perm = [0, 2, 1, 3]>(k_parts)
        v_parts = Reshape(v, parts)
        v_heads = Transpose<perm = [0, 2, 1, 3]>(v_parts)
        a_heads = Attention(q_heads, k_heads, v_heads)
        a_parts = Transpose<perm = [0, 2, 1, 3]>(a_heads)
        a = Reshape(a_parts, whole)
        y = Neg(a)
    }"""
SIZES = {"q": (2, 5, 24), "k": (2, 7, 24), "v": (2, 7, 24)}


def edited(*edits: tuple[str, str]) -> str:
    """PLAIN, with the second text of each edit in place of the first."""
    graph = PLAIN
    for old, new in edits:
        assert graph.count(old) == 1, old
        graph = graph.replace(old, new)
    return graph


WITH_MASK = edited(
    ("24] v)", "24] v, float[b, 1, 5, 7] mask)"),
    ("Attention(q_heads, k_heads, v_heads)", "Attention<scale = 0.5>(q_heads, k_heads, v_heads, mask)"),
)
# One head of keys and values for all of the queries', and the values half as wide.
SHARED = edited(
    ("[b, 7, 24] k", "[b, 7, 8] k"),
    ("[b, 7, 24] v", "[b, 7, 4] v"),
    ("5, 24] y", "5, 12] y"),
    ("{0, 5, 24}", "{0, 5, 12}, int64[4] ks = {0, 0, 1, 8}, int64[4] vs = {0, 0, 1, 4}"),
    ("(k, parts)", "(k, ks)"),
    ("(v, parts)", "(v, vs)"),
)


@pytest.mark.parametrize(
    ("graph", "sizes", "heads"),
    [
        (PLAIN, SIZES, (3, 3)),
        (WITH_MASK, SIZES | {"mask": (2, 1, 5, 7)}, (3, 3)),
        (SHARED, SIZES | {"k": (2, 7, 8), "v": (2, 7, 4)}, (3, 1)),
    ],
    ids=["plain", "with a mask and a scale", "shared keys"],
)
def test_heads_are_merged(graph: str, sizes: dict[str, tuple[int, ...]], heads: tuple[int, int]) -> None:
    small, inputs = model(graph), noise(**sizes)
    before = by_reference(small, inputs)
    merge_heads(small.graph)
    RemoveUnusedNodesPass()(small)
    assert operators(small) == ["Attention", "Neg"]
    attention = small.graph.node(0)
    assert list(attention.inputs) == list(small.graph.inputs)
    assert shape(attention.outputs[0]) == shape(small.graph.outputs[0])
    assert tuple(attention.attributes[name].as_int() for name in ("q_num_heads", "kv_num_heads")) == heads
    assert np.abs(by_runtime(small, inputs) - before).max() < 1e-6


@pytest.mark.parametrize(
    "edits",
    [
        pytest.param(
            [("a_heads = Attention(q_heads", "turned = Neg(q_heads)  a_heads = Attention(turned")], id="turned queries"
        ),
        pytest.param(
            [
                ("[b, 5, 24] q", "[b, 10, 12] q"),
                ("(q, parts)", "(q, five)"),
                ("{0, 5, 24}", "{0, 5, 24}, int64[4] five = {0, 5, 3, 8}"),
            ],
            id="heads of two rows",
        ),
        pytest.param(
            [
                ("(v, parts)", "(v, heads)"),
                ("v_heads = Transpose<perm = [0, 2, 1, 3]>", "v_heads = Transpose<perm = [0, 1, 2, 3]>"),
                ("{0, 5, 24}", "{0, 5, 24}, int64[4] heads = {0, 3, 7, 8}"),
            ],
            id="another permutation before",
        ),
        pytest.param(
            [("a_parts = Transpose<perm = [0, 2, 1, 3]>", "a_parts = Transpose<perm = [0, 1, 2, 3]>")],
            id="another permutation after",
        ),
        pytest.param([("{0, 5, 24}", "{0, 15, 8}"), ("5, 24] y", "15, 8] y")], id="merged to rows"),
        pytest.param([("{0, 5, 24}", "{1, -1, 24}"), ("[b, 5, 24] y", "[one, rows, 24] y")], id="merged over images"),
        pytest.param([("a_heads = Attention", "a_heads, past_k, past_v = Attention")], id="keys for later"),
        pytest.param([("y = Neg(a)", "s = ReduceMax<keepdims = 0>(a_heads)  y = Add(a, s)")], id="heads read again"),
        pytest.param([("y = Neg(a)", "s = ReduceMax<keepdims = 0>(a_parts)  y = Add(a, s)")], id="parts read again"),
        pytest.param([("a = Reshape", "y = Reshape"), ("y = Neg(a)", "")], id="the graph's output"),
    ],
)
def test_all_others_stay(edits: list[tuple[str, str]]) -> None:
    small = model(edited(*edits))
    inputs = noise(**SIZES | {"q": (2, *(int(str(dim)) for dim in shape(small.graph.inputs[0])[1:]))})
    before, nodes = by_reference(small, inputs), operators(small)
    merge_heads(small.graph)
    assert operators(small) == nodes
    assert np.abs(by_runtime(small, inputs) - before).max() < 1e-6
