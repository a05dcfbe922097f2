"""The dtypes of a bundle, in one table: how each lies in host memory, in safetensors and in ONNX.

NumPy has no bfloat16, so its bits are carried as uint16.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Dtype:
    """``storage``: the NumPy type whose bits hold it. ``safetensors``: its tag there. ``onnx``: its number in
    ``onnx.TensorProto.DataType``. ``short``: what engines and the command line call it."""

    storage: type[np.generic]
    safetensors: str
    onnx: int
    short: str


DTYPES: Mapping[str, Dtype] = {
    "float32": Dtype(np.float32, "F32", 1, "f32"),
    "float16": Dtype(np.float16, "F16", 10, "f16"),
    "bfloat16": Dtype(np.uint16, "BF16", 16, "bf16"),
    "int64": Dtype(np.int64, "I64", 7, "i64"),
    "uint8": Dtype(np.uint8, "U8", 2, "u8"),
}
"""Every dtype that a manifest may name, by that name."""


def storage(dtype: str) -> np.dtype[Any]:
    """The NumPy dtype whose bits hold ``dtype``."""
    return np.dtype(DTYPES[dtype].storage)


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
