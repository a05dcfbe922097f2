"""ONNX Runtime on the CPU.

Buffers are NumPy memory; a graph reads and writes them by address through an I/O binding, so a step copies
nothing. An output that is not bound is computed into the engine's own arena and dropped after the call.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from tgate_engine.errors import EngineError
from tgate_engine.manifest import GraphSpec, TensorSpec
from tgate_runtime.dtypes import storage

_ALIGNMENT_BYTES = 64  # a cache line, and the widest vector register
_ELEMENT_TYPE = {
    "float32": 1,
    "uint8": 2,
    "int64": 7,
    "float16": 10,
    "bfloat16": 16,
}  # onnx.TensorProto.DataType
_TYPE_NAME = {
    "float32": "float",
    "uint8": "uint8",
    "int64": "int64",
    "float16": "float16",
    "bfloat16": "bfloat16",
}


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
        if array.dtype != self.array.dtype:
            raise EngineError(f"a buffer of {self.dtype} takes {self.array.dtype} arrays, got {array.dtype}")
        try:
            np.copyto(self.array, array)
        except ValueError:
            raise EngineError(f"a buffer of shape {self.shape} takes no array of shape {array.shape}") from None

    def read(self) -> NDArray[Any]:
        return self.array.copy()


class _OrtCall:
    """A :class:`~tgate_runtime.backends.Call`: one I/O binding, made once."""

    def __init__(
        self,
        graph: str,
        session: ort.InferenceSession,
        inputs: Mapping[str, CpuBuffer],
        outputs: Mapping[str, CpuBuffer],
    ) -> None:
        self._graph = graph
        self._session = session
        self._binding = session.io_binding()
        self._buffers = (
            *inputs.values(),
            *outputs.values(),
        )  # the engine holds addresses; this holds the memory
        self.addresses: dict[str, int] = {}
        for bind, buffers in ((self._binding.bind_input, inputs), (self._binding.bind_output, outputs)):
            for name, buffer in buffers.items():
                bind(name, "cpu", 0, _ELEMENT_TYPE[buffer.dtype], buffer.shape, buffer.address)
                self.addresses[name] = buffer.address

    def __call__(self) -> None:
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # the engine raises RuntimeError and a dozen classes of its own
            raise EngineError(f"graph {self._graph} failed in ONNX Runtime: {_first_line(error)}") from error


class OrtExecutable:
    """A :class:`~tgate_runtime.backends.Executable`: one ONNX Runtime session."""

    def __init__(self, graph: str, session: ort.InferenceSession, spec: GraphSpec) -> None:
        self._graph = graph
        self._session = session
        self._inputs = {tensor.name: tensor for tensor in spec.inputs}
        self._outputs = {tensor.name: tensor for tensor in spec.outputs}

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> _OrtCall:
        if inputs.keys() != self._inputs.keys():
            odd = ", ".join(sorted(inputs.keys() ^ self._inputs.keys()))
            raise EngineError(f"graph {self._graph}: inputs missing or not known: {odd}")
        if not outputs:
            raise EngineError(f"graph {self._graph}: bind at least one of its outputs")
        if not outputs.keys() <= self._outputs.keys():
            odd = ", ".join(sorted(outputs.keys() - self._outputs.keys()))
            raise EngineError(f"graph {self._graph} has no output {odd}")
        for name, buffer in (*inputs.items(), *outputs.items()):
            want = (self._inputs.get(name) or self._outputs[name]).dtype
            if buffer.dtype != want:
                raise EngineError(f"graph {self._graph}: {name} is {want}, got a buffer of {buffer.dtype}")
        return _OrtCall(self._graph, self._session, inputs, outputs)


class OrtCpu:
    """The ``ort-cpu`` engine. ``threads``: of one graph call; None takes one per physical core."""

    name = "ort-cpu"
    version = str(ort.__version__)

    def __init__(self, *, threads: int | None = None) -> None:
        self.threads = threads

    def load(self, path: Path, spec: GraphSpec) -> OrtExecutable:
        # Loaded by path, so that ONNX Runtime maps the weights file itself instead of reading it.
        try:
            session = ort.InferenceSession(str(path), self._options(), providers=["CPUExecutionProvider"])
        except Exception as error:  # see _OrtCall
            raise EngineError(
                f"ONNX Runtime {self.version} cannot load {path.name} on the CPU: {_first_line(error)}{_hint(spec)}"
            ) from error
        for what, found, wanted in (
            ("inputs", session.get_inputs(), spec.inputs),
            ("outputs", session.get_outputs(), spec.outputs),
        ):
            got, want = {(node.name, node.type) for node in found}, {_signature(tensor) for tensor in wanted}
            if got != want:
                odd = ", ".join(f"{name} {kind}" for name, kind in sorted(got ^ want))
                raise EngineError(f"{path.name} does not have the {what} its manifest says: {odd}; export it again")
        return OrtExecutable(path.name, session, spec)

    def allocate(self, shape: tuple[int, ...], dtype: str) -> CpuBuffer:
        return CpuBuffer(shape, dtype)

    def _options(self) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 4  # fatal only: every error is raised as well, and reported once
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        # Each graph has a thread pool, and a trajectory changes graphs. Idle threads that spin take the cores from the
        # pool at work: on 2 cores shared with another job, a small SDXL's loop took 3 to 5 times as long with spinning.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        return options


def _signature(tensor: TensorSpec) -> tuple[str, str]:
    return tensor.name, f"tensor({_TYPE_NAME[tensor.dtype]})"


def _first_line(error: BaseException) -> str:
    """The engine's message without its line breaks, source positions and status prefixes."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    return re.sub(r"/\S+\.(?:cc|h):\d+ \S+ ", "", text)


def _hint(spec: GraphSpec) -> str:
    if any(tensor.dtype == "bfloat16" for tensor in (*spec.inputs, *spec.outputs)):
        return " (most of its CPU kernels take no bfloat16: export with --dtype fp32)"
    return ""
