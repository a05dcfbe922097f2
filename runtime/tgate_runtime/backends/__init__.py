"""One protocol for every engine: load a graph, allocate buffers, bind buffers to a graph, call it.

An engine knows graphs and memory. It knows nothing of plans, prompts or the method.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, TypedDict, Unpack

import numpy as np
from numpy.typing import NDArray

from tgate_engine.bundle import Bundle
from tgate_engine.errors import EngineError
from tgate_engine.manifest import GraphSpec
from tgate_runtime.dtypes import storage

OnBuild = Callable[[int, int, str], None]
"""Hears of graphs that an engine has to compile first: how many are done, of how many, and the name of the one that is
next; at the end, of the last one."""
PRECISIONS = ("f32", "bf16", "f16")
MEMORIES = ("shared", "fast")


class Buffer(Protocol):
    """A tensor at a fixed address for as long as this object lives; whoever allocated it owns it.

    ``dtype`` is the manifest's name. ``shape`` is fixed. ``address`` is the first byte, on the engine's device.
    Contents start as zeros. One thread at a time.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def address(self) -> int: ...

    def write(self, array: NDArray[Any]) -> None:
        """Copy ``array`` in. Its shape must be the buffer's (or broadcast to it) and its dtype the storage dtype
        (:func:`tgate_runtime.dtypes.storage`). Raises :class:`EngineError` otherwise."""

    def read(self) -> NDArray[Any]:
        """A copy in host memory, in the storage dtype."""


class Call(Protocol):
    """One graph with its buffers bound. Calling it runs the graph once and returns when the outputs are written.

    It keeps the buffers and the graph alive. Calls that share no written buffer may run in different threads at
    once; one Call runs in one thread at a time. Raises :class:`EngineError` where the engine fails.
    """

    @property
    def addresses(self) -> Mapping[str, int]:
        """The address that the engine was given for each bound input and output."""

    def __call__(self) -> None: ...


class Executable(Protocol):
    """One loaded graph. Immutable; any number of threads may bind and run it at once."""

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        """A :class:`Call` on these buffers. Every input of the graph must be there. Outputs may be left out, all but
        one: what is left out is written nowhere. Raises :class:`EngineError` for a name the graph does not have."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What a caller may choose about an engine; None leaves it to the engine, which says what it chose.

    ``threads``: of one graph call, on a CPU, at most :func:`most_threads`. ``device``: the GPU's number.
    ``architecture``: what GPU to compile for where there is none, such as "sm_90". ``precision``: "f32", "bf16" or
    "f16", what the engine computes in. ``memory``: "shared" keeps one copy of the weights for all graphs of a bundle,
    "fast" lets the engine make private copies in the layouts that it likes best. ``build``: whether an engine that
    compiles ahead of time may compile what its cache does not hold, which can take minutes, when a bundle is opened.
    """

    threads: int | None = None
    device: int = 0
    architecture: str | None = None
    precision: str | None = None
    memory: str | None = None
    build: bool = True

    def __post_init__(self) -> None:
        if self.threads is not None and not (_whole(self.threads) and 1 <= self.threads <= most_threads()):
            raise EngineError(
                f"threads must be a whole number, at least 1 and here at most {most_threads()}, got {self.threads!r}"
            )
        if not _whole(self.device) or self.device < 0:
            raise EngineError(f"a device is a whole number from 0, got {self.device!r}")
        for what, got, known in (("precision", self.precision, PRECISIONS), ("memory", self.memory, MEMORIES)):
            if got is not None and got not in known:
                raise EngineError(f"{what} must be one of {', '.join(known)}, got {got!r}")


def most_threads() -> int:
    """More threads than that help no engine here, and thousands of them make a process that cannot be stopped."""
    return max(64, 8 * (os.cpu_count() or 1))


def _whole(number: object) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


class Options(TypedDict, total=False):
    """The fields of :class:`EngineOptions` as keyword arguments."""

    threads: int | None
    device: int
    architecture: str | None
    precision: str | None
    memory: str | None
    build: bool


class Backend(Protocol):
    """One engine with its options, settled: what was left to it is filled in. Immutable and thread-safe."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def options(self) -> EngineOptions: ...

    def build(self, bundle: Bundle, graphs: Sequence[str], on_build: OnBuild | None = None) -> Mapping[str, Path]:
        """Compile what :meth:`load` would have to compile, into the engine cache: graphs and their entries there.
        Nothing for an engine that compiles nothing ahead of time. Raises as :meth:`load` does."""

    def load(self, bundle: Bundle, graphs: Sequence[str], on_build: OnBuild | None = None) -> Mapping[str, Executable]:
        """Those graphs of an opened bundle, by name, over one set of weights.

        Raises :class:`EngineError` in one line where the engine cannot run a graph, or where a graph does not have the
        inputs and outputs of its :class:`~tgate_engine.manifest.GraphSpec`.
        """

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """A buffer of zeros on the engine's device, owned by the caller."""


