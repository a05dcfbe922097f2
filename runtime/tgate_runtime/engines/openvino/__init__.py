"""OpenVINO on the CPU: on most processors the fastest engine, above all in bfloat16.

Each graph is compiled when the bundle is opened, with its weights packed for this processor, in the precision of the
computation: a private copy for each graph, or with ``memory="shared"`` one for all of them, which are branches of one
model then: see :mod:`~tgate_runtime.engines.openvino.branches`. Inputs, outputs and carries keep the bundle's dtype.

Where the network is not computed in float32, what it makes of the timestep still is, in a small model of its own:
see :mod:`~tgate_runtime.engines.openvino.timestep`.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov

from tgate_engine.bundle import Bundle
from tgate_engine.dtypes import DTYPES
from tgate_engine.errors import EngineError
from tgate_engine.graph import GraphSpec
from tgate_engine.underway import Cancellable
from tgate_runtime.engines.host import CpuBuffer
from tgate_runtime.engines.openvino.branches import (
    BRANCH,
    Ports,
    constants,
    join,
    name_of,
    put,
    share_weights,
    which_share,
)
from tgate_runtime.engines.openvino.timestep import part_name, split_time
from tgate_runtime.engines.protocol import EngineOptions, Instead, OnBuild, check_buffers, check_interface
from tgate_runtime.graph_check import read_graphs
from tgate_runtime.weights import read_places

_DTYPE_OF = {dtype.short: name for name, dtype in DTYPES.items()}
_CAPABILITIES = {"f32": "FP32", "bf16": "BF16", "f16": "FP16"}
_UNBOUND_BYTES = 4 << 20
"""What a call's own request may hold for outputs that nobody binds. A graph with more takes so long that binding anew
does not matter."""


class _Request:
    """An infer request: the engine's tensors of one call at a time. One thread at a time."""

    def __init__(self, compiled: Any, time: Any, spec: GraphSpec, ports: Ports) -> None:
        self._infer = compiled.create_infer_request()
        self._ports = ports.names
        if ports.branch is not None:
            self._infer.set_tensor(BRANCH, ov.Tensor(np.array(ports.branch, np.int32)))
        self._time: Any = None
        self._time_inputs: list[str] = []
        self._time_outputs = 0
        if time is not None:
            self._time = time.create_infer_request()
            self._time_inputs = [name_of(port, spec.input_names()) for port in time.inputs]
            self._time_outputs = len(time.outputs)
        # What nobody binds is written to the request's own memory; a carry may have been bound there before.
        self._own = {tensor.name: self._infer.get_tensor(self._ports[tensor.name]) for tensor in spec.outputs}

    def bind(self, tensors: Mapping[str, Any]) -> None:
        """Bind these inputs and outputs, and no others."""
        for name, tensor in {**self._own, **tensors}.items():
            self._infer.set_tensor(self._ports[name], tensor)
            if name in self._time_inputs:
                self._time.set_tensor(name, tensor)

    def run(self) -> None:
        """Run the graph on what is bound."""
        if self._time is not None:
            self._time.infer()
            for number in range(self._time_outputs):  # each time: where the batch may change, so may their memory
                self._infer.set_tensor(self._ports[part_name(number)], self._time.get_output_tensor(number))
        # With one thread OpenVINO looks for this in asynchronous calls alone, which cost 15 µs more and may outlive an
        # exception; such a call ends with the process.
        with Cancellable(self._infer.cancel):
            self._infer.infer()


class _Call:
    """A :class:`~tgate_runtime.engines.protocol.Call`: views of its buffers, and a request to run them in.

    Binding costs 0.1 to 0.4 ms, so a call keeps a request of its own, bound once, where that takes little memory.
    """

    def __init__(
        self, graph: OpenVinoExecutable, inputs: Mapping[str, CpuBuffer], outputs: Mapping[str, CpuBuffer]
    ) -> None:
        self._graph = graph
        self._buffers = {**inputs, **outputs}  # the views hold addresses; this holds the memory
        self._tensors = {name: _view(buffer) for name, buffer in self._buffers.items()}
        self.addresses = {name: buffer.address for name, buffer in self._buffers.items()}
        self._own: _Request | None = None
        if graph.unbound_bytes(inputs, outputs) <= _UNBOUND_BYTES:
            self._own = graph.request()
            self._own.bind(self._tensors)

    def __call__(self) -> None:
        try:
            if self._own is not None:
                self._own.run()
                return
            with self._graph.borrow() as request:
                request.bind(self._tensors)
                request.run()
        except Exception as error:  # the engine raises RuntimeError
            raise self._graph.failure(error) from error


