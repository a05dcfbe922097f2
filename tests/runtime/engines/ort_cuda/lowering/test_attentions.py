"""Attention in 16 bits becomes the operator with the better kernels, where that takes it."""

from __future__ import annotations

import pytest

from tests.runtime.engines.ort_cuda.lowering.small import Edits, rewritten, small
from tgate_runtime.engines.ort_cuda.lowering.attentions import lower_attentions

CROSS = """(float[n, 5, 12] q, float[n, 3, 12] k, float[n, 3, 8] v) => (float[n, 5, 8] y)
    { y = Attention<q_num_heads = 4, kv_num_heads = 4>(q, k, v) }"""
MASKED: Edits = (("float[n, 3, 8] v)", "float[n, 3, 8] v, float[5, 3] m)"), ("(q, k, v)", "(q, k, v, m)"))


@pytest.mark.parametrize("edits", [(), (("heads = 4>", "heads = 4, scale = 0.5>"),)], ids=["plain", "scaled"])
def test_it_is_lowered(edits: Edits) -> None:
    assert rewritten(small(CROSS, edits, half=True), lower_attentions, 1e-3) == ["MultiHeadAttention"]


@pytest.mark.parametrize(
    ("edits", "half"),
    [
        ((), False),
        (MASKED, True),
        ((("heads = 4>", "heads = 4, is_causal = 1>"),), True),
        ((("heads = 4>", "heads = 4, softcap = 0.5>"),), True),
        (
            (("kv_num_heads = 4", "kv_num_heads = 2"), ("[n, 3, 12] k", "[n, 3, 6] k"), ("[n, 3, 8] v", "[n, 3, 4] v")),
            True,
        ),
    ],
    ids=["float32", "masked", "causal", "capped", "fewer heads of keys"],
)
def test_all_else_stays(edits: Edits, half: bool) -> None:
    assert rewritten(small(CROSS, edits, half=half), lower_attentions, 1e-3) == ["Attention"]
