"""A graph outside the loop: one call, with buffers of its own."""

from __future__ import annotations

from contextlib import AbstractContextManager

from tgate_engine.graph import GraphSpec
from tgate_runtime.session import Session


class GraphCall:
    """One loaded graph with a buffer for every input and output, bound once. Write ``inputs``, call it, read
    ``outputs``; both by name, and owned by it. One thread at a time."""

    def __init__(self, session: Session, graph: GraphSpec, batch: int = 1) -> None:
        """Raises :class:`~tgate_engine.errors.EngineError` where the session did not load the graph."""
        allocate = session.engine.allocate
        self.inputs = {t.name: allocate(t.resolve(batch), t.dtype) for t in graph.inputs}
        self.outputs = {t.name: allocate(t.resolve(batch), t.dtype) for t in graph.outputs}
        self._call = session.executable(graph).bind(self.inputs, self.outputs)

    def __call__(self) -> None:
        self._call()

    @staticmethod
    def borrow(session: Session, graph: GraphSpec) -> AbstractContextManager[GraphCall]:
        """One for a single image, which the session keeps for the next request; see :meth:`Session.borrow`."""
        return session.borrow(graph.file, lambda: GraphCall(session, graph))