class OpenVinoExecutable:
    """A :class:`~tgate_runtime.engines.protocol.Executable`: a graph's ports in a compiled model, and requests that its
    calls share. ``memory``: what is to live as long."""

    def __init__(self, compiled: Any, time: Any, spec: GraphSpec, ports: Ports, memory: object = None) -> None:
        self.name = spec.file
        self._memory = memory
        self._compiled = compiled
        self._ports = ports
        self._time = time
        self._spec = spec
        self._idle: list[_Request] = []  # as many as ran at once; appending and popping are atomic

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> _Call:
        check_buffers(self._spec, inputs, outputs)
        try:
            return _Call(self, inputs, outputs)
        except Exception as error:  # the engine raises RuntimeError
            raise self.failure(error) from error

    def request(self) -> _Request:
        """A new one."""
        return _Request(self._compiled, self._time, self._spec, self._ports)

    @contextmanager
    def borrow(self) -> Iterator[_Request]:
        """A request that nobody else uses meanwhile. One that fails is dropped."""
        try:
            request = self._idle.pop()
        except IndexError:
            request = self.request()
        yield request
        self._idle.append(request)

    def failure(self, error: Exception) -> EngineError:
        """What the engine says, in one line."""
        return EngineError(f"graph {self.name} failed in OpenVINO: {_short(error)}")

    def unbound_bytes(self, inputs: Mapping[str, CpuBuffer], outputs: Mapping[str, CpuBuffer]) -> int:
        """What a request holds for the outputs that a call on these buffers leaves out."""
        batch = self._spec.batch_of({name: buffer.shape for name, buffer in inputs.items()})
        return sum(tensor.size_bytes(batch) for tensor in self._spec.outputs if tensor.name not in outputs)


class OpenVino:
    """The ``openvino`` engine. ``precision``: bf16 by default where the processor multiplies it, f32 elsewhere."""

    name = "openvino"
    version = str(ov.__version__).partition("-")[0]

    def __init__(self, options: EngineOptions) -> None:
        self._core = _core()
        able = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        precision = options.precision or ("bf16" if "BF16" in able else "f32")
        if _CAPABILITIES[precision] not in able:
            raise EngineError(f"this processor does not compute in {precision}; OpenVINO offers {', '.join(able)} here")
        self.options = replace(options, precision=precision, memory=options.memory or "fast")

    def build(self, bundle: Bundle, graphs: Sequence[GraphSpec], on_build: OnBuild | None = None) -> dict[str, Path]:
        return {}

    def load(
        self,
        bundle: Bundle,
        graphs: Sequence[GraphSpec],
        on_build: OnBuild | None = None,
        instead: Instead | None = None,
    ) -> dict[str, OpenVinoExecutable]:
        # OpenVINO finds a graph's weights beside the file it reads and in no other way, so it is given the name.
        # Session.open sees afterwards that the name leads to what was checked here.
        read_graphs(bundle, graphs)
        if self.options.memory == "fast" or not bundle.manifest.weights:
            return {spec.file: self.load_graph(bundle.file(spec.file), spec, instead) for spec in graphs}
        weights = read_places(bundle.file(bundle.manifest.weights)).keys()
        parts = [self._read(bundle.file(spec.file), spec, instead) for spec in graphs]
        shares = which_share([part.model for part in parts], weights)
        alone = [part for part, shared in zip(parts, shares, strict=True) if not shared]
        together = [part for part, shared in zip(parts, shares, strict=True) if shared]
        found = {part.spec.file: self._alone(part) for part in alone} | self._joined(together, weights)
        return {spec.file: found[spec.file] for spec in graphs}

    def allocate(self, shape: tuple[int, ...], dtype: str) -> CpuBuffer:
        return CpuBuffer.zeros(shape, dtype)

    def load_graph(self, path: Path, spec: GraphSpec, instead: Instead | None = None) -> OpenVinoExecutable:
        """The graph of one file. Raises :class:`EngineError` as :meth:`load` does."""
        return self._alone(self._read(path, spec, instead))

    def _read(self, path: Path, spec: GraphSpec, instead: Instead | None) -> _Part:
        with self._loading(spec):
            model = self._core.read_model(str(path))
            _take(model, instead or {})
            inputs, outputs = _dtypes(model.inputs, spec.input_names()), _dtypes(model.outputs, spec.output_names())
            time = None if self.options.precision == "f32" else split_time(model)
        check_interface(spec, inputs, outputs)
        return _Part(spec, model, time)

    def _alone(self, part: _Part) -> OpenVinoExecutable:
        with self._loading(part.spec):
            compiled = self._compiled(part.model)
            return OpenVinoExecutable(compiled, self._timed(part), part.spec, Ports(None, {n: n for n in part.names()}))

    def _joined(self, parts: Sequence[_Part], weights: Collection[str]) -> dict[str, OpenVinoExecutable]:
        """Graphs that read weights of one another, in one compiled model."""
        if not parts:
            return {}
        precision = next(name for name, dtype in DTYPES.items() if dtype.short == self.options.precision)
        with self._loading(parts[0].spec):
            models = [part.model for part in parts]
            memory = share_weights(models, weights, precision)
            whole, ports = join(models, [part.names() for part in parts])
            compiled = self._compiled(whole)
            return {
                part.spec.file: OpenVinoExecutable(compiled, self._timed(part), part.spec, where, memory)
                for part, where in zip(parts, ports, strict=True)
            }

    def _timed(self, part: _Part) -> Any:
        """The timestep's part, which is computed in float32."""
        return None if part.time is None else self._compiled(part.time, ov.Type.f32)

    def _compiled(self, model: Any, precision: Any = None) -> Any:
        settings = {
            "INFERENCE_PRECISION_HINT": precision or getattr(ov.Type, self.options.precision or "f32"),
            "PERFORMANCE_HINT": "LATENCY",
        }
        if self.options.threads is not None:
            settings["INFERENCE_NUM_THREADS"] = self.options.threads
        return self._core.compile_model(model, "CPU", settings)

    @contextmanager
    def _loading(self, spec: GraphSpec) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the engine raises RuntimeError
            raise EngineError(f"OpenVINO {self.version} cannot load {spec.file}: {_short(error)}") from error


