"""ONNX Runtime on an NVIDIA GPU: everything stays on the device, and steps are replayed as CUDA graphs.

Latents, history, carries and conditioning are device buffers at fixed addresses. A step uploads its row of numbers
(and, where the sampler is stochastic, its noise), and nothing comes back before the latents are asked for. Each call
is run once and captured when it is bound; from then on it is one launch.

Written against ONNX Runtime's documentation, and exercised on the CPU provider by the tests: no GPU has run it yet.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from tgate_engine.bundle import Bundle
from tgate_engine.errors import EngineError
from tgate_engine.manifest import GraphSpec, resolve
from tgate_runtime.backends import EngineOptions, OnBuild, check_buffers, fitted
from tgate_runtime.backends.ort import ELEMENT_TYPE, check_nodes, first_line
from tgate_runtime.dtypes import storage
from tgate_runtime.weights import map_weights

_COPIED = "Cannot use user supplied initializer"  # what ONNX Runtime logs where it makes a private copy


class CudaBuffer:
    """A :class:`~tgate_runtime.backends.Buffer` in device memory. ``write`` and ``read`` copy, and wait for it."""

    def __init__(self, shape: tuple[int, ...], dtype: str, device: tuple[str, int]) -> None:
        self.shape = shape
        self.dtype = dtype
        self._value = ort.OrtValue.ortvalue_from_shape_and_type(shape, storage(dtype).type, *device)
        self.address = int(self._value.data_ptr())
        self.write(np.zeros(1, storage(dtype)))

    def write(self, array: NDArray[Any]) -> None:
        self._value.update_inplace(np.ascontiguousarray(fitted(array, self.shape, self.dtype)))

    def read(self) -> NDArray[Any]:
        return np.array(self._value.numpy())


class _CudaCall:
    """A :class:`~tgate_runtime.backends.Call`: one I/O binding, captured as one CUDA graph."""

    def __init__(
        self, owner: OrtCudaExecutable, number: int, inputs: Mapping[str, CudaBuffer], outputs: Mapping[str, CudaBuffer]
    ) -> None:
        self._owner = owner
        self._buffers = (*inputs.values(), *outputs.values())
        self._binding = owner.session.io_binding()
        self._run_options = ort.RunOptions()
        self._run_options.add_run_config_entry("gpu_graph_id", str(number))
        self.addresses: dict[str, int] = {}
        for bind, buffers in ((self._binding.bind_input, inputs), (self._binding.bind_output, outputs)):
            for name, buffer in buffers.items():
                bind(name, *owner.device, ELEMENT_TYPE[buffer.dtype], buffer.shape, buffer.address)
                self.addresses[name] = buffer.address
        self()  # warms up and captures; outputs are never inputs of the same call, so that nothing is spoilt

    def __call__(self) -> None:
        try:
            with self._owner.lock:
                self._owner.session.run_with_iobinding(self._binding, self._run_options)
        except Exception as error:  # the engine raises RuntimeError and a dozen classes of its own
            raise EngineError(f"graph {self._owner.name} failed in ONNX Runtime: {first_line(error)}") from error


class OrtCudaExecutable:
    """A :class:`~tgate_runtime.backends.Executable`: one session. CUDA graphs of one session run one at a time."""

    def __init__(
        self,
        session: ort.InferenceSession,
        spec: GraphSpec,
        device: tuple[str, int],
        weights: Mapping[str, ort.OrtValue],
    ) -> None:
        self._weights = weights  # which must outlive the session
        self.name = spec.file
        self.session = session
        self.device = device
        self.lock = threading.Lock()
        self._spec = spec
        self._numbers = itertools.count(1)  # of CUDA graphs, within this session
        self._unread: dict[tuple[str, tuple[int, ...]], CudaBuffer] = {}

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> _CudaCall:
        check_buffers(self.name, self._spec, inputs, outputs)
        # A captured graph writes every output to a fixed place; what nobody reads goes to memory that calls share.
        batch = self._spec.batch_of({name: buffer.shape for name, buffer in inputs.items()})
        unread = {}
        for tensor in self._spec.outputs:
            if tensor.name not in outputs:
                shape = resolve(tensor.shape, batch)
                key = (tensor.name, shape)
                if key not in self._unread:
                    self._unread[key] = CudaBuffer(shape, tensor.dtype, self.device)
                unread[tensor.name] = self._unread[key]
        return _CudaCall(self, next(self._numbers), inputs, {**outputs, **unread})


class OrtCuda:
    """The ``ort-cuda`` engine.

    ``memory="shared"``, the default, uploads the weights once; every graph uses that copy in place, and one that
    made its own would be refused. ``"fast"`` leaves each graph to upload its own weights, laid out as it likes.
    """

    name = "ort-cuda"
    version = str(ort.__version__)
    provider = "CUDAExecutionProvider"
    kind = "cuda"

    def __init__(self, options: EngineOptions) -> None:
        if options.precision is not None:
            raise EngineError("ort-cuda computes in the dtype that the bundle was exported with; leave out --precision")
        if self.provider not in ort.get_available_providers():
            raise EngineError(
                f"the onnxruntime installed here has no {self.provider}: pip uninstall onnxruntime, then "
                "pip install 'tgate-engine[cuda]'"
            )
        if self.kind == "cuda" and hasattr(ort, "preload_dlls"):
            ort.preload_dlls()  # finds CUDA and cuDNN where they were installed as Python packages
        self.options = replace(options, memory=options.memory or "shared")
        self.device = (self.kind, options.device)
        try:
            self.allocate((1,), "float32")
        except Exception as error:
            raise EngineError(f"ort-cuda finds no GPU {options.device} here: {first_line(error)}") from error

    def build(self, bundle: Bundle, graphs: Sequence[str], on_build: OnBuild | None = None) -> dict[str, Path]:
        return {}

    def load(
        self, bundle: Bundle, graphs: Sequence[str], on_build: OnBuild | None = None
    ) -> dict[str, OrtCudaExecutable]:
        weights = self._upload(bundle) if self.options.memory == "shared" else {}
        return {name: self._load(bundle, bundle.manifest.graphs[name], weights) for name in graphs}

    def allocate(self, shape: tuple[int, ...], dtype: str) -> CudaBuffer:
        return CudaBuffer(shape, dtype, self.device)

    def _upload(self, bundle: Bundle) -> dict[str, ort.OrtValue]:
        """Every weight of the bundle on the device, by its initializer's name."""
        found = {}
        for name, weight in map_weights(bundle.file(bundle.manifest.weights)).items():
            shape = weight.array.shape
            value = ort.OrtValue.ortvalue_from_shape_and_type(shape, ELEMENT_TYPE[weight.dtype], *self.device)
            value.update_inplace(weight.array)
            found[name] = ort.OrtValue.from_dlpack(value)  # a view: memory that ONNX Runtime owns is not shared
        return found

    def _load(self, bundle: Bundle, spec: GraphSpec, weights: Mapping[str, ort.OrtValue]) -> OrtCudaExecutable:
        options = ort.SessionOptions()
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 2  # warnings: where a weight is copied, one says so
        if weights:
            options.add_session_config_entry("session.disable_prepacking", "1")
        for name, value in weights.items():
            options.add_initializer(name, value)
        try:
            with _stderr() as said:
                session = ort.InferenceSession(str(bundle.file(spec.file)), options, providers=self.providers())
        except Exception as error:  # see _CudaCall
            raise EngineError(
                f"ONNX Runtime {self.version} cannot load {spec.file} on the GPU: {first_line(error)}"
            ) from error
        if copied := [line for line in said if _COPIED in line]:
            raise EngineError(
                f"ONNX Runtime copied {len(copied)} weights of {spec.file} instead of sharing them: "
                f"{' '.join(copied[0].split())}; take --memory fast"
            )
        if self.provider not in session.get_providers():
            raise EngineError(
                f"ONNX Runtime could not use the GPU for {spec.file}; check that CUDA and cuDNN are there"
            )
        check_nodes(spec.file, session, spec)
        return OrtCudaExecutable(session, spec, self.device, weights)

    def providers(self) -> list[tuple[str, dict[str, str]]]:
        """What a session runs on."""
        settings = {"device_id": str(self.options.device), "enable_cuda_graph": "1"}
        return [
            (self.provider, {**settings, "arena_extend_strategy": "kSameAsRequested"}),
            ("CPUExecutionProvider", {}),
        ]


_STDERR = threading.Lock()


@contextlib.contextmanager
def _stderr() -> Iterator[list[str]]:
    """The lines that C++ code writes to standard error meanwhile; Python cannot hear ONNX Runtime's log otherwise."""
    lines: list[str] = []
    with _STDERR, tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield lines
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            lines += file.read().decode(errors="replace").splitlines()
