"""Device memory of ONNX Runtime, and the one thread that works on the GPU.

There are two kinds of memory. What graphs work in while a call runs lies in one arena, which all sessions share: calls
run one after another, so that the process needs what the hungriest one does. A captured graph keeps its places there
for good and writes to them at each replay, whatever has them by then. So what has to last, buffers and weights, lies
elsewhere: :func:`lasting`. ONNX Runtime would give a buffer memory of the shared arena.

Views of some rows are addresses within a buffer, so what is copied to, from or between buffers goes by address, through
the CUDA runtime that ONNX Runtime has loaded. The tests have host memory in its place.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from tgate_engine.dtypes import DTYPES, storage
from tgate_runtime.engines.ort_cuda.log import failing
from tgate_runtime.engines.protocol import Buffer, fitted, matched, row_shape
from tgate_runtime.graph_check import ModelMessage

P = ParamSpec("P")
T = TypeVar("T")
_ANY_DIRECTION = 4  # cudaMemcpyDefault: the addresses tell
_THIS_THREAD = threading.local()
_ERRORS: deque[Exception] = deque()
"""Of work that nobody waited for. That thread's alone."""
_GPU = ThreadPoolExecutor(1, "ort-cuda", initializer=setattr, initargs=(_THIS_THREAD, "works_on_the_gpu", True))


def on_the_gpu(work: Callable[P, T]) -> Callable[P, T]:
    """Have the one thread that works on the GPU do ``work``; the caller waits, and gets its result or its exception, or
    that of what was :func:`queued` before."""

    @functools.wraps(work)
    def handed_over(*args: P.args, **kwargs: P.kwargs) -> T:
        if hasattr(_THIS_THREAD, "works_on_the_gpu"):
            return work(*args, **kwargs)
        return _GPU.submit(_after_all, functools.partial(work, *args, **kwargs)).result()

    return handed_over


def queued(work: Callable[[], None]) -> None:
    """Have that thread do ``work`` after what it has to do already, and do not wait: waking a thread, and being woken,
    takes longer than a copy. What it raises, whoever waits for that thread next gets."""
    if hasattr(_THIS_THREAD, "works_on_the_gpu"):
        work()
    else:
        _GPU.submit(_noting_errors, work)


def _after_all(work: Callable[[], T]) -> T:
    if _ERRORS:
        raise _ERRORS.popleft()
    return work()


def _noting_errors(work: Callable[[], None]) -> None:
    try:
        work()
    except Exception as error:
        _ERRORS.append(error)


def lasting(shape: tuple[int, ...], onnx_type: int, device: tuple[str, int]) -> ort.OrtValue:
    """Memory that no graph works in, for a tensor of that ``TensorProto.DataType``. On the GPU's thread."""
    if device[0] == "cpu":
        return ort.OrtValue.ortvalue_from_shape_and_type(shape, onnx_type, *device)
    return _keeper(device[1]).create_ortvalue_from_shape_and_type(shape, onnx_type, *device)


@functools.cache
def one_arena(device: tuple[str, int]) -> None:
    """Register the arena that sessions with ``session.use_env_allocators`` work in. On the GPU's thread."""
    kind, number = device
    if kind == "cuda":
        info = ort.OrtMemoryInfo("Cuda", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, number, ort.OrtMemType.DEFAULT)
        # Grow by what is asked for (1), not by powers of two; the other values are the engine's own choice.
        config = ort.OrtArenaCfg({"arena_extend_strategy": 1})
        ort.create_and_register_allocator_v2("CUDAExecutionProvider", info, {"device_id": str(number)}, config)


