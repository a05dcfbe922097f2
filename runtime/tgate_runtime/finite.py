"""Numbers that are none, found where they come in or arise: else they end in a black picture."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from tgate_engine.dtypes import decode
from tgate_engine.errors import EngineError, RequestError

ADVICE = (
    "where the bundle or the engine computes in float16, which ends at 65504, export with --dtype bf16 or fp32, or "
    "draw with --precision f32; else ask `tgate verify` whether this engine draws this bundle right"
)


def not_finite(values: NDArray[Any], dtype: str = "float32") -> int:
    """How many of ``values``, in the storage dtype of ``dtype``, are infinite or no numbers."""
    numbers = decode(values, dtype) if dtype == "bfloat16" else values
    return int(numbers.size - np.isfinite(numbers).sum())


def check_given(values: NDArray[Any], what: str, *, dtype: str = "float32") -> None:
    """Raises :class:`RequestError` where numbers that a request brings are not finite as ``dtype``; ``what`` names
    them."""
    if count := not_finite(values, dtype):
        raise RequestError(f"{what} must be finite numbers in {dtype}; {count} of {values.size} are not finite")


def check_computed(values: NDArray[Any], what: str, *, dtype: str = "float32") -> None:
    """Raises :class:`EngineError` where numbers that a graph gave, stored as ``dtype``, are not finite; ``what`` names
    them."""
    if count := not_finite(values, dtype):
        raise EngineError(f"{what}: {count} of {values.size} values are not finite; {ADVICE}")
