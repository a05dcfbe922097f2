"""ONNX Runtime on the CPU.

Buffers are NumPy memory; a graph reads and writes them by address through an I/O binding, so a step copies
nothing. An output that is not bound is computed into the engine's own arena and dropped after the call.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime as ort

from tgate_engine.bundle import Bundle
from tgate_engine.dtypes import DTYPES
from tgate_engine.errors import EngineError, shown
from tgate_engine.graph import GraphSpec
from tgate_engine.underway import Cancellable
from tgate_runtime.engines.host import CpuBuffer
from tgate_runtime.engines.protocol import EngineOptions, Instead, OnBuild, check_buffers, check_interface
from tgate_runtime.graph_check import ModelMessage, read_graphs
from tgate_runtime.weights import Weight

_LONGEST = 500  # characters of a message of the engine's
_DTYPE_OF = {f"tensor({dtype})": dtype for dtype in DTYPES} | {"tensor(float)": "float32"}


class _OrtCall:
    """A :class:`~tgate_runtime.engines.protocol.Call`: one I/O binding, made once."""

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
        self._buffers = (*inputs.values(), *outputs.values())  # the engine holds addresses; this holds the memory
        self.addresses: dict[str, int] = {}
        for bind, buffers in ((self._binding.bind_input, inputs), (self._binding.bind_output, outputs)):
            for name, buffer in buffers.items():
                bind(name, "cpu", 0, DTYPES[buffer.dtype].onnx, buffer.shape, buffer.address)
                self.addresses[name] = buffer.address

    def __call__(self) -> None:
        try:
            run_cancellable(self._session, self._binding, ort.RunOptions())
        except Exception as error:  # the engine raises RuntimeError and a dozen classes of its own
            raise EngineError(f"graph {self._graph} failed in ONNX Runtime: {first_line(error)}") from error


class OrtExecutable:
    """A :class:`~tgate_runtime.engines.protocol.Executable`: one ONNX Runtime session."""

    def __init__(
        self, session: ort.InferenceSession, spec: GraphSpec, values: Mapping[str, ort.OrtValue] | None = None
    ) -> None:
        """``values``: weights that the session reads where they lie."""
        self._session = session
        self._spec = spec
        self._values = values  # this holds the memory

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> _OrtCall:
        check_buffers(self._spec, inputs, outputs)
        return _OrtCall(self._spec.file, self._session, inputs, outputs)


class OrtCpu:
    """The ``ort-cpu`` engine.

    ``memory="fast"``, the default, lets ONNX Runtime lay out a private copy of the weights for each graph;
    ``"shared"`` has every graph read the weight file's own pages, and all of them work in one arena.
    """

    name = "ort-cpu"
    version = str(ort.__version__)

    def __init__(self, options: EngineOptions) -> None:
        if options.precision is not None:
            raise EngineError(
                "ort-cpu computes in the dtype that the bundle was exported with; leave out --precision, or take "
                "--engine openvino"
            )
        self.options = replace(options, memory=options.memory or "fast")
        if self.options.memory == "shared":
            _one_arena()

    def build(self, bundle: Bundle, graphs: Sequence[GraphSpec], on_build: OnBuild | None = None) -> dict[str, Path]:
        return {}

    def load(
        self,
        bundle: Bundle,
        graphs: Sequence[GraphSpec],
        on_build: OnBuild | None = None,
        instead: Instead | None = None,
    ) -> dict[str, OrtExecutable]:
        files = read_graphs(bundle, graphs)
        return {spec.file: self.load_graph(files[spec.file], bundle.path, spec, instead) for spec in graphs}

    def load_graph(self, data: bytes, folder: Path, spec: GraphSpec, instead: Instead | None = None) -> OrtExecutable:
        """The graph of an ONNX file's bytes, whose weights lie in ``folder``. Raises :class:`EngineError` as
        :meth:`load` does."""
        options = self._session_options()
        find_weights(options, folder)
        values = {name: on_the_host(weight) for name, weight in (instead or {}).items()}
        take_weights(options, data, values)
        try:
            session = ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # see _OrtCall
            raise EngineError(
                f"ONNX Runtime {self.version} cannot load {spec.file} on the CPU: {first_line(error)}{_hint(spec)}"
            ) from error
        check_nodes(session, spec)
        return OrtExecutable(session, spec, values)

    def allocate(self, shape: tuple[int, ...], dtype: str) -> CpuBuffer:
        return CpuBuffer.zeros(shape, dtype)

    def _session_options(self) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
        options.log_severity_level = 4  # fatal only: every error is raised as well, and reported once
        if self.options.threads is not None:
            options.intra_op_num_threads = self.options.threads
        # Each graph has a thread pool, and a trajectory changes graphs. Idle threads that spin take the cores from the
        # pool at work: on 2 cores shared with another job, a small SDXL's loop took 3 to 5 times as long with spinning.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        if self.options.memory == "shared":
            # The last level rewrites convolutions, and their weights, to another layout; prepacking copies the rest.
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
            options.add_session_config_entry("session.disable_prepacking", "1")
            options.add_session_config_entry("session.use_env_allocators", "1")
            # A planned block for each shape would lie beside what the first run left in the arena: on SD 1.5's sizes
            # 190 MB more, and no faster.
            options.enable_mem_pattern = False
        else:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        return options


def on_the_host(weight: Weight) -> ort.OrtValue:
    """A view of a weight for ONNX Runtime."""
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(weight.array, DTYPES[weight.dtype].onnx)


def take_weights(options: ort.SessionOptions, data: bytes, values: Mapping[str, ort.OrtValue]) -> None:
    """Have a session take ``values`` in place of the weights of those names in its graph, the file ``data``, before the
    graph is optimised: what is given as shared initializers comes too late for whatever is folded. They lie in the
    host's memory, and have to stay as long as the session."""
    if not values:
        return
    names = {initializer.name for initializer in ModelMessage.FromString(data).graph.initializer}
    own = {name: value for name, value in values.items() if name in names}
    options.add_external_initializers([*own], [*own.values()])


