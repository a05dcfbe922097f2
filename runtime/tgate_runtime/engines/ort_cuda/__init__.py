"""ONNX Runtime on an NVIDIA GPU: everything stays on the device, and steps are replayed as CUDA graphs.

Latents, history, carries and conditioning are device buffers at fixed addresses. A step uploads its row of numbers
(and, where the sampler is stochastic, its noise), and nothing comes back before the latents are asked for. Each call
of a denoising graph is run once and captured when it is bound; from then on it is one launch.

One thread of the process does all work on the GPU, whoever asks for it: ONNX Runtime keeps a CUDA graph with the thread
that captured it, and captures so that another thread's allocation or copy meanwhile would break it. Requests therefore
take turns step by step. Sessions are freed by whoever drops them: drop none while another one is bound.

Since calls run one after another, all graphs work in the same memory, captured ones as well: see
:mod:`tgate_runtime.engines.ort_cuda.memory`.

What it did on an H200 is in ``docs/gpu.md``. The tests exercise it on the CPU provider, and on CUDA's own provider over
a stub of CUDA that computes nothing (``tests/cuda_stub``).
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import onnxruntime as ort

from tgate_engine.bundle import Bundle
from tgate_engine.dtypes import DTYPES
from tgate_engine.errors import EngineError
from tgate_engine.garbage import uncollected
from tgate_engine.graph import DENOISE, GraphSpec, Role, TensorSpec
from tgate_runtime.engines.ort import check_nodes, find_weights, on_the_host, run_cancellable, take_weights
from tgate_runtime.engines.ort_cuda.ahead import OrtCudaBuilder, refuse_options
from tgate_runtime.engines.ort_cuda.limits import multiplies_in_half, refuse_bfloat16
from tgate_runtime.engines.ort_cuda.log import captured_stderr, failing
from tgate_runtime.engines.ort_cuda.lowering import Lowered, lower
from tgate_runtime.engines.ort_cuda.lowering.laid import Laid
from tgate_runtime.engines.ort_cuda.memory import CudaBuffer, lasting, on_the_gpu, one_arena
from tgate_runtime.engines.protocol import EngineOptions, Instead, OnBuild, check_buffers
from tgate_runtime.graph_check import read_graphs
from tgate_runtime.weights import Weight, map_weights

_ALIGNMENT_BYTES = 16  # what a kernel may read at a time
_COPIED = "Cannot use user supplied initializer"  # what ONNX Runtime logs where it makes a private copy
_SEARCH = "HEURISTIC"
"""How cuDNN's convolutions are chosen: by the newer of its two heuristics (measured: ``docs/engines.md``)."""
_LEFT_OUT = "MatMulAddFusion"
"""ONNX Runtime would make a Gemm of a product and its bias, for which it writes the bias out whole first."""
_NUMBERS = itertools.count(1)  # of CUDA graphs: no two of the process have one
Pairs = Sequence[tuple[CudaBuffer, CudaBuffer]]
"""Buffers to copy to, and from."""


class _CudaCall:
    """A :class:`~tgate_runtime.engines.protocol.Call`: one I/O binding, captured as one CUDA graph where its graph is.

    ``inputs``, ``outputs``: what the graph reads and writes; ``before``, ``after``: what is copied around it.
    """

    def __init__(
        self,
        owner: OrtCudaExecutable,
        inputs: Mapping[str, CudaBuffer],
        outputs: Mapping[str, CudaBuffer],
        addresses: Mapping[str, int],
        before: Pairs,
        after: Pairs,
    ) -> None:
        self.addresses = addresses
        self._owner = owner
        self._session = owner.session(outputs)
        self._before = before
        self._after = after
        self._buffers = (*inputs.values(), *outputs.values())  # the engine holds addresses; this holds the memory
        self._binding = self._session.io_binding()
        self._run_options = ort.RunOptions()
        for bind, buffers in ((self._binding.bind_input, inputs), (self._binding.bind_output, outputs)):
            for name, buffer in buffers.items():
                bind(name, *owner.device, DTYPES[buffer.dtype].onnx, buffer.shape, buffer.address)
        if owner.captured:
            self._run_options.add_run_config_entry("gpu_graph_id", str(next(_NUMBERS)))
            with uncollected():  # were a session collected now, freeing its memory would end the capture
                self()  # warms up and captures; outputs are never inputs of the same call, so that nothing is spoilt

    @on_the_gpu
    def __call__(self) -> None:
        for to, source in self._before:
            to.copy(source)
        with failing(f"graph {self._owner.spec.file} failed in ONNX Runtime"):
            run_cancellable(self._session, self._binding, self._run_options)
        for to, source in self._after:
            to.copy(source)


