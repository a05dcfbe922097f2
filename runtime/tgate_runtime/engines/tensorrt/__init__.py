"""TensorRT, or TensorRT-RTX: one engine per graph, resident on one NVIDIA GPU.

Built and tested here with TensorRT-RTX 1.7 on hosts without a GPU. Running has never been tried, on either library,
nor has anything of ``memory="fast"``.

Engines hold no weights. With ``memory="shared"`` a graph's external weights become inputs of its engine, so that all
engines read one copy on the device and an engine is built without its weights, anywhere. With ``memory="fast"``
the engine keeps a private copy in the layouts that it likes best: it is stripped when it is built and refitted from
the bundle when it is loaded, both of which take a GPU's driver.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from tgate_engine.bundle import Bundle, sha256_of
from tgate_engine.errors import EngineError
from tgate_engine.graph import GraphSpec, TensorSpec
from tgate_runtime.engines.compiled import entries, interface_key, ready_entries
from tgate_runtime.engines.protocol import EngineOptions, Instead, OnBuild, check_buffers, check_interface
from tgate_runtime.engines.tensorrt.build import (
    POLYGRAPHY,
    RECIPE,
    RTX,
    VERSION,
    build_engine,
    capability,
    flags,
    log,
    polygraphy,
    read_model,
    trt,
    weight_spans,
)
from tgate_runtime.engines.tensorrt.cuda import (
    ALIGNMENT_BYTES,
    CudaGraph,
    DeviceBuffer,
    DeviceMemory,
    Stream,
    aligned,
    architecture,
    gpu_count,
    queue_copy,
    use_device,
)
from tgate_runtime.graph_check import read_graphs

_PLAN = "engine.plan"
_DTYPE_OF = {
    trt.DataType.FLOAT: "float32",
    trt.DataType.HALF: "float16",
    trt.DataType.BF16: "bfloat16",
    trt.DataType.INT64: "int64",
    trt.DataType.UINT8: "uint8",
}


class _Call:
    """A :class:`~tgate_runtime.engines.protocol.Call`: one execution context, and after its first run one CUDA graph.

    ``before`` and ``after``: what is copied around a run, as pairs of buffers, to and from. TensorRT takes multiples of
    256 alone as addresses, so a view of some rows that begins elsewhere is copied to and from a place that does not.
    """

    def __init__(
        self,
        executable: TensorRtExecutable,
        context: Any,
        addresses: dict[str, int],
        before: Sequence[tuple[DeviceBuffer, DeviceBuffer]],
        after: Sequence[tuple[DeviceBuffer, DeviceBuffer]],
        keep: Sequence[Any],
    ) -> None:
        self.addresses = addresses
        self._executable = executable
        self._context = context
        self._device = executable.device
        self._before = before
        self._after = after
        self._keep = keep  # the engine holds addresses; this holds the memory
        self._recorded: CudaGraph | None = None
        self._capturable: bool | None = None

    def __call__(self) -> None:
        stream = self._device.stream
        with self._device.lock:  # all contexts work in the same scratch memory
            use_device(stream.device)
            if self._recorded is not None:
                self._recorded.launch(stream)
                stream.synchronize()
                return
            self._enqueue()
            stream.synchronize()
            if self._capturable is None:  # the run above was the warm-up, which compiles and allocates
                ask = getattr(self._context, "is_stream_capturable", None)  # TensorRT has none: it always is
                self._capturable = ask is None or bool(ask(stream.handle))
                if self._capturable:
                    self._recorded = stream.capture(self._enqueue)

    def _enqueue(self) -> None:
        self._copy(self._before)
        if not self._context.execute_async_v3(self._device.stream.handle):
            name = self._executable.spec.file
            raise EngineError(f"graph {name} failed in TensorRT: {log.take('no reason given')}")
        self._copy(self._after)

    def _copy(self, pairs: Sequence[tuple[DeviceBuffer, DeviceBuffer]]) -> None:
        for to, source in pairs:
            handle = self._device.stream.handle
            queue_copy(to.address, source.address, source.size_bytes, "cudaMemcpyDeviceToDevice", handle)


class TensorRtExecutable:
    """A :class:`~tgate_runtime.engines.protocol.Executable`: one engine on the device."""

    def __init__(self, engine: Any, spec: GraphSpec, device: _Device, weights: Mapping[str, int]) -> None:
        self.spec = spec
        self.device = device
        self._engine = engine
        self._weights = weights
        strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
        self._config = engine.create_runtime_config()
        self._config.set_execution_context_allocation_strategy(strategy)
        if RTX:  # it compiles kernels as they are first needed
            kinds = trt.DynamicShapesKernelSpecializationStrategy
            self._cache = self._config.create_runtime_cache()  # one for all contexts
            self._config.set_runtime_cache(self._cache)
            self._config.dynamic_shapes_kernel_specialization_strategy = kinds.EAGER  # before a CUDA graph records them

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> _Call:
        check_buffers(self.spec, inputs, outputs)
        batch = self.spec.batch_of({name: buffer.shape for name, buffer in inputs.items()})
        with self.device.lock:
            use_device(self.device.stream.device)
            # A context for each call: a CUDA graph is of one context, with one set of addresses.
            context = self._engine.create_execution_context(self._config)
            if context is None:
                raise EngineError(f"graph {self.spec.file}: TensorRT made no context: {log.take('no reason given')}")
            scratch = self.device.scratch
            context.set_device_memory(scratch.address, scratch.size_bytes)
            before, after, buffers = [], [], {}
            for tensor in self.spec.inputs:
                buffer = buffers[tensor.name] = self._place(tensor, batch, inputs[tensor.name])
                if buffer is not inputs[tensor.name]:
                    before.append((buffer, inputs[tensor.name]))
                self._set(context.set_input_shape(tensor.name, buffer.shape), tensor.name)
            for tensor in self.spec.outputs:
                buffer = buffers[tensor.name] = self._place(tensor, batch, outputs.get(tensor.name))
                if tensor.name in outputs and buffer is not outputs[tensor.name]:
                    after.append((outputs[tensor.name], buffer))
            addresses = {name: buffer.address for name, buffer in buffers.items()}
            for name, address in (*addresses.items(), *self._weights.items()):
                self._set(context.set_tensor_address(name, address), name)
        bound = {name: buffer.address for name, buffer in (*inputs.items(), *outputs.items())}
        keep = (*inputs.values(), *outputs.values(), *buffers.values())
        return _Call(self, context, bound, before, after, keep)

    def _place(self, tensor: TensorSpec, batch: int, buffer: DeviceBuffer | None) -> DeviceBuffer:
        """What the engine reads or writes: that buffer, or a spare one where there is none or it is not aligned."""
        if buffer is None or buffer.address % ALIGNMENT_BYTES:
            return self.device.spare(tensor.name, tensor.resolve(batch), tensor.dtype)
        return buffer

    def _set(self, done: bool, name: str) -> None:
        if not done:
            reason = log.take("its shape")
            raise EngineError(f"graph {self.spec.file}: TensorRT refuses the buffer of {name}: {reason}")


class _Device:
    """What all engines of one :meth:`TensorRt.load` share: queue, scratch memory, weights. Holds them alive."""

    def __init__(self, number: int) -> None:
        self.stream = Stream(number)
        self.lock = threading.Lock()
        self.runtime = make_runtime()
        self.scratch = DeviceMemory(0, number)
        self.weights = DeviceMemory(0, number)
        self._spare: dict[tuple[str, tuple[int, ...], str], DeviceBuffer] = {}

    def spare(self, name: str, shape: tuple[int, ...], dtype: str) -> DeviceBuffer:
        """Where all calls write an output that nobody asked for, or keep one that is not aligned while they run. Each
        name has its own: TensorRT writes every output, and may read one back as the input of a later layer."""
        key = name, shape, dtype
        if key not in self._spare:
            self._spare[key] = DeviceBuffer.zeros(shape, dtype, self.stream.device)
        return self._spare[key]

    def upload(self, file: Path, spans: set[tuple[int, int]]) -> dict[tuple[int, int], int]:
        """Copy those (offset, length) of ``file``, in bytes, to the device; gives their addresses there."""
        places, total = {}, 0
        for span in sorted(spans):
            places[span] = total
            total += aligned(span[1])
        self.weights = DeviceMemory(total, self.stream.device)
        if places:
            with file.open("rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as memory:
                for (offset, length), place in places.items():
                    array = np.frombuffer(memory, np.uint8, length, offset).copy()
                    self.weights.upload(array, self.weights.address + place)
        return {span: self.weights.address + place for span, place in places.items()}


class TensorRt:
    """The ``tensorrt`` engine; a :class:`~tgate_runtime.engines.protocol.Engine`. It takes ``tensorrt`` where that is
    installed, else ``tensorrt_rtx``.

    ``memory``: see the module. The default is "shared" with TensorRT-RTX and "fast" with TensorRT, of which nobody has
    tried yet whether it takes a convolution's weights as an input. ``architecture``, with TensorRT-RTX alone: build
    for that one; by default an engine runs on every architecture from sm_80 that TensorRT-RTX supports.
    """

    name = "tensorrt"
    version = VERSION

    def __init__(self, options: EngineOptions) -> None:
        if options.precision is not None:
            raise EngineError("tensorrt computes in the dtype that the bundle was exported with; leave out --precision")
        if options.threads is not None:
            raise EngineError("tensorrt computes on a GPU; leave out --threads")
        if options.architecture is not None and not RTX:
            raise EngineError("TensorRT builds for the GPU at hand alone; leave out the architecture")
        self.options = replace(options, memory=options.memory or ("shared" if RTX else "fast"))
        if options.architecture is not None:
            capability(options.architecture)

    def build(self, bundle: Bundle, graphs: Sequence[GraphSpec], on_build: OnBuild | None = None) -> dict[str, Path]:
        """Fill the engine cache. TensorRT-RTX does it without a GPU for "shared"."""
        if gpu_count() == 0 and not (RTX and self.options.memory == "shared"):
            raise EngineError(
                "engine tensorrt builds without an NVIDIA GPU only with TensorRT-RTX and memory 'shared'; "
                "none is visible here"
            )
        if gpu_count():
            use_device(self.options.device)
        specs = {spec.file: spec for spec in graphs}

        def compile_into(file: str, directory: Path) -> None:
            read_graphs(bundle, [specs[file]])
            plan = build_engine(bundle.file(file), specs[file], self.options)
            bundle.check_unchanged(name for name in (file, bundle.manifest.weights) if name)  # TensorRT opens by name
            (directory / _PLAN).write_bytes(plan)

        return entries(self._keys(bundle, graphs), compile_into, on_build)

    def load(
        self,
        bundle: Bundle,
        graphs: Sequence[GraphSpec],
        on_build: OnBuild | None = None,
        instead: Instead | None = None,
    ) -> dict[str, TensorRtExecutable]:
        if instead:
            raise EngineError("tensorrt takes no adapters yet; fuse the LoRA at export (tgate-export --lora)")
        number = self.options.device
        self._need_gpu()
        if self.options.build:
            places = self.build(bundle, graphs, on_build)
        else:
            places = ready_entries(self._keys(bundle, graphs), self.name, bundle.path)
        read_graphs(bundle, graphs)
        device = _Device(number)
        models = {spec.file: bundle.file(spec.file) for spec in graphs}
        shared = self.options.memory == "shared"
        spans = {file: weight_spans(read_model(model)) if shared else {} for file, model in models.items()}
        weights = bundle.file(bundle.manifest.weights) if bundle.manifest.weights else Path()
        addresses = device.upload(weights, {span for of in spans.values() for span in of.values()})
        engines = {file: self._engine(device, model, places[file]) for file, model in models.items()}
        device.scratch = DeviceMemory(max(engine.device_memory_size_v2 for engine in engines.values()), number)
        executables = {}
        for spec in graphs:
            check_tensors(engines[spec.file], spec, set(spans[spec.file]))
            own = {name: addresses[span] for name, span in spans[spec.file].items()}
            executables[spec.file] = TensorRtExecutable(engines[spec.file], spec, device, own)
        return executables

    def allocate(self, shape: tuple[int, ...], dtype: str) -> DeviceBuffer:
        self._need_gpu()
        return DeviceBuffer.zeros(shape, dtype, self.options.device)

    def _need_gpu(self) -> None:
        if gpu_count() <= self.options.device:
            none = f"no number {self.options.device}" if gpu_count() else "none"
            raise EngineError(
                f"engine tensorrt needs an NVIDIA GPU; {none} is visible here (`tgate build` can build without one)"
            )

    def _keys(self, bundle: Bundle, graphs: Sequence[GraphSpec]) -> dict[str, dict[str, Any]]:
        return {spec.file: self.key(bundle, spec) for spec in graphs}

    def key(self, bundle: Bundle, spec: GraphSpec) -> dict[str, Any]:
        """What the engine of a graph is made from.

        The weights only where it is refitted: REFIT_IDENTICAL lets TensorRT use what it knows of their values. An
        engine that takes them as inputs never saw them.
        """
        files = bundle.manifest.files
        fast = self.options.memory == "fast"
        return {
            "engine": f"{self.name} {self.version}",
            "polygraphy": POLYGRAPHY,
            "recipe": RECIPE,
            "flags": flags(self.options),
            "graph": sha256_of(bundle.file(spec.file)),  # what is compiled, whatever the manifest says of it
            "weights": files[bundle.manifest.weights].sha256 if fast and bundle.manifest.weights else "",
            "architecture": (self.options.architecture or "portable") if RTX else architecture(self.options.device),
            **interface_key(spec),
            "memory": self.options.memory,
        }

    def _engine(self, device: _Device, model: Path, entry: Path) -> Any:
        engine = device.runtime.deserialize_cuda_engine((entry / _PLAN).read_bytes())
        if engine is None:
            raise EngineError(f"TensorRT {self.version} cannot load {model.name} here: {log.take('no reason given')}")
        if self.options.memory == "fast":
            logger = polygraphy.get_trt_logger()
            refitter = trt.Refitter(engine, logger)
            # From the ONNX file, by the parser's own names for its initializers, inline ones too.
            parsed = trt.OnnxParserRefitter(refitter, logger).refit_from_file(str(model))
            if not parsed or not refitter.refit_cuda_engine():
                missing = ", ".join(refitter.get_missing_weights()[:4]) or "no reason given"
                raise EngineError(f"TensorRT cannot refit {model.name} from the bundle's weights: {log.take(missing)}")
        return engine


def make_runtime() -> Any:
    """TensorRT's runtime. What it has to unpack in order to load stays in memory, out of shared directories."""
    runtime = trt.Runtime(polygraphy.get_trt_logger())
    runtime.tempfile_control_flags = 1 << int(trt.TempfileControlFlag.ALLOW_IN_MEMORY_FILES)
    return runtime


def check_tensors(engine: Any, spec: GraphSpec, weights: set[str]) -> None:
    """Raises :class:`EngineError` where an engine has other inputs and outputs than ``spec`` and ``weights``."""
    dtypes: dict[Any, dict[str, str]] = {trt.TensorIOMode.INPUT: {}, trt.TensorIOMode.OUTPUT: {}}
    for name in map(engine.get_tensor_name, range(engine.num_io_tensors)):
        if name not in weights:
            kind = engine.get_tensor_dtype(name)
            dtypes[engine.get_tensor_mode(name)][name] = _DTYPE_OF.get(kind, str(kind))
    check_interface(spec, *dtypes.values())
