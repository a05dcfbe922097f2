"""One request's memory: every buffer of a trajectory, allocated before the first step and bound once."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tgate_engine.errors import RequestError
from tgate_engine.manifest import TensorSpec, resolve
from tgate_engine.plan import Plan, Step
from tgate_engine.rows import step_row
from tgate_engine.sampler import HISTORY
from tgate_runtime.backends import Buffer, Call
from tgate_runtime.dtypes import encode, storage
from tgate_runtime.session import Session

RING = HISTORY + 2
"""Buffers of latents and of model outputs: the current pair, HISTORY before it, and the one being written."""


class Binding:
    """The buffers of one plan at one batch size, and the engine calls on them.

    Latents and model outputs lie in two rings of :data:`RING` buffers. Step i reads slot i mod RING as the
    current pair and writes slot i + 1: history moves by turning the ring, never by copying. Every carry has one
    buffer, which the writing step's graph fills and later steps' graphs read in place.

    The binding owns all its buffers and may be used for one request after another; between requests the last
    one's latents stay readable. One run at a time, in any thread; :meth:`claim` guards that. It keeps alive the
    graphs that it uses, not the session.
    """

    def __init__(self, session: Session, plan: Plan, batch: int) -> None:
        """Allocate and bind everything for ``batch`` images, the number of rows in every tensor.

        Raises :class:`RequestError` for a batch that the bundle was not exported for, and
        :class:`~tgate_engine.errors.EngineError` where the session did not load a graph of the plan.
        """
        manifest = session.manifest
        least, most = manifest.batch
        if not least <= batch <= most:
            raise RequestError(f"the bundle takes {least} to {most} images at once, got {batch}; export with --batch")
        self.plan = plan
        self.batch = batch
        self._allocate = session.backend.allocate
        self._lock = threading.Lock()
        self._position = 0  # the ring slot of the current latents
        latents = (batch, *manifest.latents)
        self._latents = [self._allocate(latents, "float32") for _ in range(RING)]
        self._outputs = [self._allocate(latents, "float32") for _ in range(RING)]
        self._named: dict[str, Buffer] = {}
        self._noise: Buffer | None = None
        self._conditioning: dict[str, Buffer] = {}
        halves = {f"{c.name}.{half}" for c in manifest.conditioning for half in ("negative", "positive")}
        for step in plan.steps:
            graph = manifest.graphs[step.graph]
            for tensor in graph.inputs:
                if tensor.name in halves:
                    self._conditioning[tensor.name] = self._buffer(tensor)
                if tensor.name == "noise":
                    self._noise = self._buffer(tensor)
            for tensor in graph.outputs:
                if tensor.name in step.writes:
                    self._buffer(tensor)
        self._calls: dict[tuple[str, tuple[str, ...], int], Call] = {}
        for step in plan.steps:
            key = self._key(step)
            if key not in self._calls:
                self._calls[key] = self._bind(session, step, step.index % RING)

    # --- one request ----------------------------------------------------------------------------

    def claim(self) -> threading.Lock:
        """The lock of a run, taken. Raises :class:`RequestError` while another run uses this binding."""
        if not self._lock.acquire(blocking=False):
            raise RequestError("this binding is in use by another run; make one binding for each")
        return self._lock

    def begin(self, latents: NDArray[np.float32], conditioning: Mapping[str, NDArray[Any]]) -> None:
        """Start a request: x_0 = ``latents`` (float32 [B, ...]), history zeroed, conditioning written.

        ``conditioning``: ``<name>.<half>`` to [B, ...], or [1, ...] for all rows alike; float32 numbers, which are
        rounded to the graph's dtype, or that dtype's bits already. Names that the plan does not use are ignored.
        Both are copied. Raises :class:`RequestError` naming what is missing or misshapen.
        """
        for slot in (*self._latents, *self._outputs, *([self._noise] if self._noise else [])):
            slot.write(np.zeros(1, np.float32))
        self._position = 0
        self._write(self._latents[0], latents, "the initial latents")
        for name, buffer in self._conditioning.items():
            if name not in conditioning:
                have = ", ".join(conditioning) or "none"
                raise RequestError(f"the plan's graphs take conditioning {name}; got {have}")
            self._write(buffer, conditioning[name], f"conditioning {name}")

    def set_step(self, step: Step, guidance_scale: float, noise: NDArray[np.float32] | None = None) -> Call:
        """Write the step's row of numbers and its ``noise`` [B, ...], if any; give the call that takes the step."""
        if noise is not None and self._noise is not None:
            self._write(self._noise, noise, f"the noise of step {step.index}")
        if "step" in self._named:
            self._named["step"].write(step_row(step.call, guidance_scale))
        self._position = (step.index + 1) % RING
        return self._calls[self._key(step)]

    def latents(self) -> NDArray[np.float32]:
        """A copy of the latents after the last step taken, float32 [B, ...]."""
        return self._latents[self._position].read()

    def replace_latents(self, latents: NDArray[np.float32]) -> None:
        """Put float32 [B, ...] in place of the latents after the last step taken; the next step goes on from them."""
        self._write(self._latents[self._position], latents, "the latents")

    # --- buffers --------------------------------------------------------------------------------

    def carries(self) -> dict[str, Buffer]:
        """The carries' buffers, by name; owned by this binding."""
        return {name: self._named[name] for name in self.plan.carries()}

    def conditioning(self) -> tuple[str, ...]:
        """The conditioning that the plan's graphs take, as ``<name>.<half>``."""
        return tuple(self._conditioning)

    def calls(self) -> dict[tuple[str, tuple[str, ...], int], Call]:
        """The engine calls, by (graph, carries written, ring slot of the current latents)."""
        return dict(self._calls)

    def _key(self, step: Step) -> tuple[str, tuple[str, ...], int]:
        return step.graph, step.writes, step.index % RING

    def _bind(self, session: Session, step: Step, position: int) -> Call:
        spec = session.manifest.graphs[step.graph]
        ring: dict[str, Buffer] = {
            "latents": self._latents[position],
            "next_latents": self._latents[(position + 1) % RING],
            "output": self._outputs[position],
        }
        for lag in range(1, HISTORY + 1):
            ring[f"latents.{lag}"] = self._latents[(position - lag) % RING]
            ring[f"output.{lag}"] = self._outputs[(position - lag) % RING]
        inputs = {t.name: ring[t.name] if t.name in ring else self._buffer(t) for t in spec.inputs}
        outputs = {name: ring[name] for name in ("next_latents", "output")}
        outputs |= {name: self._named[name] for name in step.writes}
        return session.graph(step.graph).bind(inputs, outputs)

    def _buffer(self, tensor: TensorSpec) -> Buffer:
        """The one buffer of that name."""
        if tensor.name not in self._named:
            self._named[tensor.name] = self._allocate(resolve(tensor.shape, self.batch), tensor.dtype)
        return self._named[tensor.name]

    def _write(self, buffer: Buffer, array: NDArray[Any], what: str) -> None:
        array = np.asarray(array)
        rows = array.shape[:1] in ((1,), (self.batch,))
        if not rows or array.shape[1:] != buffer.shape[1:]:
            raise RequestError(f"{what} must have shape {list(buffer.shape)}, got {list(array.shape)}")
        if array.dtype == np.float32:
            array = encode(array, buffer.dtype)
        if array.dtype != storage(buffer.dtype):
            raise RequestError(f"{what} must be {buffer.dtype}, got {array.dtype}")
        buffer.write(array)