class OrtCudaExecutable:
    """A :class:`~tgate_runtime.engines.protocol.Executable`: a session of the whole graph, and of what is left of a
    captured one where a call wants fewer outputs: carries that nobody reads are not computed.

    ``load``: gives the session of the graph with those outputs. ``captured``: whether calls become CUDA graphs.
    """

    def __init__(
        self,
        load: Callable[[Collection[str]], ort.InferenceSession],
        spec: GraphSpec,
        device: tuple[str, int],
        weights: Mapping[str, ort.OrtValue],
        captured: bool,
    ) -> None:
        self._weights = weights  # which must outlive the sessions
        self._load = load
        self.spec = spec
        self.device = device
        self.captured = captured
        self._sessions: dict[frozenset[str], ort.InferenceSession] = {}
        self._spare: dict[tuple[str, tuple[int, ...]], CudaBuffer] = {}

    def session(self, outputs: Collection[str]) -> ort.InferenceSession:
        """What computes those outputs, made when it is first asked for. On the GPU's thread."""
        wanted = frozenset(outputs if self.captured else self.spec.output_names())
        if wanted not in self._sessions:
            self._sessions[wanted] = self._load(wanted)
        return self._sessions[wanted]

    @on_the_gpu
    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> _CudaCall:
        check_buffers(self.spec, inputs, outputs)
        batch = self.spec.batch_of({name: buffer.shape for name, buffer in inputs.items()})
        reads = {tensor.name: self._place(tensor, batch, inputs[tensor.name]) for tensor in self.spec.inputs}
        # What a session gives that was made for more goes to memory that calls share.
        writes = {
            tensor.name: self._place(tensor, batch, outputs.get(tensor.name))
            for tensor in self.spec.outputs
            if tensor.name in outputs or not self.captured
        }
        before = [(reads[name], buffer) for name, buffer in inputs.items() if reads[name] is not buffer]
        after = [(buffer, writes[name]) for name, buffer in outputs.items() if writes[name] is not buffer]
        addresses = {name: buffer.address for name, buffer in (*inputs.items(), *outputs.items())}
        return _CudaCall(self, reads, writes, addresses, before, after)

    def _place(self, tensor: TensorSpec, batch: int, buffer: CudaBuffer | None) -> CudaBuffer:
        """What the graph reads or writes: that buffer, or one that calls share where there is none, or where it begins
        at an address that kernels may not take. Calls run one at a time."""
        if buffer is not None and buffer.address % _ALIGNMENT_BYTES == 0:
            return buffer
        key = (tensor.name, tensor.resolve(batch))
        if key not in self._spare:
            self._spare[key] = CudaBuffer.zeros(key[1], tensor.dtype, self.device)
        return self._spare[key]


