"""Buffers in host memory: what engines that are given addresses rely on. The rest is in test_every_engine.py."""

from __future__ import annotations

import numpy as np
import pytest

from tgate_engine.dtypes import DTYPES
from tgate_runtime.engines.host import CpuBuffer


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", [(1,), (7, 3), ()])
def test_the_array_is_the_memory(dtype: str, shape: tuple[int, ...]) -> None:
    buffer = CpuBuffer.zeros(shape, dtype)
    assert buffer.address == buffer.array.ctypes.data
    assert buffer.address % 64 == 0
    assert buffer.array.flags.c_contiguous
    buffer.array[...] = 1
    assert (buffer.read() == 1).all()


def test_the_array_of_a_view_is_the_same_memory() -> None:
    buffer = CpuBuffer.zeros((5, 3), "float32")
    view = buffer.rows(2, 2)
    assert np.shares_memory(view.array, buffer.array)
    assert view.array.flags.c_contiguous
    assert view.address == view.array.ctypes.data == buffer.address + 2 * 3 * 4


def test_rows_that_overlap_are_copied_as_they_were() -> None:
    buffer = CpuBuffer.zeros((4, 1), "int64")
    buffer.write(np.arange(4).reshape(4, 1))
    buffer.rows(1, 3).copy(buffer.rows(0, 3))
    assert buffer.read().ravel().tolist() == [0, 0, 1, 2]
