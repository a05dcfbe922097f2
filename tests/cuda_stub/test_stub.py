"""The stub itself: copies are real, a capture forbids what CUDA forbids, and what is not known is refused."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import pytest

from tests.cuda_stub.log import Kind, library, memory, of, recorded

DEFAULT, GLOBAL = 4, 0
UNSUPPORTED, INVALIDATED = 900, 901


class Gpu:
    """The runtime's functions, with pointers out in place of pointers to them."""

    def __init__(self) -> None:
        self.library = library()

    def made(self, name: str, *arguments: Any) -> int:
        out = ctypes.c_void_p()
        assert getattr(self.library, name)(ctypes.byref(out), *arguments) == 0
        assert out.value
        return out.value

    def call(self, name: str, *arguments: Any) -> int:
        return int(getattr(self.library, name)(*(ctypes.c_void_p(a) for a in arguments)))

    def copied(self, to: int, source: int, size_bytes: int, stream: int) -> None:
        assert self.call("cudaMemcpyAsync", to, source, size_bytes, DEFAULT, stream) == 0


@pytest.fixture
def gpu() -> Gpu:
    return Gpu()


def test_memory_is_the_host_s(gpu: Gpu) -> None:
    host = np.arange(64, dtype=np.uint8)
    address = gpu.made("cudaMalloc", ctypes.c_size_t(64))
    assert memory(address + 63) == ("device", address, address + 64)
    assert memory(host.ctypes.data)[0] == "host"
    assert memory(gpu.made("cudaMallocHost", ctypes.c_size_t(8)))[0] == "pinned"
    with recorded() as events:
        assert gpu.call("cudaMemcpy", address, host.ctypes.data, 64, DEFAULT) == 0
    np.testing.assert_array_equal(np.ctypeslib.as_array((ctypes.c_uint8 * 64).from_address(address)), host)
    assert [(e.kind, e.address, e.source, e.size_bytes) for e in events] == [(Kind.COPY, address, host.ctypes.data, 64)]
    assert gpu.call("cudaFree", address) == 0
    assert memory(address)[0] == "host"
    assert gpu.call("cudaFree", address) == 1


def test_a_replay_copies_again(gpu: Gpu) -> None:
    source, target = (gpu.made("cudaMalloc", ctypes.c_size_t(4)) for _ in range(2))
    stream = gpu.made("cudaStreamCreate")
    assert gpu.call("cudaStreamBeginCapture", stream, GLOBAL) == 0
    gpu.copied(target, source, 4, stream)
    graph = ended(gpu, stream)
    instance = gpu.made("cudaGraphInstantiate", ctypes.c_void_p(graph), ctypes.c_ulonglong(0))
    for value in (3, 5):
        ctypes.memset(source, value, 4)
        assert ctypes.string_at(target, 4) != bytes([value] * 4)
        with recorded() as events:
            assert gpu.call("cudaGraphLaunch", instance, stream) == 0
        assert ctypes.string_at(target, 4) == bytes([value] * 4)
        assert [(event.kind, event.size_bytes) for event in events] == [(Kind.REPLAY, 1)]


def ended(gpu: Gpu, stream: int) -> int:
    """The graph of a capture that ends well."""
    graph = ctypes.c_void_p()
    assert gpu.library.cudaStreamEndCapture(ctypes.c_void_p(stream), ctypes.byref(graph)) == 0
    assert graph.value
    return graph.value


@pytest.mark.parametrize("forbidden", ["cudaDeviceSynchronize", "cudaMalloc", "cudaFree", "cudaMemcpy"])
def test_what_breaks_a_capture(gpu: Gpu, forbidden: str) -> None:
    """In the mode that ONNX Runtime captures in."""
    address = gpu.made("cudaMalloc", ctypes.c_size_t(8))
    out = ctypes.c_void_p()
    arguments = {
        "cudaDeviceSynchronize": (),
        "cudaMalloc": (ctypes.addressof(out), 8),
        "cudaFree": (address,),
        "cudaMemcpy": (address, address, 8, DEFAULT),
    }[forbidden]
    stream = gpu.made("cudaStreamCreate")
    graph = ctypes.c_void_p()
    assert gpu.call("cudaStreamBeginCapture", stream, GLOBAL) == 0
    with recorded() as events:
        assert gpu.call(forbidden, *arguments) == UNSUPPORTED
    assert [(event.kind, event.name) for event in events] == [(Kind.BROKEN, forbidden)]
    assert gpu.call("cudaMemcpyAsync", address, address, 8, DEFAULT, stream) == INVALIDATED
    assert gpu.library.cudaStreamEndCapture(ctypes.c_void_p(stream), ctypes.byref(graph)) == INVALIDATED
    assert not graph.value
    assert gpu.call("cudaDeviceSynchronize") == 0


def test_what_is_not_known_is_refused(gpu: Gpu, capfd: pytest.CaptureFixture[str]) -> None:
    value = ctypes.c_int()
    with recorded() as events:
        for _ in range(2):
            assert gpu.library.cudaDeviceGetAttribute(ctypes.byref(value), 9999, 0) == 801
        assert gpu.library.cudaMemPoolCreate(None, None) == 801
    assert [event.name for event in of(events, Kind.REFUSED)] == [
        *["cudaDeviceGetAttribute 9999"] * 2,
        "cudaMemPoolCreate",
    ]
    assert capfd.readouterr().err.count("cudaDeviceGetAttribute 9999 is not answered") == 1


def test_there_is_one_gpu_of_hopper_s_kind(gpu: Gpu) -> None:
    value = ctypes.c_int()
    got = []
    for attribute in (75, 76, 16):
        assert gpu.library.cudaDeviceGetAttribute(ctypes.byref(value), attribute, 0) == 0
        got.append(value.value)
    assert got == [9, 0, 132]
    assert gpu.library.cudaGetDeviceCount(ctypes.byref(value)) == 0
    assert (value.value, gpu.library.cudaSetDevice(1)) == (1, 101)
