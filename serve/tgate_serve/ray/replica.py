"""One device: the models that it has in memory, each behind an API of its own, as the ingress asks it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

from prometheus_client.core import Metric
from ray import serve
from starlette.types import Message, Scope

from tgate_engine.bundle import Bundle
from tgate_engine.errors import TgateError
from tgate_runtime.engines import open_engine
from tgate_runtime.engines.protocol import Engine
from tgate_runtime.mini import place_of
from tgate_serve.api.app import create_app
from tgate_serve.api.errors import ApiError
from tgate_serve.api.limits import Limits
from tgate_serve.api.service import Service
from tgate_serve.ray.away import State
from tgate_serve.ray.settings import Settings
from tgate_serve.server import Serving, opened

_LEAVES_S = 10.0
"""How long an application may take to end a request whose client has gone."""


class Replica:
    """A deployment. Models beyond what fits are opened when they are asked for, in place of the one that was asked for
    longest ago, once its requests have ended."""

    # Ray awaits it.
    async def __init__(  # type: ignore[misc]
        self, settings: Settings, places: Mapping[str, str]
    ) -> None:
        """Open the first of the bundles, as many as fit. ``places``: their directories, by name."""
        self._open: dict[str, _Opened] = {}
        engine = await asyncio.to_thread(_engine, settings)

        async def load(name: str) -> _Opened:
            model = await asyncio.to_thread(_Opened, name, places[name], engine, settings)
            self._open[name] = model
            model.closing.callback(self._open.pop, name)
            return model

        most = min(settings.models_per_replica or len(places), len(places))
        self._model = serve.multiplexed(max_num_models_per_replica=most)(load)
        for name in list(places)[:most]:
            await self._model(name)

    async def answer(self, name: str, scope: dict[str, Any], body: bytes) -> AsyncIterator[Message]:
        """What the API of a model sends for a request, as ASGI has it. Whoever stops reading has hung up."""
        model: _Opened = await self._model(name)
        with model.used():
            async for message in _played(model, scope, body):
                yield message

    async def cancel(self, identity: str) -> bool:
        """Call a request off; False where it is not under way here."""
        for model in list(self._open.values()):
            with suppress(ApiError):
                model.service.cancel(identity)
                return True
        return False

    async def states(self) -> dict[str, State]:
        """How the models are that are in memory here."""
        workers = {name: model.service.models[name].worker for name, model in self._open.items()}
        return {name: (*worker.load(), worker.failed) for name, worker in workers.items()}

    async def metrics(self) -> tuple[str, list[Metric]]:
        """This replica's id, and what its models have counted while they were in memory."""
        models = list(self._open.values())
        told = [metric for model in models for metric in model.service.metrics.registry.collect()]
        return serve.get_replica_context().replica_id.unique_id, told

    def check_health(self) -> None:
        """Ray starts another replica in place of one that raises here."""
        for name, model in list(self._open.items()):
            if model.service.models[name].worker.failed:
                raise TgateError(f"the worker of {name} has failed")

    async def __del__(self) -> None:
        for model in list(self._open.values()):
            await asyncio.to_thread(model.close)


class _Opened:
    """A model in memory, and its API. Ray's multiplexer calls ``__del__`` in a thread when it is another one's turn."""

    def __init__(self, name: str, place: str, engine: Engine, settings: Settings) -> None:
        serving = Serving(
            plans=settings.plans,
            sizes=settings.sizes,
            rows=settings.rows,
            queue=settings.queue,
            patience=settings.patience,
            memory_bytes=settings.memory_limit,
        )
        self._users, self._changed = 0, threading.Condition()
        with ExitStack() as stack:
            bundle = Bundle.open(place_of(place))
            models, metrics = stack.enter_context(opened({name: bundle}, engine, serving))
            self.service = Service(models, metrics, Limits(images=settings.most_images))
            self.app = create_app(self.service)
            self.service.ready = True
            stack.callback(self.service.close)
            self.closing = stack.pop_all()

    @contextmanager
    def used(self) -> Iterator[None]:
        """While somebody is answered it is not closed to make room."""
        with self._changed:
            self._users += 1
        try:
            yield
        finally:
            with self._changed:
                self._users -= 1
                self._changed.notify_all()

    def close(self) -> None:
        """End the worker, requests that are in flight too; nothing where that has been done."""
        self.service.ready = False
        self.closing.close()

    def __del__(self) -> None:
        if not hasattr(self, "closing"):  # it was never open
            return
        with self._changed:
            self._changed.wait_for(lambda: not self._users)
        self.close()


def _engine(settings: Settings) -> Engine:
    if not settings.on_cpu:
        return open_engine(settings.engine, precision=settings.precision)  # Ray shows it its own device alone
    return open_engine(settings.engine, precision=settings.precision, threads=settings.threads or 1)


async def _played(model: _Opened, scope: Scope, body: bytes) -> AsyncIterator[Message]:
    """What an application sends for a request that lies here whole."""
    sent: asyncio.Queue[Message | None] = asyncio.Queue()
    gone = asyncio.Event()
    read = False

    async def receive() -> Message:
        nonlocal read
        if not read:
            read = True
            return {"type": "http.request", "body": body, "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    task = asyncio.ensure_future(model.app(scope, receive, sent.put))
    task.add_done_callback(lambda _: sent.put_nowait(None))
    try:
        while (message := await sent.get()) is not None:
            yield message
    finally:
        gone.set()
        await asyncio.wait({task}, timeout=_LEAVES_S)
        task.cancel()
        with suppress(asyncio.CancelledError, Exception):  # an answer of 500 is sent, logged, and then raised
            await task
