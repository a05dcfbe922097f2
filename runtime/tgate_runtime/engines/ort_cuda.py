"""ONNX Runtime on an NVIDIA GPU: everything stays on the device, and steps are replayed as CUDA graphs.

Latents, history, carries and conditioning are device buffers at fixed addresses. A step uploads its row of numbers
(and, where the sampler is stochastic, its noise), and nothing comes back before the latents are asked for. Each call
of a denoising graph is run once and captured when it is bound; from then on it is one launch.

One thread of the process does all work on the GPU, whoever asks for it: ONNX Runtime keeps a CUDA graph with the thread
that captured it, and captures so that another thread's allocation or copy meanwhile would break it. Requests therefore
take turns step by step. Sessions are freed by whoever drops them: drop none while another one is bound.

No GPU has run it yet. The tests exercise it on the CPU provider; and by hand it loaded, partitioned, shared weights and
captured against a stub of CUDA that computes nothing.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import itertools
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnxruntime.capi import onnxruntime_pybind11_state as native

from tgate_engine.bundle import Bundle
from tgate_engine.errors import EngineError
from tgate_engine.manifest import GraphSpec, resolve
from tgate_engine.plan import DENOISING_GRAPHS
from tgate_runtime.backends import EngineOptions, OnBuild, check_buffers, fitted
from tgate_runtime.backends.ort import ELEMENT_TYPE, check_nodes, first_line
from tgate_runtime.dtypes import storage
from tgate_runtime.weights import map_weights

P = ParamSpec("P")
T = TypeVar("T")
_COPIED = "Cannot use user supplied initializer"  # what ONNX Runtime logs where it makes a private copy
_LOGGED, _WARNING = ":onnxruntime:", "[W:onnxruntime:"
_COLOUR = re.compile(r"\x1b\[[\d;]*m")
_THIS_THREAD = threading.local()
_GPU = ThreadPoolExecutor(1, "ort-cuda", initializer=setattr, initargs=(_THIS_THREAD, "works_on_the_gpu", True))


def _on_the_gpu(work: Callable[P, T]) -> Callable[P, T]:
    """Have the one thread that works on the GPU do ``work``; the caller waits, and gets its result or its exception."""

    @functools.wraps(work)
    def handed_over(*args: P.args, **kwargs: P.kwargs) -> T:
        if hasattr(_THIS_THREAD, "works_on_the_gpu"):
            return work(*args, **kwargs)
        return _GPU.submit(work, *args, **kwargs).result()

    return handed_over


@contextlib.contextmanager
def _failing(what: str, said: Sequence[str] = ()) -> Iterator[None]:
    """Raises :class:`EngineError` for whatever fails meanwhile; ``said``: what else the engine had to say of it."""
    try:
        yield
    except EngineError:
        raise
    except Exception as error:  # the engine raises RuntimeError and a dozen classes of its own
        why = first_line(error)
        reason = next((text for line in said if (text := _complaint(line))), why)
        raise EngineError(f"{what}: {why}" + (f" ({reason})" if reason not in why else "")) from error


class CudaBuffer:
    """A :class:`~tgate_runtime.backends.Buffer` in device memory. ``write`` and ``read`` copy, and wait for it."""

    @_on_the_gpu
    def __init__(self, shape: tuple[int, ...], dtype: str, device: tuple[str, int]) -> None:
        self.shape = shape
        self.dtype = dtype
        with _failing(f"ONNX Runtime gives no buffer of {dtype} {list(shape)}"):
            self._value = ort.OrtValue.ortvalue_from_shape_and_type(shape, storage(dtype).type, *device)
            self.address = int(self._value.data_ptr())
        self.write(np.zeros(1, storage(dtype)))

    @_on_the_gpu
    def write(self, array: NDArray[Any]) -> None:
        with _failing(f"ONNX Runtime cannot write a buffer of {self.dtype} {list(self.shape)}"):
            self._value.update_inplace(np.ascontiguousarray(fitted(array, self.shape, self.dtype)))

    @_on_the_gpu
    def read(self) -> NDArray[Any]:
        with _failing(f"ONNX Runtime cannot read a buffer of {self.dtype} {list(self.shape)}"):
            return np.array(self._value.numpy())


class _CudaCall:
    """A :class:`~tgate_runtime.backends.Call`: one I/O binding, captured as one CUDA graph where its graph is."""

    def __init__(
        self, owner: OrtCudaExecutable, number: int, inputs: Mapping[str, CudaBuffer], outputs: Mapping[str, CudaBuffer]
    ) -> None:
        self._owner = owner
        self._buffers = (*inputs.values(), *outputs.values())
        self._binding = owner.session.io_binding()
        self._run_options = ort.RunOptions()
        self.addresses: dict[str, int] = {}
        for bind, buffers in ((self._binding.bind_input, inputs), (self._binding.bind_output, outputs)):
            for name, buffer in buffers.items():
                bind(name, *owner.device, ELEMENT_TYPE[buffer.dtype], buffer.shape, buffer.address)
                self.addresses[name] = buffer.address
        if owner.captured:
            self._run_options.add_run_config_entry("gpu_graph_id", str(number))
            self()  # warms up and captures; outputs are never inputs of the same call, so that nothing is spoilt

    @_on_the_gpu
    def __call__(self) -> None:
        with _failing(f"graph {self._owner.name} failed in ONNX Runtime"):
            self._owner.session.run_with_iobinding(self._binding, self._run_options)


class OrtCudaExecutable:
    """A :class:`~tgate_runtime.backends.Executable`: one session, whose calls are ``captured`` or not."""

    def __init__(
        self,
        session: ort.InferenceSession,
        spec: GraphSpec,
        device: tuple[str, int],
        weights: Mapping[str, ort.OrtValue],
        captured: bool,
    ) -> None:
        self._weights = weights  # which must outlive the session
        self.name = spec.file
        self.session = session
        self.device = device
        self.captured = captured
        self._spec = spec
        self._numbers = itertools.count(1)  # of CUDA graphs, within this session
        self._unread: dict[tuple[str, tuple[int, ...]], CudaBuffer] = {}

    @_on_the_gpu
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

    ``captured``: the graphs whose calls become CUDA graphs. Those around the denoiser run once for each request, and
    may hold nodes without CUDA kernels (an ArgMax of int32), with which ONNX Runtime refuses to capture.
    """

    name = "ort-cuda"
    version = str(ort.__version__)
    provider = "CUDAExecutionProvider"
    kind = "cuda"
    captured: Collection[str] = DENOISING_GRAPHS

    def __init__(self, options: EngineOptions) -> None:
        if options.precision is not None:
            raise EngineError("ort-cuda computes in the dtype that the bundle was exported with; leave out --precision")
        if options.threads is not None:
            raise EngineError("ort-cuda computes on a GPU; leave out --threads")
        if self.provider not in ort.get_available_providers():
            raise EngineError(
                f"the onnxruntime installed here has no {self.provider}: pip uninstall onnxruntime, then "
                "pip install 'tgate-engine[cuda]'"
            )
        self.options = replace(options, memory=options.memory or "shared")
        self.device = (self.kind, options.device)
        self._start()

    def build(self, bundle: Bundle, graphs: Sequence[str], on_build: OnBuild | None = None) -> dict[str, Path]:
        return {}

    @_on_the_gpu
    def load(
        self, bundle: Bundle, graphs: Sequence[str], on_build: OnBuild | None = None
    ) -> dict[str, OrtCudaExecutable]:
        weights = self._upload(bundle) if self.options.memory == "shared" else {}
        return {name: self._load(bundle, name, weights) for name in graphs}

    def allocate(self, shape: tuple[int, ...], dtype: str) -> CudaBuffer:
        return CudaBuffer(shape, dtype, self.device)

    @_on_the_gpu
    def _start(self) -> None:
        """Find CUDA and the GPU. Raises :class:`EngineError` where there is none."""
        said = _preload() if self.kind == "cuda" else []
        with _failing(f"ort-cuda finds no GPU {self.options.device} here", said), _stderr(said):
            if hasattr(native, "set_arena_extend_strategy"):
                # Buffers and shared weights lie in an arena of the process, made with the first of them: by default it
                # grows by powers of two, and 21 MB of weights took 32.
                native.set_arena_extend_strategy(native.ArenaExtendStrategy.kSameAsRequested)
            ort.OrtValue.ortvalue_from_shape_and_type((1,), np.float32, *self.device)

    def _upload(self, bundle: Bundle) -> dict[str, ort.OrtValue]:
        """Every weight of the bundle on the device, by its initializer's name."""
        found = {}
        for name, weight in map_weights(bundle.file(bundle.manifest.weights)).items():
            shape = weight.array.shape
            with _failing(f"ONNX Runtime cannot put weight {name} {list(shape)} on the GPU"):
                value = ort.OrtValue.ortvalue_from_shape_and_type(shape, ELEMENT_TYPE[weight.dtype], *self.device)
                value.update_inplace(weight.array)
                found[name] = ort.OrtValue.from_dlpack(value)  # a view: memory that ONNX Runtime owns is not shared
        return found

    def _load(self, bundle: Bundle, graph: str, weights: Mapping[str, ort.OrtValue]) -> OrtCudaExecutable:
        spec, captured = bundle.manifest.graphs[graph], graph in self.captured
        options = ort.SessionOptions()
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 2  # warnings: where a weight is copied, one says so
        if weights:
            options.add_session_config_entry("session.disable_prepacking", "1")
        for name, value in weights.items():
            options.add_initializer(name, value)
        said: list[str] = []
        with _failing(f"ONNX Runtime {self.version} cannot load {spec.file} on the GPU", said), _stderr(said):
            session = ort.InferenceSession(
                str(bundle.file(spec.file)),
                options,
                providers=self.providers(captured),
                enable_fallback=0,  # or what fails is printed, and tried again on the CPU
            )
            if self.provider not in session.get_providers():
                raise RuntimeError("it takes the CPU instead; check that CUDA and cuDNN are there")
        if copied := [line for line in said if _COPIED in line]:
            raise EngineError(
                f"ONNX Runtime copied {len(copied)} weights of {spec.file} instead of sharing them: "
                f"{' '.join(copied[0].split())}; take --memory fast"
            )
        check_nodes(session, spec)
        return OrtCudaExecutable(session, spec, self.device, weights, captured)

    def providers(self, captured: bool) -> list[tuple[str, dict[str, str]]]:
        """What a session runs on."""
        settings = {"device_id": str(self.options.device), "arena_extend_strategy": "kSameAsRequested"}
        settings["use_tf32"] = "0"  # 10 bits of mantissa are not what a bundle in float32 was exported for
        if captured:
            settings["enable_cuda_graph"] = "1"
        return [(self.provider, settings), ("CPUExecutionProvider", {})]


