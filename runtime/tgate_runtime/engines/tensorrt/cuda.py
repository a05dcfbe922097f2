"""Memory, streams and graphs of one NVIDIA GPU, through the CUDA runtime and without torch.

Nothing here has run on a GPU yet: it was written from the documentation, and tested as far as a host without one goes.
"""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tgate_engine.dtypes import storage
from tgate_engine.errors import EngineError
from tgate_engine.garbage import uncollected
from tgate_runtime.engines.protocol import Buffer, fitted, matched, row_shape

cuda: Any = importlib.import_module("cuda.bindings.runtime")

ALIGNMENT_BYTES = 256
"""What cudaMalloc gives and what TensorRT asks for."""

# Copies take the calling thread's own stream: a copy on the device's default stream would wait for every thread, and
# would break another thread's capture.
_COPIES = 2  # cudaStreamPerThread


def check(function: Callable[..., Any], *args: Any) -> Any:
    """Call the CUDA runtime; its one result, None or a tuple. Raises :class:`EngineError` with CUDA's own words."""
    error, *results = function(*args)
    if int(error):
        _, text = cuda.cudaGetErrorString(error)
        what = text.decode() if isinstance(text, bytes) else str(text)
        raise EngineError(f"CUDA failed in {getattr(function, '__name__', function)}: {what}")
    return results[0] if len(results) == 1 else tuple(results) or None


def gpu_count() -> int:
    """NVIDIA GPUs that this process can use; 0 where there is no driver either."""
    error, count = cuda.cudaGetDeviceCount()
    return 0 if int(error) else int(count)


def architecture(device: int) -> str:
    """Such as ``"sm_89"``."""
    names = (
        cuda.cudaDeviceAttr.cudaDevAttrComputeCapabilityMajor,
        cuda.cudaDeviceAttr.cudaDevAttrComputeCapabilityMinor,
    )
    return "sm_" + "".join(str(check(cuda.cudaDeviceGetAttribute, name, device)) for name in names)


def use_device(device: int) -> None:
    """Make that GPU the one that the calling thread works on."""
    check(cuda.cudaSetDevice, device)