@functools.cache
def _keeper(number: int) -> ort.InferenceSession:
    """A session that runs nothing: lasting memory is of its own arena. Raises whatever ONNX Runtime does where CUDA or
    that GPU is not there."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    settings = {"device_id": str(number), "arena_extend_strategy": "kSameAsRequested"}
    session = ort.InferenceSession(
        _identity(), options, providers=[("CUDAExecutionProvider", settings), "CPUExecutionProvider"], enable_fallback=0
    )
    if "CUDAExecutionProvider" not in session.get_providers():
        raise RuntimeError("ONNX Runtime cannot load CUDA's provider")
    return session


def _identity() -> bytes:
    """A model of one node, which gives its one number back."""
    one = {"tensor_type": {"elem_type": 1, "shape": {"dim": [{"dim_value": 1}]}}}
    graph = {
        "name": "keeper",
        "node": [{"op_type": "Identity", "input": ["x"], "output": ["y"]}],
        "input": [{"name": "x", "type": one}],
        "output": [{"name": "y", "type": one}],
    }
    return bytes(ModelMessage(ir_version=10, opset_import=[{"version": 21}], graph=graph).SerializeToString())


@functools.cache
def _cuda_runtime() -> Any:
    """The CUDA runtime that ONNX Runtime has loaded: whoever loads it by its name gets the same."""
    library = ctypes.CDLL(f"libcudart.so.{ort.cuda_version.partition('.')[0]}")
    library.cudaGetErrorString.restype = ctypes.c_char_p
    return library


def _move(to: int, source: int, size_bytes: int, device: tuple[str, int]) -> None:
    """Copy bytes between two addresses, of the device or the host; done when this returns. On the GPU's thread."""
    kind, number = device
    if kind == "cpu":
        ctypes.memmove(to, source, size_bytes)
        return
    library = _cuda_runtime()
    for function, *arguments in (
        (library.cudaSetDevice, number),
        (library.cudaMemcpy, ctypes.c_void_p(to), ctypes.c_void_p(source), ctypes.c_size_t(size_bytes), _ANY_DIRECTION),
        # Copies within the device, and those out of memory that is not pinned, return before they are done; and ONNX
        # Runtime's own streams do not wait for this one.
        (library.cudaStreamSynchronize, None),
    ):
        if error := function(*arguments):
            raise RuntimeError(library.cudaGetErrorString(error).decode(errors="replace"))


class CudaBuffer:
    """A :class:`~tgate_runtime.engines.protocol.Buffer` in device memory: a tensor from ``address`` on, which lies in
    ``memory``. Nobody waits for a write or a copy; what the GPU's thread does later, a call or a read, comes after."""

    def __init__(
        self, memory: ort.OrtValue, address: int, shape: tuple[int, ...], dtype: str, device: tuple[str, int]
    ) -> None:
        self.address = address
        self.shape = shape
        self.dtype = dtype
        self.size_bytes = math.prod(shape) * storage(dtype).itemsize
        self._memory = memory
        self._device = device

    @staticmethod
    @on_the_gpu
    def zeros(shape: tuple[int, ...], dtype: str, device: tuple[str, int]) -> CudaBuffer:
        """A buffer with memory of its own."""
        with failing(f"ONNX Runtime gives no buffer of {dtype} {list(shape)}"):
            memory = lasting(shape, DTYPES[dtype].onnx, device)
            buffer = CudaBuffer(memory, int(memory.data_ptr()), shape, dtype, device)
        buffer.write(np.zeros((), storage(dtype)))
        return buffer

    def rows(self, first: int, count: int) -> CudaBuffer:
        shape = row_shape(self.shape, first, count)
        address = self.address + first * (self.size_bytes // self.shape[0])
        return CudaBuffer(self._memory, address, shape, self.dtype, self._device)

    def write(self, array: NDArray[Any]) -> None:
        own = np.array(fitted(array, self.shape, self.dtype), order="C")  # the caller may write to its own again
        queued(lambda: self._write(own))

    def _write(self, array: NDArray[Any]) -> None:
        with failing(f"CUDA cannot write a buffer of {self.dtype} {list(self.shape)}"):
            _move(self.address, array.ctypes.data, self.size_bytes, self._device)

    @on_the_gpu
    def read(self) -> NDArray[Any]:
        array = np.empty(self.shape, storage(self.dtype))
        with failing(f"CUDA cannot read a buffer of {self.dtype} {list(self.shape)}"):
            _move(array.ctypes.data, self.address, self.size_bytes, self._device)
        return array

    def copy(self, source: Buffer) -> None:
        own = matched(source, self)
        queued(lambda: self._copy(own))

    def _copy(self, source: CudaBuffer) -> None:
        with failing(f"CUDA cannot copy a buffer of {self.dtype} {list(self.shape)}"):
            _move(self.address, source.address, self.size_bytes, self._device)
