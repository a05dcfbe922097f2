"""Buffers in host memory, for every engine that computes there."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tgate_engine.dtypes import storage
from tgate_engine.errors import EngineError
from tgate_runtime.engines.protocol import Buffer, fitted, matched, row_shape

_ALIGNMENT_BYTES = 64  # a cache line, and the widest vector register


class CpuBuffer:
    """A :class:`~tgate_runtime.engines.protocol.Buffer` in host memory.

    ``array`` is the memory itself, in the storage dtype, not a copy: what it shows changes with every call
    that writes the buffer. A buffer begins at a multiple of 64 bytes, a view of its rows wherever they do.
    """

    def __init__(self, array: NDArray[Any], dtype: str) -> None:
        """``array``: contiguous, of the storage dtype of ``dtype``."""
        self.array = array
        self.dtype = dtype
        self.shape: tuple[int, ...] = array.shape
        self.address = int(array.ctypes.data)

    @staticmethod
    def zeros(shape: tuple[int, ...], dtype: str) -> CpuBuffer:
        """A buffer with memory of its own. Raises :class:`EngineError` where there is not so much."""
        kind = storage(dtype)
        size_bytes = math.prod(shape) * kind.itemsize
        try:
            memory = np.zeros(size_bytes + _ALIGNMENT_BYTES, np.uint8)
        except (MemoryError, ValueError):  # ValueError: more than an address can reach
            raise EngineError(
                f"there is no memory for {size_bytes} bytes, a buffer of {dtype} {list(shape)}; ask for fewer images "
                "at once, or a smaller size"
            ) from None
        start = -memory.ctypes.data % _ALIGNMENT_BYTES
        return CpuBuffer(memory[start : start + size_bytes].view(kind).reshape(shape), dtype)

    def rows(self, first: int, count: int) -> CpuBuffer:
        row_shape(self.shape, first, count)
        return CpuBuffer(self.array[first : first + count], self.dtype)

    def write(self, array: NDArray[Any]) -> None:
        np.copyto(self.array, fitted(array, self.shape, self.dtype))

    def read(self) -> NDArray[Any]:
        return self.array.copy()

    def copy(self, source: Buffer) -> None:
        np.copyto(self.array, matched(source, self).array)
