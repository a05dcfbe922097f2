"""One protocol for every engine: load a graph, allocate buffers, bind buffers to a graph, call it.

An engine knows graphs and memory. It knows nothing of plans, prompts or the method.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from tgate_engine.errors import EngineError
from tgate_engine.manifest import GraphSpec


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


class Backend(Protocol):
    """One engine, with its settings. Immutable and thread-safe."""

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> str: ...
    @property
    def threads(self) -> int | None:
        """Threads that one graph may use; None leaves it to the engine."""

    def load(self, path: Path, spec: GraphSpec) -> Executable:
        """The graph of file ``path``, whose weights lie beside it. Raises :class:`EngineError` in one line where
        the engine cannot run it, or where it does not have the inputs and outputs of ``spec``."""

    def allocate(self, shape: tuple[int, ...], dtype: str) -> Buffer:
        """A buffer of zeros, owned by the caller."""


ENGINES = ("ort-cpu",)
"""The engines there are, by the name that ``Session.open(engine=...)`` takes."""


def backend(engine: str, *, threads: int | None = None) -> Backend:
    """The engine of that name. Raises :class:`EngineError` for an unknown one, or one that is not installed."""
    if threads is not None and threads < 1:
        raise EngineError(f"threads must be at least 1, got {threads}")
    if engine == "ort-cpu":
        try:
            from tgate_runtime.backends.ort import OrtCpu
        except ModuleNotFoundError as error:
            if error.name != "onnxruntime":
                raise
            raise EngineError(
                "engine ort-cpu needs onnxruntime, which is not installed: pip install 'tgate-engine[cpu]'"
            ) from None
        return OrtCpu(threads=threads)
    raise EngineError(f"there is no engine {engine!r}; the engines are {', '.join(ENGINES)}")
