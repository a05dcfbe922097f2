"""Buffers in host memory, for every engine that computes there."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tgate_runtime.backends import fitted
from tgate_runtime.dtypes import storage

_ALIGNMENT_BYTES = 64  # a cache line, and the widest vector register


class CpuBuffer:
    """A :class:`~tgate_runtime.backends.Buffer` in host memory.

    ``array`` is the memory itself, in the storage dtype, not a copy: what it shows changes with every call
    that writes the buffer.
    """

    def __init__(self, shape: tuple[int, ...], dtype: str) -> None:
        kind = storage(dtype)
        size_bytes = math.prod(shape) * kind.itemsize
        memory = np.zeros(size_bytes + _ALIGNMENT_BYTES, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT_BYTES
        self.array: NDArray[Any] = memory[start : start + size_bytes].view(kind).reshape(shape)
        self.shape = shape
        self.dtype = dtype
        self.address = int(self.array.ctypes.data)

    def write(self, array: NDArray[Any]) -> None:
        np.copyto(self.array, fitted(array, self.shape, self.dtype))

    def read(self) -> NDArray[Any]:
        return self.array.copy()
