"""One protocol for every engine: load a graph, allocate buffers, bind buffers to a graph, call it.

An engine knows graphs and memory. It knows nothing of plans, prompts or the method.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypedDict, TypeVar

import numpy as np
from numpy.typing import NDArray

from tgate_engine.bundle import Bundle
from tgate_engine.dtypes import storage
from tgate_engine.errors import EngineError
from tgate_engine.graph import BATCH, GraphSpec
from tgate_runtime.weights import Weight

OnBuild = Callable[[int, int, str], None]
"""Hears of graphs that an engine has to compile first: how many are done, of how many, and the name of the one that is
next, its file's without the ending; at the end, of the last one."""
PRECISIONS = ("f32", "bf16", "f16")
MEMORIES = ("shared", "fast")


Instead = Mapping[str, Weight]
"""Weights in place of those that a bundle's file has under these names."""


class Buffer(Protocol):
    """A tensor at a fixed address for as long as this object lives; whoever allocated it owns it.

    ``dtype`` is the manifest's name. ``shape`` is fixed; its first dimension, where there is one, are the rows.
    ``address`` is the first byte, on the engine's device. Contents start as zeros. One thread at a time.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    @property
    def address(self) -> int: ...

    def rows(self, first: int, count: int) -> Buffer:
        """A view of ``count`` rows from ``first`` on, in the same memory: it is written where this one is, and can be
        bound and viewed as this one can. The memory lives as long as any view of it. Raises :class:`EngineError` for
        rows that are not there."""

    def write(self, array: NDArray[Any]) -> None:
        """Copy ``array`` in. Its shape must be the buffer's (or broadcast to it) and its dtype the storage dtype
        (:func:`tgate_engine.dtypes.storage`). Raises :class:`EngineError` otherwise."""

    def read(self) -> NDArray[Any]:
        """A copy in host memory, in the storage dtype."""

    def copy(self, source: Buffer) -> None:
        """Copy the contents of ``source`` in, on the device; done when this returns. It is a buffer of the same
        engine, shape and dtype, or this raises :class:`EngineError`, and it shares no memory with this one."""


class Call(Protocol):
    """One graph with its buffers bound. Calling it runs the graph once and returns when the outputs are written.

    It keeps the buffers and the graph alive. Calls that share no written buffer may run in different threads at
    once; one Call runs in one thread at a time. Raises :class:`EngineError` where the engine fails.
    """

    @property
    def addresses(self) -> Mapping[str, int]:
        """The address of each bound input and output."""

    def __call__(self) -> None: ...


class Executable(Protocol):
    """One loaded graph. Immutable; any number of threads may bind and run it at once."""

    def bind(self, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> Call:
        """A :class:`Call` on these buffers, which are for as many images as the inputs have rows. Every input of the
        graph must be there. Outputs may be left out, all but one: what is left out is written nowhere. The others may
        hold anything from then on until the call: an engine may run the graph to warm up. Raises :class:`EngineError`
        for a name that the graph does not have, and for a buffer of another dtype or shape."""


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
        if self.architecture is not None and not isinstance(self.architecture, str):
            raise EngineError(f"an architecture is a text such as sm_90, got {self.architecture!r:.60}")
        if not isinstance(self.build, bool):
            raise EngineError(f"build must be True or False, got {self.build!r:.60}")
        for what, known in (("precision", PRECISIONS), ("memory", MEMORIES)):
            got: object = getattr(self, what)
            if got is not None and (not isinstance(got, str) or got not in known):
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


class Builder(Protocol):
    """What makes of a bundle's graphs what an engine wants, ahead of time."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...

    def build(self, bundle: Bundle, graphs: Sequence[GraphSpec], on_build: OnBuild | None = None) -> Mapping[str, Path]:
        """Compile what :meth:`Engine.load` would have to compile, into the engine cache, and what libtgate's engine of
        the name takes from here, into the bundle's folder: what is there now, by the graphs' files. Nothing for an
        engine that compiles nothing ahead of time. Raises as :meth:`Engine.load` does."""