def aligned(size_bytes: int) -> int:
    """``size_bytes``, rounded up to where the next tensor may start."""
    return -(-size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES


class DeviceMemory:
    """Bytes of a GPU: zeros at first, freed with this object."""

    def __init__(self, size_bytes: int, device: int) -> None:
        self.size_bytes = size_bytes
        self.device = device
        self.address = 0
        use_device(device)
        self.address = int(check(cuda.cudaMalloc, max(size_bytes, 1)))
        check(cuda.cudaMemsetAsync, self.address, 0, size_bytes, _COPIES)
        check(cuda.cudaStreamSynchronize, _COPIES)

    def upload(self, array: NDArray[Any], address: int) -> None:
        """Copy the bytes of a contiguous ``array`` to ``address``, which lies in this memory; they must fit."""
        self._copy(address, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")

    def download(self, array: NDArray[Any], address: int) -> None:
        """Fill a contiguous ``array`` with the bytes from ``address`` on."""
        self._copy(array.ctypes.data, address, array.nbytes, "cudaMemcpyDeviceToHost")

    def move(self, to: int, source: int, size_bytes: int) -> None:
        """Copy bytes of this GPU from one address to another."""
        self._copy(to, source, size_bytes, "cudaMemcpyDeviceToDevice")

    def _copy(self, to: int, source: int, size_bytes: int, kind: str) -> None:
        use_device(self.device)
        queue_copy(to, source, size_bytes, kind, _COPIES)
        check(cuda.cudaStreamSynchronize, _COPIES)

    def __del__(self) -> None:
        if getattr(self, "address", 0):
            with contextlib.suppress(Exception):  # the process may be going down
                cuda.cudaFree(self.address)


def queue_copy(to: int, source: int, size_bytes: int, kind: str, stream: int) -> None:
    """Queue a copy between two addresses; ``kind``: a name in ``cudaMemcpyKind``."""
    check(cuda.cudaMemcpyAsync, to, source, size_bytes, getattr(cuda.cudaMemcpyKind, kind), stream)


class DeviceBuffer:
    """A :class:`~tgate_runtime.engines.protocol.Buffer` in the memory of a GPU: a tensor from ``offset_bytes`` on.

    A buffer begins at a multiple of 256 bytes, a view of its rows wherever they do.
    """

    def __init__(self, memory: DeviceMemory, offset_bytes: int, shape: tuple[int, ...], dtype: str) -> None:
        self.shape = shape
        self.dtype = dtype
        self.address = memory.address + offset_bytes
        self.size_bytes = _size_bytes(shape, dtype)
        self._memory = memory
        self._offset_bytes = offset_bytes

    @staticmethod
    def zeros(shape: tuple[int, ...], dtype: str, device: int) -> DeviceBuffer:
        """A buffer with memory of its own."""
        return DeviceBuffer(DeviceMemory(_size_bytes(shape, dtype), device), 0, shape, dtype)

    def rows(self, first: int, count: int) -> DeviceBuffer:
        shape = row_shape(self.shape, first, count)
        skipped_bytes = first * (self.size_bytes // self.shape[0])
        return DeviceBuffer(self._memory, self._offset_bytes + skipped_bytes, shape, self.dtype)

    def write(self, array: NDArray[Any]) -> None:
        self._memory.upload(np.ascontiguousarray(fitted(array, self.shape, self.dtype)), self.address)

    def read(self) -> NDArray[Any]:
        array = np.empty(self.shape, storage(self.dtype))
        self._memory.download(array, self.address)
        return array

    def copy(self, source: Buffer) -> None:
        self._memory.move(self.address, matched(source, self).address, self.size_bytes)


def _size_bytes(shape: tuple[int, ...], dtype: str) -> int:
    return math.prod(shape) * storage(dtype).itemsize


class Stream:
    """A queue of work on one GPU, which waits for no other queue. Destroyed with this object."""

    def __init__(self, device: int) -> None:
        self.device = device
        use_device(device)
        self.handle = int(check(cuda.cudaStreamCreateWithFlags, cuda.cudaStreamNonBlocking))

    def synchronize(self) -> None:
        """Wait until all that was queued is done. Raises :class:`EngineError` where some of it failed."""
        check(cuda.cudaStreamSynchronize, self.handle)

    def capture(self, enqueue: Callable[[], None]) -> CudaGraph:
        """What ``enqueue`` queues on this stream, recorded and not run."""
        with uncollected():  # a buffer that was found now would be freed by this thread, which would end the capture
            # Thread-local: other threads may allocate, copy and free meanwhile.
            check(cuda.cudaStreamBeginCapture, self.handle, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
            try:
                enqueue()
            finally:  # a stream left capturing can do nothing else
                error, graph = cuda.cudaStreamEndCapture(self.handle)
        check(lambda: (error, graph))
        return CudaGraph(graph)

    def __del__(self) -> None:
        if getattr(self, "handle", 0):
            with contextlib.suppress(Exception):
                cuda.cudaStreamDestroy(self.handle)


class CudaGraph:
    """A recorded sequence of work at fixed addresses, which it does not keep alive."""

    def __init__(self, graph: Any) -> None:
        self._graph = None
        try:
            self._graph = check(cuda.cudaGraphInstantiate, graph, 0)
        finally:
            cuda.cudaGraphDestroy(graph)

    def launch(self, stream: Stream) -> None:
        """Queue all of it."""
        check(cuda.cudaGraphLaunch, self._graph, stream.handle)

    def __del__(self) -> None:
        if getattr(self, "_graph", None) is not None:
            with contextlib.suppress(Exception):
                cuda.cudaGraphExecDestroy(self._graph)