@functools.cache
def _core() -> Any:
    """OpenVINO, opened once and kept for good. With each core its plugin for CPUs gives the thread another stack for
    signals, and with the core's end it frees that and puts back the one before: of two cores, if the first one goes
    first, one that is freed. The next signal that Python handles would end the process."""
    return ov.Core()


@dataclass(frozen=True)
class _Part:
    """A graph as it was read: what runs in the engine's precision, and what it makes of the timestep, or None."""

    spec: GraphSpec
    model: Any
    time: Any

    def names(self) -> list[str]:
        """Of the model's inputs and outputs."""
        made = [] if self.time is None else [part_name(number) for number in range(len(self.time.outputs))]
        return [*self.spec.input_names(), *self.spec.output_names(), *made]


def _take(model: Any, instead: Instead) -> None:
    """Put weights in place of the constants of their names."""
    known = {node.get_friendly_name(): node for node in constants(model)}
    for name in instead.keys() & known.keys():
        weight = instead[name]
        array = np.ascontiguousarray(weight.array)
        if weight.dtype == "bfloat16":
            new = ov.op.Constant(ov.Tensor(array, ov.Shape(weight.array.shape), ov.Type.bf16))
        else:
            new = ov.op.Constant(array)
        new.set_friendly_name(name)
        put(known[name].output(0), new)


def _dtypes(ports: Sequence[Any], names: Collection[str]) -> dict[str, str]:
    kinds = {name_of(port, names): port.element_type.get_type_name() for port in ports}
    return {name: _DTYPE_OF.get(kind, kind) for name, kind in kinds.items()}


def _view(buffer: CpuBuffer) -> Any:
    """The buffer's memory as a tensor of the engine. NumPy has no bfloat16, whose bits are given as they are."""
    if buffer.dtype == "bfloat16":
        return ov.Tensor(buffer.array, ov.Shape(buffer.shape), ov.Type.bf16)
    return ov.Tensor(buffer.array, shared_memory=True)


def _short(error: BaseException) -> str:
    """The last line of the engine's message that says something: those before it are places in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