class Engine(Builder, Protocol):
    """One engine with its options, settled: what was left to it is filled in. Immutable and thread-safe."""

    @property
    def options(self) -> EngineOptions: ...

    def load(
        self,
        bundle: Bundle,
        graphs: Sequence[GraphSpec],
        on_build: OnBuild | None = None,
        instead: Instead | None = None,
    ) -> Mapping[str, Executable]:
        """Those graphs of an opened bundle, by their files, over one set of weights. The engine reads no ONNX file
        that :func:`tgate_runtime.graph_check.read_graphs` has not let through. ``instead``: weights to take in place of
        the file's, by their names there and of their shapes and dtypes.

        Raises :class:`~tgate_engine.errors.BundleError` for a graph that is not let through, and :class:`EngineError`
        in one line where the engine cannot run a graph, or where a graph does not have the inputs and outputs of its
        :class:`~tgate_engine.graph.GraphSpec`.
        """

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """A buffer of zeros on the engine's device, owned by the caller."""


# --- what every engine checks -------------------------------------------------------------------

B = TypeVar("B", bound=Buffer)


def fitted(array: NDArray[Any], shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """``array`` as a read-only view of a buffer's shape. Raises :class:`EngineError` as :meth:`Buffer.write` must."""
    if array.dtype != storage(dtype):
        raise EngineError(f"a buffer of {dtype} takes {storage(dtype)} arrays, got {array.dtype}")
    try:
        return np.broadcast_to(array, shape)
    except ValueError:
        raise EngineError(f"a buffer of shape {shape} takes no array of shape {array.shape}") from None


def matched(source: Buffer, target: B) -> B:
    """``source``, seen to be a buffer like ``target``. Raises :class:`EngineError` as :meth:`Buffer.copy` must."""
    if not isinstance(source, type(target)):
        raise EngineError(
            f"a {type(target).__name__} takes no copy of a {type(source).__name__}: they are of two engines"
        )
    if (source.dtype, source.shape) != (target.dtype, target.shape):
        raise EngineError(
            f"a buffer of {target.dtype} {list(target.shape)} takes no copy of one of {source.dtype} "
            f"{list(source.shape)}"
        )
    return source


def row_shape(shape: tuple[int, ...], first: int, count: int) -> tuple[int, ...]:
    """The shape of a view of those rows. Raises :class:`EngineError` as :meth:`Buffer.rows` must."""
    if not (shape and 0 <= first < first + count <= shape[0]):
        raise EngineError(f"a buffer of shape {shape} has no {count} rows from row {first} on")
    return (count, *shape[1:])


def check_buffers(spec: GraphSpec, inputs: Mapping[str, Buffer], outputs: Mapping[str, Buffer]) -> None:
    """Raises :class:`EngineError` for buffers that :meth:`Executable.bind` must not take for a graph of ``spec``."""
    takes = {tensor.name: tensor for tensor in spec.inputs}
    gives = {tensor.name: tensor for tensor in spec.outputs}
    if inputs.keys() != takes.keys():
        odd = ", ".join(sorted(inputs.keys() ^ takes.keys()))
        raise EngineError(f"graph {spec.file}: inputs missing or not known: {odd}")
    if not outputs:
        raise EngineError(f"graph {spec.file}: bind at least one of its outputs")
    if not outputs.keys() <= gives.keys():
        raise EngineError(f"graph {spec.file} has no output {', '.join(sorted(outputs.keys() - gives.keys()))}")
    least, most = spec.batch
    batch = spec.batch_of({name: buffer.shape for name, buffer in inputs.items()})
    for tensors, buffers in ((takes, inputs), (gives, outputs)):
        for name, buffer in buffers.items():
            tensor = tensors[name]
            if buffer.dtype != tensor.dtype:
                raise EngineError(f"graph {spec.file}: {name} is {tensor.dtype}, got a buffer of {buffer.dtype}")
            if buffer.shape != tensor.resolve(batch) or (BATCH in tensor.shape and not least <= batch <= most):
                shape = f"[{', '.join(map(str, tensor.shape))}]"
                raise EngineError(
                    f"graph {spec.file}: {name} is {shape} for {least} to {most} images, got a buffer of "
                    f"{list(buffer.shape)}"
                )


def check_interface(spec: GraphSpec, inputs: Mapping[str, str], outputs: Mapping[str, str]) -> None:
    """Raises :class:`EngineError` where a loaded graph does not have the inputs and outputs of ``spec``. ``inputs``,
    ``outputs``: the dtypes of those that it has, by the manifest's names."""
    for what, got, tensors in (("inputs", inputs, spec.inputs), ("outputs", outputs, spec.outputs)):
        if odd := got.items() ^ {(tensor.name, tensor.dtype) for tensor in tensors}:
            names = ", ".join(f"{name} {dtype}" for name, dtype in sorted(odd))
            raise EngineError(f"{spec.file} does not have the {what} its manifest says: {names}; export it again")