class OrtCuda:
    """The ``ort-cuda`` engine.

    ``memory="shared"``, the default, uploads the weights once; every graph uses that copy in place, and one that
    made its own would be refused. ``"fast"`` leaves each graph to upload its own weights, laid out as it likes. What
    is loaded with weights in place of the file's has copies of those, and shares the rest with what was loaded before.

    Graphs are lowered for CUDA's kernels when they are loaded: :mod:`~tgate_runtime.engines.ort_cuda.lowering`. Weights
    that kernels want laid out otherwise are uploaded so, once for all graphs, with either ``memory``.

    ``captured``: the roles of graphs whose calls become CUDA graphs. Those around the denoiser run once for each
    request, and may hold nodes without CUDA kernels (an ArgMax of int32), with which ONNX Runtime refuses to capture.
    """

    name = "ort-cuda"
    version = str(ort.__version__)
    provider = "CUDAExecutionProvider"
    kind = "cuda"
    captured: Collection[Role] = (DENOISE,)

    def __init__(self, options: EngineOptions) -> None:
        refuse_options(options)
        if self.provider not in ort.get_available_providers():
            raise EngineError(
                f"the onnxruntime installed here has no {self.provider}: pip uninstall onnxruntime, then "
                "pip install 'tgate-engine[cuda]'"
            )
        self.options = replace(options, memory=options.memory or "shared")
        self.device = (self.kind, options.device)
        self._uploaded: WeakValueDictionary[tuple[str, str, str], ort.OrtValue] = WeakValueDictionary()
        self._start()

    def build(self, bundle: Bundle, graphs: Sequence[GraphSpec], on_build: OnBuild | None = None) -> dict[str, Path]:
        """What libtgate takes from here; this engine itself lowers graphs when it loads them."""
        return OrtCudaBuilder(EngineOptions()).build(bundle, graphs, on_build)

    @on_the_gpu
    def load(
        self,
        bundle: Bundle,
        graphs: Sequence[GraphSpec],
        on_build: OnBuild | None = None,
        instead: Instead | None = None,
    ) -> dict[str, OrtCudaExecutable]:
        instead = instead or {}
        files = read_graphs(bundle, graphs)
        for spec in graphs:
            refuse_bfloat16(files[spec.file], spec)
        lowered = {name: self.lowered(data) for name, data in files.items()}
        laid = {name: each for graph in lowered.values() for name, each in graph.weights.items()}
        changed = {name: each.of(instead[each.source]) for name, each in laid.items() if each.source in instead}
        if self.options.memory == "fast":
            laid = {name: each for name, each in laid.items() if each != Laid(name) or name in changed}
        weights = self._upload(bundle, laid, changed) if laid else {}
        given = {name: on_the_host(weight) for name, weight in changed.items()}
        return {
            spec.file: self._executable(spec, files[spec.file], lowered[spec.file].data, bundle.path, weights, given)
            for spec in graphs
        }

    def lowered(self, data: bytes, outputs: Collection[str] | None = None) -> Lowered:
        """A graph's file as a session gets it, with those of its outputs, or all."""
        with failing("a graph cannot be lowered for CUDA; export the bundle again"):
            return lower(data, outputs)

    def allocate(self, shape: tuple[int, ...], dtype: str) -> CudaBuffer:
        return CudaBuffer.zeros(shape, dtype, self.device)

    @on_the_gpu
    def _start(self) -> None:
        """Find CUDA and the GPU. Raises :class:`EngineError` where there is none."""
        log = _preload() if self.kind == "cuda" else []
        with failing(f"ort-cuda finds no GPU {self.options.device} here", log), captured_stderr(log):
            lasting((1,), DTYPES["float32"].onnx, self.device)
            one_arena(self.device)

    def _upload(
        self, bundle: Bundle, laid: Mapping[str, Laid], changed: Mapping[str, Weight]
    ) -> dict[str, ort.OrtValue]:
        """Weights on the device, by their initializers' names: the bundle's, which are there once for as long as any
        graph has them, and those that are ``changed``."""
        values = {}
        file = bundle.manifest.weights
        place = (str(bundle.path), bundle.manifest.files[file].sha256)
        mapped = map_weights(bundle.file(file))
        for name, each in laid.items():
            if name in changed:
                values[name] = self._on_the_device(name, changed[name])
                continue
            key = (*place, name)
            there = self._uploaded.get(key)
            if there is None:
                there = self._uploaded[key] = self._on_the_device(name, each.of(mapped[each.source]))
            values[name] = there
        return values

    def _on_the_device(self, name: str, weight: Weight) -> ort.OrtValue:
        shape = weight.array.shape
        with failing(f"ONNX Runtime cannot put weight {name} {list(shape)} on the GPU"):
            value = lasting(shape, DTYPES[weight.dtype].onnx, self.device)
            value.update_inplace(weight.array)
            return ort.OrtValue.from_dlpack(value)  # a view: memory that ONNX Runtime owns is not shared

    def _executable(
        self,
        spec: GraphSpec,
        file: bytes,
        whole: bytes,
        folder: Path,
        weights: Mapping[str, ort.OrtValue],
        given: Mapping[str, ort.OrtValue],
    ) -> OrtCudaExecutable:
        """``file``: the bundle's; ``whole``: what was made of it for all of its outputs; ``given``: values in the
        host's memory that the graph has in place of those in the weight file."""
        captured = spec.role in self.captured

        def load(outputs: Collection[str]) -> ort.InferenceSession:
            rest = replace(spec, outputs=tuple(tensor for tensor in spec.outputs if tensor.name in outputs))
            data = whole if rest == spec else self.lowered(file, outputs).data
            return self._load(data, folder, rest, weights, captured, given)

        executable = OrtCudaExecutable(load, spec, self.device, weights, captured)
        executable.session(spec.output_names())  # what cannot be loaded is told now
        return executable

    def _load(
        self,
        data: bytes,
        folder: Path,
        spec: GraphSpec,
        weights: Mapping[str, ort.OrtValue],
        captured: bool,
        given: Mapping[str, ort.OrtValue],
    ) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        options.log_severity_level = 2  # warnings: where a weight is copied, one says so
        find_weights(options, folder)
        take_weights(options, data, given)
        # One arena for what graphs work in, and nothing in it that is to last: a graph that was captured there writes
        # over it whenever it is replayed. (Memory patterns stay: without them the third run, which is captured, may
        # find the arena in pieces other than the second left, and allocate.)
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
        # Prepacking stays on: by being asked, NhwcConv learns that its weights lie as it wants them, and nothing that a
        # graph holds packs any on CUDA.
        options.add_session_config_entry("optimization.disable_specified_optimizers", _LEFT_OUT)
        for name, value in weights.items():
            options.add_initializer(name, value)
        log: list[str] = []
        with failing(f"ONNX Runtime {self.version} cannot load {spec.file} on the GPU", log), captured_stderr(log):
            session = ort.InferenceSession(
                data,
                options,
                providers=self.providers(captured, multiplies_in_half(data)),
                enable_fallback=0,  # or what fails is printed, and tried again on the CPU
            )
            if self.provider not in session.get_providers():
                raise RuntimeError("it takes the CPU instead; check that CUDA and cuDNN are there")
        if copied := [line for line in log if _COPIED in line]:
            raise EngineError(
                f"ONNX Runtime copied {len(copied)} weights of {spec.file} instead of sharing them: "
                f"{' '.join(copied[0].split())}; take --memory fast"
            )
        check_nodes(session, spec)
        return session

    def providers(self, captured: bool, half: bool) -> list[tuple[str, dict[str, str]]]:
        """What a session runs on. ``half``: whether its graph multiplies in 16 bits."""
        settings = {"device_id": str(self.options.device), "arena_extend_strategy": "kSameAsRequested"}
        # TF32's 10 bits of mantissa are not what a graph in float32 was exported for. In 16 bits there is nothing to
        # lose, and ONNX Runtime takes the setting for more than it says: no convolution may then use tensor cores.
        settings["use_tf32"] = str(int(half))
        settings["cudnn_conv_algo_search"] = _SEARCH
        if captured:
            settings["enable_cuda_graph"] = "1"
        return [(self.provider, settings), ("CPUExecutionProvider", {})]


def _preload() -> list[str]:
    """Load CUDA and cuDNN where they were installed as Python packages; gives what ONNX Runtime says, line by line."""
    # It looks beside its own folder alone, and these packages may lie in another one of Python's.
    package = importlib.util.find_spec("nvidia")
    roots = list(package.submodule_search_locations or ()) if package else []
    major = ort.cuda_version.partition(".")[0]
    log = io.StringIO()
    with contextlib.redirect_stdout(log):
        for name, alone in ((f"cu{major}", {"cudnn": False}), ("cudnn", {"cuda": False})):
            folders = (lib for root in roots if (lib := Path(root, name, "lib")).is_dir())
            ort.preload_dlls(**alone, directory=next(map(str, folders), None))  # None: where it looks by itself
    return log.getvalue().splitlines()
