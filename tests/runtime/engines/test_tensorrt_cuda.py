"""Buffers in the memory of a GPU, with host memory in its place: that addresses, sizes and lifetimes are right."""

from __future__ import annotations

import gc

import numpy as np
import pytest

from tests.runtime.engines.fake_gpu import FakeGpu
from tgate_engine.dtypes import DTYPES, storage
from tgate_engine.errors import EngineError
from tgate_runtime.engines.host import CpuBuffer

pytest.importorskip("cuda.bindings")

from tgate_runtime.engines.tensorrt import cuda
from tgate_runtime.engines.tensorrt.cuda import DeviceBuffer, DeviceMemory


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    fake = FakeGpu()
    fake.install(monkeypatch, cuda.cuda)
    return fake


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", [(1,), (3, 5), ()])
def test_a_buffer_is_aligned_zeroed_and_fixed(dtype: str, shape: tuple[int, ...]) -> None:
    buffer = DeviceBuffer.zeros(shape, dtype, 0)
    assert (buffer.shape, buffer.dtype, buffer.address % 256) == (shape, dtype, 0)
    assert not buffer.read().any()
    values = np.arange(1, 1 + np.prod(shape, dtype=int)).reshape(shape).astype(storage(dtype))
    buffer.write(values)
    np.testing.assert_array_equal(buffer.read(), values)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_rows_are_a_view(dtype: str) -> None:
    buffer = DeviceBuffer.zeros((5, 2, 3), dtype, 0)
    values = np.arange(30).reshape(5, 2, 3).astype(storage(dtype))
    buffer.write(values)
    view = buffer.rows(1, 3)
    inner = view.rows(1, 1)
    assert view.address == buffer.address + values[:1].nbytes
    assert inner.address == buffer.address + values[:2].nbytes
    np.testing.assert_array_equal(view.read(), values[1:4])
    inner.write(values[:1] + storage(dtype).type(50))
    values[2] = values[0] + 50
    np.testing.assert_array_equal(buffer.read(), values)
    with pytest.raises(EngineError, match=r"shape \(3, 2, 3\) has no 3 rows from row 1 on"):
        view.rows(1, 3)


@pytest.mark.usefixtures("gpu")
def test_a_copy_is_of_values() -> None:
    source, target = (DeviceBuffer.zeros((4, 3), "float32", 0) for _ in range(2))
    values = np.arange(12, dtype=np.float32).reshape(4, 3)
    source.write(values)
    target.rows(1, 2).copy(source.rows(2, 2))
    np.testing.assert_array_equal(target.read(), [[0] * 3, *values[2:], [0] * 3])
    with pytest.raises(EngineError, match=r"float32 \[4, 3\] takes no copy of one of float32 \[1, 3\]"):
        target.copy(source.rows(0, 1))
    with pytest.raises(EngineError, match="a DeviceBuffer takes no copy of a CpuBuffer"):
        target.copy(CpuBuffer.zeros((4, 3), "float32"))


def test_memory_lives_as_long_as_any_view_of_it(gpu: FakeGpu) -> None:
    buffer = DeviceBuffer.zeros((4, 3), "float32", 0)
    view = buffer.rows(1, 2).rows(1, 1)
    del buffer
    gc.collect()
    assert len(gpu.memory) == 1
    view.write(np.ones(1, np.float32))
    assert view.read().all()
    del view
    assert not gpu.memory


def test_what_cuda_says_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.cuda, "cudaSetDevice", lambda _: (0,))
    monkeypatch.setattr(cuda.cuda, "cudaMalloc", lambda _: (2, None))
    with pytest.raises(EngineError, match=r"^CUDA failed in .*: .*memory"):
        DeviceMemory(1 << 20, 0)
