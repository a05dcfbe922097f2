"""Masks with one row for all queries are widened, others are not."""

from __future__ import annotations

import numpy as np
import pytest
from onnxruntime.capi.onnxruntime_pybind11_state import Fail

from tests.export.passes.small import by_reference, by_runtime, model, noise, operators, shape
from tgate_export.passes.masks import widen_masks

SPLIT = """(float[2, 3, 5, 8] q, float[2, 3, 7, 8] k, float[2, 3, 7, 8] v, float[2, 1, 1, 7] mask)
    => (float[2, 3, 5, 8] y) { y = Attention(q, k, v, mask) }"""
MERGED = """(float[2, 5, 24] q, float[2, 7, 24] k, float[2, 7, 24] v, float[2, 3, 1, 7] mask)
    => (float[2, 5, 24] y) { y = Attention<q_num_heads = 3, kv_num_heads = 3>(q, k, v, mask) }"""
SIZES = {"q": (2, 3, 5, 8), "k": (2, 3, 7, 8), "v": (2, 3, 7, 8)}


@pytest.mark.parametrize(
    ("graph", "sizes"),
    [
        (SPLIT, SIZES | {"mask": (2, 1, 1, 7)}),
        (MERGED, {"q": (2, 5, 24), "k": (2, 7, 24), "v": (2, 7, 24), "mask": (2, 3, 1, 7)}),
    ],
    ids=["heads split", "heads merged"],
)
def test_a_mask_of_one_row_gets_a_row_for_each_query(graph: str, sizes: dict[str, tuple[int, ...]]) -> None:
    small, inputs = model(graph), noise(**sizes)
    before = by_reference(small, inputs)
    with pytest.raises(Fail, match="inconsistent q_sequence_length"):
        by_runtime(small, inputs)
    widen_masks(small.graph)
    assert operators(small) == ["Expand", "Attention"]
    assert shape(small.graph.node(0).outputs[0]) == [2, sizes["mask"][1], 5, 7]
    assert np.abs(by_runtime(small, inputs) - before).max() < 1e-6


def test_layers_may_share_a_mask() -> None:
    """Neither node has a name, as in files that name values alone."""
    small = model(
        """(float[2, 3, 5, 8] q, float[2, 3, 7, 8] k, float[2, 3, 7, 8] v, float[2, 1, 1, 7] mask)
        => (float[2, 3, 5, 8] y) { a = Attention(q, k, v, mask)  y = Attention(a, k, v, mask) }"""
    )
    inputs = noise(**SIZES, mask=(2, 1, 1, 7))
    before = by_reference(small, inputs)
    widen_masks(small.graph)
    assert operators(small) == ["Expand", "Attention", "Expand", "Attention"]
    assert np.abs(by_runtime(small, inputs) - before).max() < 1e-6


@pytest.mark.parametrize(
    ("queries", "mask"),
    [("5", (2, 1, 5, 7)), ("1", (2, 1, 1, 7)), ("5", (5, 7))],
    ids=["a row for each", "one query", "a mask for all"],
)
def test_all_others_stay(queries: str, mask: tuple[int, ...]) -> None:
    small = model(
        f"""(float[2, 3, {queries}, 8] q, float[2, 3, 7, 8] k, float[2, 3, 7, 8] v, float{list(mask)} mask)
        => (float[2, 3, {queries}, 8] y) {{ y = Attention(q, k, v, mask) }}"""
    )
    inputs = noise(**SIZES | {"q": (2, 3, int(queries), 8), "mask": mask})
    before = by_reference(small, inputs)
    widen_masks(small.graph)
    assert operators(small) == ["Attention"]
    assert np.abs(by_runtime(small, inputs) - before).max() < 1e-6


@pytest.mark.parametrize(
    ("inputs", "mask"),
    [("", ""), (", float[1, 7] mask", ", mask"), (", float[n, 1, 7] mask", ", mask")],
    ids=["no mask", "two dimensions", "three dimensions"],
)
def test_what_is_no_mask_of_four_dimensions_stays(inputs: str, mask: str) -> None:
    small = model(
        f"""(float[2, 3, 5, 8] q, float[2, 3, 7, 8] k, float[2, 3, 7, 8] v{inputs})
        => (float[2, 3, 5, 8] y) {{ y = Attention(q, k, v{mask}) }}"""
    )
    widen_masks(small.graph)
    assert operators(small) == ["Attention"]