@functools.cache
def _one_arena() -> None:
    """Register the arena that sessions share: graphs that run in turn need the memory of the largest alone."""
    info = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    # Grow by what is asked for (1), not by powers of two; the other values are the engine's own choice.
    ort.create_and_register_allocator(info, ort.OrtArenaCfg({"arena_extend_strategy": 1}))


def run_cancellable(session: ort.InferenceSession, binding: Any, options: ort.RunOptions) -> None:
    """Run a graph so that it can be ended between two of its nodes: see :mod:`tgate_engine.underway`."""
    with Cancellable(lambda: setattr(options, "terminate", True)):
        session.run_with_iobinding(binding, options)


def find_weights(options: ort.SessionOptions, folder: Path) -> None:
    """Tell ONNX Runtime where the weights of a graph lie that it is given as bytes; it maps their file itself."""
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))


def check_nodes(session: ort.InferenceSession, spec: GraphSpec) -> None:
    """Raises :class:`EngineError` where a loaded graph does not have the inputs and outputs of ``spec``."""
    inputs, outputs = (
        {node.name: _DTYPE_OF.get(node.type, node.type) for node in nodes}
        for nodes in (session.get_inputs(), session.get_outputs())
    )
    check_interface(spec, inputs, outputs)


def first_line(error: BaseException) -> str:
    """The engine's message without its line breaks, source positions and status prefixes, and not all of it where it is
    long: it quotes names of the graph."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ", "", text)
    return shown(re.sub(r"/\S+\.(?:cc|h):\d+ \S+ ", "", text), _LONGEST)


def _hint(spec: GraphSpec) -> str:
    if any(tensor.dtype == "bfloat16" for tensor in (*spec.inputs, *spec.outputs)):
        return " (most of its CPU kernels take no bfloat16: export with --dtype fp32)"
    return ""
