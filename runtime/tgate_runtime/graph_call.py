"""A graph outside the loop: one call, with buffers of its own."""

from __future__ import annotations

from contextlib import AbstractContextManager

from tgate_engine.manifest import resolve
from tgate_runtime.session import Session


class GraphCall:
    """One loaded graph with a buffer for every input and output, bound once. Write ``inputs``, call it, read
    ``outputs``; both by name, and owned by it. One thread at a time."""

    def __init__(self, session: Session, graph: str, batch: int = 1) -> None:
        """Raises :class:`~tgate_engine.errors.EngineError` where the session did not load the graph."""
        spec, allocate = session.manifest.graphs[graph], session.backend.allocate
        self.inputs = {t.name: allocate(resolve(t.shape, batch), t.dtype) for t in spec.inputs}
        self.outputs = {t.name: allocate(resolve(t.shape, batch), t.dtype) for t in spec.outputs}
        self._call = session.graph(graph).bind(self.inputs, self.outputs)

    def __call__(self) -> None:
        self._call()

    @staticmethod
    def lent(session: Session, graph: str) -> AbstractContextManager[GraphCall]:
        """One for a single image, which the session keeps for the next request; see :meth:`Session.lent`."""
        return session.lent(graph, lambda: GraphCall(session, graph))
