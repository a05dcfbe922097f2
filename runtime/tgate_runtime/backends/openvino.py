"""OpenVINO on the CPU: on most processors the fastest engine, above all in bfloat16.

Each graph is compiled when the bundle is opened, with its weights packed for this processor, in the precision of the
computation: a private copy for each graph. Inputs, outputs and carries keep the bundle's dtype.

In bfloat16 the engine rounds what comes in to 8 bits, the timestep too: 801 becomes 800, and its sines and cosines
become those of another time, which on `mini-sdxl` moved the latents of four steps by half. So what a graph makes of
the timestep before the first matrix product is compiled as a small model of its own, in float32.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import openvino as ov
from openvino import opset13 as ops

from tgate_engine.bundle import Bundle
from tgate_engine.errors import EngineError
from tgate_engine.manifest import GraphSpec
from tgate_engine.rows import TIMESTEP
from tgate_runtime.backends import EngineOptions, OnBuild, check_buffers
from tgate_runtime.backends.host import CpuBuffer

_TYPES = {
    "float32": ov.Type.f32,
    "float16": ov.Type.f16,
    "bfloat16": ov.Type.bf16,
    "int64": ov.Type.i64,
    "uint8": ov.Type.u8,
}
_TIME = "of-timestep"
_PRODUCTS = ("MatMul", "Convolution")
_PRECISIONS = {"f32": ov.Type.f32, "bf16": ov.Type.bf16, "f16": ov.Type.f16}


_Place = tuple[int, tuple[int, ...]]  # an address may be free again, and taken by a buffer of another shape


class _Request:
    """An infer request and what it is bound to. One thread at a time."""

    def __init__(self, compiled: Any, time: Any, spec: GraphSpec) -> None:
        self.infer = compiled.create_infer_request()
        self._time: Any = None
        self._time_inputs: list[str] = []
        self._time_outputs: list[str] = []
        if time is not None:
            self._time = time.create_infer_request()
            self._time_inputs = [port.any_name for port in time.inputs]
            self._time_outputs = [port.any_name for port in time.outputs]
        # What nobody binds is written to the request's own memory; a carry may have been bound there before.
        self._own = {tensor.name: self.infer.get_tensor(tensor.name) for tensor in spec.outputs}
        self._bound: dict[str, _Place] = {}

    def bind(self, tensors: Mapping[str, tuple[_Place, Any]]) -> None:
        """Bind what is not bound yet: between two steps, little more than the ring of latents turns."""
        for name, (place, tensor) in tensors.items():
            if self._bound.get(name) != place:
                self.infer.set_tensor(name, tensor)
                if name in self._time_inputs:
                    self._time.set_tensor(name, tensor)
                self._bound[name] = place
        for name in self._own.keys() & self._bound.keys() - tensors.keys():
            self.infer.set_tensor(name, self._own[name])
            del self._bound[name]

    def run(self) -> None:
        """Run the graph on what is bound."""
        if self._time is not None:
            self._time.infer()
            for name in self._time_outputs:  # again each time: where the batch may change, so may their memory
                self.infer.set_tensor(name, self._time.get_tensor(name))
        self.infer.infer()


class _Call:
    """A :class:`~tgate_runtime.backends.Call`: views of its buffers, and requests to run them in."""

    def __init__(self, graph: OpenVinoExecutable, buffers: Mapping[str, CpuBuffer]) -> None:
        self._graph = graph
        self._buffers = tuple(buffers.values())  # the views hold addresses; this holds the memory
        self._tensors = {name: ((buffer.address, buffer.shape), _view(buffer)) for name, buffer in buffers.items()}
        self.addresses = {name: buffer.address for name, buffer in buffers.items()}

    def __call__(self) -> None:
        request = self._graph.take()
        try:
            request.bind(self._tensors)
            request.run()
        except Exception as error:  # the engine raises RuntimeError
            raise EngineError(f"graph {self._graph.name} failed in OpenVINO: {_short(error)}") from error
        self._graph.give_back(request)


class OpenVinoExecutable:
    """A :class:`~tgate_runtime.backends.Executable`: one compiled model, and as many requests as run at once."""

    def __init__(self, compiled: Any, time: Any, spec: GraphSpec) -> None:
        self.name = spec.file
        self._compiled = compiled
        self._time = time
        self._spec = spec
        self._idle = [_Request(compiled, time, spec)]
        self._lock = threading.Lock()

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> _Call:
        check_buffers(self.name, self._spec, inputs, outputs)
        return _Call(self, {**inputs, **outputs})

    def take(self) -> _Request:
        """A request that nobody uses."""
        with self._lock:
            if self._idle:
                return self._idle.pop()
        return _Request(self._compiled, self._time, self._spec)

    def give_back(self, request: _Request) -> None:
        """The request is free again."""
        with self._lock:
            self._idle.append(request)


class OpenVino:
    """The ``openvino`` engine. ``precision``: bf16 by default where the processor multiplies it, f32 elsewhere."""

    name = "openvino"
    version = str(ov.__version__).partition("-")[0]

    def __init__(self, options: EngineOptions) -> None:
        if options.memory == "shared":
            raise EngineError(
                "openvino packs the weights of each graph for itself; for one copy of them take --engine ort-cpu "
                "--memory shared"
            )
        self._core = ov.Core()
        able = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        precision = options.precision or ("bf16" if "BF16" in able else "f32")
        if precision == "f16" and "FP16" not in able:
            raise EngineError(f"this processor does not compute in f16; OpenVINO offers {', '.join(able)} here")
        self.options = replace(options, precision=precision, memory="fast")

    def build(self, bundle: Bundle, graphs: Sequence[str], on_build: OnBuild | None = None) -> dict[str, Path]:
        return {}

    def load(
        self, bundle: Bundle, graphs: Sequence[str], on_build: OnBuild | None = None
    ) -> dict[str, OpenVinoExecutable]:
        found = {}
        for name in graphs:
            spec = bundle.manifest.graphs[name]
            found[name] = self._load(str(bundle.file(spec.file)), spec)
        return found

    def allocate(self, shape: tuple[int, ...], dtype: str) -> CpuBuffer:
        return CpuBuffer(shape, dtype)

    def _load(self, path: str, spec: GraphSpec) -> OpenVinoExecutable:
        settings = {
            "INFERENCE_PRECISION_HINT": _PRECISIONS[self.options.precision or "f32"],
            "PERFORMANCE_HINT": "LATENCY",
        }
        if self.options.threads is not None:
            settings["INFERENCE_NUM_THREADS"] = self.options.threads
        try:
            model = self._core.read_model(path)
            time = None if self.options.precision == "f32" else _split_time(model)
            compiled = self._core.compile_model(model, "CPU", settings)
            if time is not None:
                time = self._core.compile_model(time, "CPU", {**settings, "INFERENCE_PRECISION_HINT": ov.Type.f32})
        except Exception as error:  # the engine raises RuntimeError
            raise EngineError(f"OpenVINO {self.version} cannot load {spec.file}: {_short(error)}") from error
        for what, found, wanted in (
            ("inputs", [p for p in compiled.inputs if not p.any_name.startswith(_TIME)], spec.inputs),
            ("outputs", compiled.outputs, spec.outputs),
        ):
            got = {(port.any_name, port.element_type.get_type_name()) for port in found}
            want = {(tensor.name, _TYPES[tensor.dtype].get_type_name()) for tensor in wanted}
            if got != want:
                odd = ", ".join(f"{name} {kind}" for name, kind in sorted(got ^ want))
                raise EngineError(f"{spec.file} does not have the {what} its manifest says: {odd}; export it again")
        return OpenVinoExecutable(compiled, time, spec)


def _split_time(model: Any) -> Any:
    """Cut what ``model`` makes of the timestep before its matrix products off it; a model of that part, or None.

    The part's outputs become inputs of ``model``, under names that begin with ``_TIME``.
    """
    inside = {column.get_friendly_name() for column in _timestep_columns(model)}
    frontier = []
    for node in model.get_ordered_ops():
        if node.get_friendly_name() not in inside:
            continue
        for output in node.outputs():
            uses = [use.get_node() for use in output.get_target_inputs()]
            if any(use.get_type_name() in _PRODUCTS for use in uses):
                frontier.append((node.get_friendly_name(), output.get_index()))
            else:
                inside.update(use.get_friendly_name() for use in uses)
    if not frontier:
        return None
    nodes = {node.get_friendly_name(): node for node in model.get_ordered_ops()}
    copy = model.clone()
    copies = {node.get_friendly_name(): node for node in copy.get_ordered_ops()}
    results = []
    for number, (name, index) in enumerate(frontier):
        made, wanted = copies[name].output(index), nodes[name].output(index)
        made.get_tensor().set_names({f"{_TIME}.{number}"})
        results.append(ops.result(made))
        given = ops.parameter(wanted.get_partial_shape(), wanted.get_element_type())
        given.output(0).get_tensor().set_names({f"{_TIME}.{number}"})
        for use in wanted.get_target_inputs():
            use.replace_source_output(given.output(0))
        model.add_parameters([given])
    model.validate_nodes_and_infer_types()
    return _without_idle_inputs(results, copy)


def _timestep_columns(model: Any) -> list[Any]:
    """The nodes that take the timestep out of the step's row."""
    if not any(port.any_name == "step" for port in model.inputs):
        return []
    uses = [use.get_node() for use in model.input("step").get_target_inputs()]
    picks = [node for node in uses if node.get_type_name() == "Gather"]
    columns = [(node, node.input_value(1).get_node()) for node in picks]
    return [
        node
        for node, column in columns
        if column.get_type_name() == "Constant" and column.data.reshape(-1).tolist() == [TIMESTEP]
    ]


def _without_idle_inputs(results: list[Any], model: Any) -> Any:
    """A model of ``results`` and of those parameters of ``model`` that they are computed from."""
    needed: dict[str, Any] = {}
    todo = list(results)
    while todo:
        for value in todo.pop().input_values():
            node = value.get_node()
            if node.get_friendly_name() not in needed:
                needed[node.get_friendly_name()] = node
                todo.append(node)
    return ov.Model(results, [p for p in model.get_parameters() if p.get_friendly_name() in needed], "time")


def _view(buffer: CpuBuffer) -> Any:
    """The buffer's memory as a tensor of the engine. NumPy has no bfloat16, whose bits are given as they are."""
    if buffer.dtype == "bfloat16":
        return ov.Tensor(buffer.array, ov.Shape(buffer.shape), ov.Type.bf16)
    return ov.Tensor(buffer.array, shared_memory=True)


def _short(error: BaseException) -> str:
    """The last line of the engine's message that says something: those before it are places in its source."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