def _preload() -> list[str]:
    """Load CUDA and cuDNN where they were installed as Python packages; gives what ONNX Runtime says, line by line."""
    # It looks beside its own folder alone, and these packages may lie in another one of Python's.
    package = importlib.util.find_spec("nvidia")
    roots = list(package.submodule_search_locations or ()) if package else []
    major = ort.cuda_version.partition(".")[0]
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for name, alone in ((f"cu{major}", {"cudnn": False}), ("cudnn", {"cuda": False})):
            found = (lib for root in roots if (lib := Path(root, name, "lib")).is_dir())
            ort.preload_dlls(**alone, directory=next(map(str, found), None))  # None: where it looks by itself
    return said.getvalue().splitlines()


@contextlib.contextmanager
def _stderr(log: list[str]) -> Iterator[None]:
    """Add ONNX Runtime's log, line by line, to ``log``: it goes to standard error, out of Python's hearing.

    What else is written there meanwhile goes on to it, as do the log's errors where nothing is raised.
    """
    hidden = _LOGGED
    with tempfile.TemporaryFile() as file:
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            yield
            hidden = _WARNING
        finally:
            os.dup2(before, 2)
            os.close(before)
            file.seek(0)
            said = _COLOUR.sub("", file.read().decode(errors="replace")).splitlines()
            log += [line for line in said if _LOGGED in line]
            sys.stderr.writelines(f"{line}\n" for line in said if line and hidden not in line)


def _complaint(line: str) -> str:
    """What a line of ONNX Runtime's log says, without time and place; nothing where it is a warning."""
    text = re.sub(r"^(.*?:onnxruntime:[^\]]*\] )?(.*\[ONNXRuntimeError\] : \d+ : \w+ : )?", "", line)
    return "" if _WARNING in line else first_line(RuntimeError(text))
