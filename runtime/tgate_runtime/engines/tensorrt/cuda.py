"""Memory, streams and graphs of one NVIDIA GPU, through the CUDA runtime and without torch.

Nothing here has run on a GPU yet: it was written from the documentation, and tested as far as a host without one goes.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tgate_engine.errors import EngineError
from tgate_runtime.backends import fitted
from tgate_runtime.dtypes import storage

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


class DeviceBuffer:
    """A :class:`~tgate_runtime.backends.Buffer` in the memory of a GPU: zeros at first, freed with this object."""

    def __init__(self, shape: tuple[int, ...], dtype: str, device: int) -> None:
        self.shape = shape
        self.dtype = dtype
        self.address = 0
        self._device = device
        self._kind = storage(dtype)
        self.size_bytes = math.prod(shape) * self._kind.itemsize
        use_device(device)
        self.address = int(check(cuda.cudaMalloc, max(self.size_bytes, 1)))
        check(cuda.cudaMemsetAsync, self.address, 0, self.size_bytes, _COPIES)
        check(cuda.cudaStreamSynchronize, _COPIES)

    def write(self, array: NDArray[Any]) -> None:
        self.upload(np.ascontiguousarray(fitted(array, self.shape, self.dtype)), 0)

    def upload(self, array: NDArray[Any], offset_bytes: int) -> None:
        """Copy the bytes of a contiguous ``array`` to ``offset_bytes`` in; they must fit."""
        self._copy(self.address + offset_bytes, array.ctypes.data, array.nbytes, "cudaMemcpyHostToDevice")

    def read(self) -> NDArray[Any]:
        array = np.empty(self.shape, self._kind)
        self._copy(array.ctypes.data, self.address, array.nbytes, "cudaMemcpyDeviceToHost")
        return array

    def _copy(self, to: int, source: int, size_bytes: int, kind: str) -> None:
        use_device(self._device)
        check(cuda.cudaMemcpyAsync, to, source, size_bytes, getattr(cuda.cudaMemcpyKind, kind), _COPIES)
        check(cuda.cudaStreamSynchronize, _COPIES)

    def __del__(self) -> None:
        if getattr(self, "address", 0):
            with contextlib.suppress(Exception):  # the process may be going down
                cuda.cudaFree(self.address)


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
        # A buffer that the collector found now would be freed by this thread, which would end the capture.
        collecting = gc.isenabled()
        gc.disable()
        try:
            # Thread-local: other threads may allocate, copy and free meanwhile.
            check(cuda.cudaStreamBeginCapture, self.handle, cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal)
            try:
                enqueue()
            finally:  # a stream left capturing can do nothing else
                error, graph = cuda.cudaStreamEndCapture(self.handle)
        finally:
            if collecting:
                gc.enable()
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
