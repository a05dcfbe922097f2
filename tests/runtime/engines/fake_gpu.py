"""A CUDA runtime of host memory, for :mod:`tgate_runtime.engines.tensorrt`: what is queued runs at once, or is recorded
while its stream is captured."""

from __future__ import annotations

import ctypes
import gc
from typing import Any

import numpy as np

ALIGNMENT_BYTES = 256


class FakeGpu:
    """Its methods stand for functions of the CUDA runtime: error number first, then the result.

    ``memory``: what is allocated, by address; it is never zero by itself. ``launches``: of recorded graphs.
    """

    def __init__(self) -> None:
        self.memory: dict[int, Any] = {}
        self.launches = 0
        self._capturing: list[Any] | None = None

    def queue(self, work: Any) -> None:
        if self._capturing is None:
            work()
        else:
            assert not gc.isenabled()  # a buffer collected now would be freed within the capture, which ends it
            self._capturing.append(work)

    def install(self, monkeypatch: Any, runtime: Any) -> None:
        """Take the place of the CUDA runtime's functions."""

        def done(*_: Any) -> tuple[int]:
            return (0,)

        calls = {
            "cudaGetDeviceCount": lambda: (0, 1),
            "cudaMalloc": self._malloc,
            "cudaFree": self._free,
            "cudaMemsetAsync": self._memset,
            "cudaMemcpyAsync": self._memcpy,
            "cudaStreamCreateWithFlags": lambda _flags: (0, 7),
            "cudaStreamBeginCapture": self._begin,
            "cudaStreamEndCapture": self._end,
            "cudaGraphInstantiate": lambda graph, _flags: (0, graph),
            "cudaGraphLaunch": self._launch,
        }
        ignored = (
            "cudaSetDevice",
            "cudaStreamSynchronize",
            "cudaStreamDestroy",
            "cudaGraphDestroy",
            "cudaGraphExecDestroy",
        )
        for name, stand_in in (*calls.items(), *((name, done) for name in ignored)):
            monkeypatch.setattr(runtime, name, stand_in)

    def _malloc(self, size_bytes: int) -> tuple[int, int]:
        block = np.full(size_bytes + ALIGNMENT_BYTES, 0xAB, np.uint8)
        address = -(-block.ctypes.data // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        self.memory[address] = block
        return 0, address

    def _free(self, address: int) -> tuple[int]:
        del self.memory[address]
        return (0,)

    def _memset(self, to: int, value: int, size_bytes: int, _stream: int) -> tuple[int]:
        self.queue(lambda: ctypes.memset(to, value, size_bytes))
        return (0,)

    def _memcpy(self, to: int, source: int, size_bytes: int, _kind: Any, _stream: int) -> tuple[int]:
        self.queue(lambda: ctypes.memmove(to, source, size_bytes))
        return (0,)

    def _begin(self, *_: Any) -> tuple[int]:
        self._capturing = []
        return (0,)

    def _end(self, _stream: int) -> tuple[int, Any]:
        recorded, self._capturing = self._capturing, None
        return 0, recorded

    def _launch(self, recorded: Any, _stream: int) -> tuple[int]:
        self.launches += 1
        for work in recorded:
            work()
        return (0,)
