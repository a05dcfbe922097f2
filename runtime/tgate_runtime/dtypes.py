"""How a manifest's dtypes lie in host memory. NumPy has no bfloat16, so its bits are carried as uint16."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_STORAGE: dict[str, type[np.generic]] = {
    "float32": np.float32,
    "float16": np.float16,
    "bfloat16": np.uint16,
    "int64": np.int64,
    "uint8": np.uint8,
}


def storage(dtype: str) -> np.dtype[Any]:
    """The NumPy dtype whose bits hold ``dtype``."""
    return np.dtype(_STORAGE[dtype])


def encode(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Numbers as ``dtype``, in its storage dtype; rounded to the nearest, ties to even.

    ``values`` hold numbers (not bfloat16 bits). Not copied where nothing changes.
    """
    if dtype != "bfloat16":
        return np.asarray(values, storage(dtype))
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    nan = np.isnan(values)
    return np.where(nan, np.uint16(0x7FC0), rounded.astype(np.uint16))


def decode(stored: NDArray[Any], dtype: str) -> NDArray[np.float32]:
    """What ``stored``, in the storage dtype of ``dtype``, means, as float32."""
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return stored.astype(np.float32)
