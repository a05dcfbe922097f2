"""Numbers that are none are counted in every dtype there is, and told in one line."""

from __future__ import annotations

import numpy as np
import pytest

from tgate_engine.dtypes import DTYPES, encode
from tgate_engine.errors import EngineError, RequestError
from tgate_runtime.finite import check_computed, check_given, not_finite

ODD = np.array([0, 1.5, np.nan, -2.0, np.inf, -np.inf], np.float32)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_not_finite_is_counted(dtype: str) -> None:
    assert not_finite(encode(ODD, dtype), dtype) == 3
    assert not_finite(encode(ODD[:2], dtype), dtype) == 0


@pytest.mark.parametrize("dtype", [name for name in DTYPES if name in ("int64", "uint8")])
def test_whole_numbers_are_finite(dtype: str) -> None:
    assert not_finite(np.array([0, 255], DTYPES[dtype].storage), dtype) == 0


def test_bits_of_bfloat16_are_not_taken_for_numbers() -> None:
    bits = encode(np.array([np.inf], np.float32), "bfloat16")
    assert (not_finite(bits), not_finite(bits, "bfloat16")) == (0, 1)


def test_the_line_says_what_how_many_and_what_to_do() -> None:
    with pytest.raises(RequestError, match=r"^the embeddings' text must be finite numbers in float32; 3 of 6 are not"):
        check_given(ODD, "the embeddings' text")
    says = r"^the latents of image 2: 3 of 6 values are not finite; .*float16.*--dtype bf16 or fp32.*tgate verify"
    with pytest.raises(EngineError, match=says):
        check_computed(ODD, "the latents of image 2")
    check_given(ODD[:2], "x")
    check_computed(ODD[:2], "x")
