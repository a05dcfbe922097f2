"""Models opened from bundles, and the loop that serves them until a signal ends it."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import FrameType

import uvicorn

from tgate_engine.bundle import Bundle
from tgate_engine.errors import RequestError, shown
from tgate_runtime.engines.protocol import Engine, OnBuild
from tgate_runtime.session import Session
from tgate_serve.api.app import create_app
from tgate_serve.api.guards import Keys
from tgate_serve.api.jobs import Job
from tgate_serve.api.service import Service
from tgate_serve.metrics import Metrics
from tgate_serve.model import Model
from tgate_serve.worker import Worker

log = logging.getLogger("tgate")

_UNTAKEN_MS = 60_000
"""How long what was sent may stay untaken by the other side before its connection is dropped."""
_LOOK_S = 0.1
"""How often a server that is to stop looks whether it can."""
_LAST_S = 2.0
"""How long requests that it has ended have to be told so."""


@dataclass(frozen=True, kw_only=True)
class Serving:
    """How bundles are served. ``plans``, ``sizes``: those that requests may name, None being all of a bundle.
    ``rows``, ``queue``, ``patience``, ``adapted``: see :class:`~tgate_serve.worker.Worker`. ``memory_bytes``: what all
    bundles' weights, buffers and hungriest calls may take together."""

    plans: Sequence[str] | None = None
    sizes: Sequence[str] | None = None
    rows: int | None = None
    queue: int = 64
    patience: int = 8
    memory_bytes: int | None = None
    adapted: int = 1


@contextmanager
def opened(
    bundles: Mapping[str, Bundle], engine: Engine, serving: Serving, on_build: OnBuild | None = None
) -> Iterator[tuple[dict[str, Model], Metrics]]:
    """Models by the names of their bundles, each with a worker, and what measures them. Closed at the end, in-flight
    requests too.

    Raises as :meth:`Session.open` and :class:`~tgate_serve.worker.Worker` do.
    """
    models: dict[str, Model] = {}
    metrics, left = Metrics(models), serving.memory_bytes
    with ExitStack() as stack:
        for name, bundle in bundles.items():
            session = stack.enter_context(
                Session.open(
                    bundle,
                    engine=engine,
                    plans=serving.plans,
                    sizes=serving.sizes,
                    adapted=serving.adapted,
                    on_build=on_build,
                )
            )
            worker = stack.enter_context(
                Worker(
                    session,
                    plans=serving.plans,
                    rows=serving.rows,
                    queue=serving.queue,
                    patience=serving.patience,
                    memory_bytes=left,
                    adapted=serving.adapted,
                    on_call=metrics.on_call(name),
                )
            )
            if left is not None:
                left -= worker.planned_bytes
            models[name] = Model(name, session, worker)
        yield models, metrics


def listening(host: str, port: int) -> socket.socket:
    """A socket that listens there; ``port`` 0 is any that is free. Raises :class:`RequestError` if there is none."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listener = socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError, UnicodeError) as error:
        number = getattr(error, "errno", None) or 0
        why = os.strerror(number) if number > 0 else error  # names that cannot be resolved have numbers of their own
        raise RequestError(
            f"cannot listen on {shown(host)} port {port} ({why}); say another --host or --port"
        ) from None
    # Connections have it from here, and asyncio sets it on none of them: their socket does not say that it is TCP's.
    # Without it the second part of an answer waits 40 ms for the client to confirm the first.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if sys.platform == "linux":  # of its connections: what is sent, and nobody takes, or is there to take, is dropped
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _UNTAKEN_MS)
    return listener


def serve(
    service: Service,
    listener: socket.socket,
    *,
    keys: Keys | None = None,
    hosts: Collection[str] | None = None,
    drain_s: int = 60,
) -> None:
    """Answer until SIGTERM or SIGINT; then let requests that are under way end, for ``drain_s`` seconds at most. After
    that, or a second signal, those that are left are told that the server stops. To be called in the main thread, and
    once for a service: it closes the workers then.

    While videos are under way then, no more requests are drawn, and the server answers on until each of those videos
    has ended and its content is fetched, or ``drain_s`` are over. Whatever else it keeps of videos goes with it.
    """
    app = create_app(service, keys=keys, hosts=hosts)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        # Whatever else is installed: the other parser of uvicorn's has no limit for headers, and there are no sockets.
        http="h11",
        ws="none",
        h11_max_incomplete_event_size=2**16,
    )
    server = _Server(config, service, drain_s)
    # Its own handlers are in place while it runs. Once it has ended it sends itself what came once more, for whoever
    # had handlers before: that is what the command ends by already.
    before = {number: signal.signal(number, _nothing) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        asyncio.run(server.serve(sockets=[listener]))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Server(uvicorn.Server):
    """A server that waits for videos: there is no connection that does, and whose end it would wait for. Whom it waits
    for no longer it tells so, where uvicorn would break off."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_s: int) -> None:
        super().__init__(config)
        self._service, self._drain_s = service, drain_s
        self._at_once = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.force_exit = self._at_once  # from the third signal on, nobody is told anything
        self._at_once = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        end_s = time.monotonic() + self._drain_s
        under_way = [job for job in self._service.jobs if job.ended_s is None]
        if under_way and not self._at_once and not self.force_exit:
            await self._fetched(under_way, end_s)
        ending = asyncio.create_task(self._ended(end_s))
        await super().shutdown(sockets)
        ending.cancel()
        if self.force_exit:
            await self.lifespan.shutdown()

    async def _ended(self, end_s: float) -> None:
        """Wait for as long as there is time; then end what is under way, and wait for nobody."""
        while not self._at_once and time.monotonic() < end_s:
            await asyncio.sleep(_LOOK_S)
        workers = [model.worker for model in self._service.models.values()]
        await asyncio.gather(*(asyncio.to_thread(worker.close) for worker in workers))
        await asyncio.sleep(_LAST_S)
        self.force_exit = True

    async def _fetched(self, under_way: Collection[Job], end_s: float) -> None:
        """Take no more, and wait until nobody can want any of those, for as long as there is time."""
        self._service.ready = False
        for model in self._service.models.values():
            model.worker.drain(0)  # what it has taken ends by itself
        while any(job.wanted for job in self._service.jobs if job in under_way):
            if self._at_once or time.monotonic() >= end_s:
                break
            await asyncio.sleep(_LOOK_S)


def _nothing(*_: object) -> None:
    pass