def fitted(array: NDArray[Any], shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """``array`` as a read-only view of a buffer's shape. Raises :class:`EngineError` as :meth:`Buffer.write` must."""
    if array.dtype != storage(dtype):
        raise EngineError(f"a buffer of {dtype} takes {storage(dtype)} arrays, got {array.dtype}")
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        raise EngineError(f"a buffer of shape {shape} takes no array of shape {array.shape}") from None


def check_buffers(graph: str, spec: GraphSpec, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
    """Raises :class:`EngineError` for buffers that :meth:`Executable.bind` must not take for a graph of ``spec``."""
    takes = {tensor.name: tensor.dtype for tensor in spec.inputs}
    gives = {tensor.name: tensor.dtype for tensor in spec.outputs}
    if inputs.keys() != takes.keys():
        odd = ", ".join(sorted(inputs.keys() ^ takes.keys()))
        raise EngineError(f"graph {graph}: inputs missing or not known: {odd}")
    if not outputs:
        raise EngineError(f"graph {graph}: bind at least one of its outputs")
    if not outputs.keys() <= gives.keys():
        raise EngineError(f"graph {graph} has no output {', '.join(sorted(outputs.keys() - gives.keys()))}")
    for name, buffer in (*inputs.items(), *outputs.items()):
        want = takes.get(name) or gives[name]
        if buffer.dtype != want:
            raise EngineError(f"graph {graph}: {name} is {want}, got a buffer of {buffer.dtype}")


def check_interface(spec: GraphSpec, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
    """Raises :class:`EngineError` where a loaded graph does not have the inputs and outputs of ``spec``; given are the
    dtypes of those that it has, by the manifest's names."""
    for what, got, wanted in (("inputs", inputs, spec.inputs), ("outputs", outputs, spec.outputs)):
        if odd := got.items() ^ {(tensor.name, tensor.dtype) for tensor in wanted}:
            told = ", ".join(f"{name} {dtype}" for name, dtype in sorted(odd))
            raise EngineError(f"{spec.file} does not have the {what} its manifest says: {told}; export it again")


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An entry of :data:`ENGINES`: where an engine's file is, the extra that brings what it needs, what it runs on.

    ``needs``: the least version of each distribution that it may take, as that extra says; what is not installed may be
    there in another way, which importing it tells.
    """

    module: str
    cls: str
    extra: str
    runs_on: str
    needs: Mapping[str, str]

    def backend(self, options: EngineOptions) -> Backend:
        """Import the engine and settle its options. Raises :class:`EngineError` where it is missing or unfit here."""
        if self.runs_on == "CPU" and (options.device or options.architecture):
            raise EngineError(f"engine {self.name} runs on the CPU; leave out --device and --architecture")
        install = f"pip install 'tgate-engine[{self.extra}]'"
        for distribution, least in self.needs.items():
            version = _version(distribution)
            if version is not None and _numbers(version) < _numbers(least):
                raise EngineError(f"engine {self.name} needs {distribution} {least} or later, got {version}: {install}")
        try:
            module = importlib.import_module(f"tgate_runtime.backends.{self.module}")
            found: Backend = getattr(module, self.cls)(options)
        except ModuleNotFoundError as error:
            if (error.name or "").startswith("tgate_"):
                raise
            raise EngineError(f"engine {self.name} needs {error.name}, which is not installed: {install}") from None
        except (ImportError, OSError, AttributeError) as error:  # a library that is broken, or not the one it should be
            raise EngineError(
                f"engine {self.name} is installed, but does not load here ({_said(error)}): {install} --force-reinstall"
            ) from error
        return found

    @property
    def name(self) -> str:
        """The name users give it."""
        return next(name for name, engine in ENGINES.items() if engine is self)


def _version(distribution: str) -> str | None:
    """What is installed of that name."""
    try:
        return str(metadata.version(distribution))
    except metadata.PackageNotFoundError:
        return None


def _numbers(version: str) -> tuple[int, ...]:
    """A version for comparison: 2.13.0 of 2.13.0+cpu."""
    return tuple(int(digits) for digits in re.findall(r"\d+", version.partition("+")[0]))


def _said(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


_TENSORRT = {"tensorrt-rtx-cu13": "1.7", "polygraphy": "0.53.6", "cuda-bindings": "13", "onnx": "1.23"}

ENGINES: Mapping[str, Engine] = {
    "ort-cpu": Engine(module="ort", cls="OrtCpu", extra="cpu", runs_on="CPU", needs={"onnxruntime": "1.31"}),
    "ort-cuda": Engine(
        module="ort_cuda", cls="OrtCuda", extra="cuda", runs_on="NVIDIA GPU", needs={"onnxruntime-gpu": "1.31"}
    ),
    "openvino": Engine(
        module="openvino", cls="OpenVino", extra="openvino", runs_on="CPU", needs={"openvino": "2026.2"}
    ),
    "aoti": Engine(
        module="aoti", cls="Aoti", extra="aoti", runs_on="CPU, NVIDIA GPU", needs={"torch": "2.11", "onnx": "1.23"}
    ),
    "tensorrt": Engine(module="tensorrt", cls="TensorRt", extra="tensorrt", runs_on="NVIDIA GPU", needs=_TENSORRT),
}
"""The engines there are, by the name that ``Session.open(engine=...)`` takes."""


def backend(engine: str, **options: Unpack[Options]) -> Backend:
    """The engine of that name. Raises :class:`EngineError` for an unknown one, one that is not installed, or options
    that it cannot follow."""
    if engine not in ENGINES:
        raise EngineError(f"there is no engine {engine!r}; the engines are {', '.join(ENGINES)}")
    return ENGINES[engine].backend(EngineOptions(**options))


def installed() -> list[dict[str, str]]:
    """What there is of each engine here: ``name``, ``runs_on``, ``version`` (empty where it is not installed), and
    ``says``: "ready", or in one line what is missing and what brings it."""
    found = []
    for name, engine in ENGINES.items():
        version, says = "", "ready"
        try:
            opened = backend(name)
            version = opened.version
            opened.allocate((1,), "float32")  # an engine that can build anywhere may still have nothing to run on
        except EngineError as error:
            says = str(error)
        except Exception as error:  # whatever ails one engine, the others are still listed
            says = f"engine {name} failed ({_said(error)})"
        found.append({"name": name, "runs_on": engine.runs_on, "version": version, "says": says})
    return found
