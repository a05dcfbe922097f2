"""What all routes share: the models, the limits, who is under way, and threads for what takes time."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Annotated, TypeVar

from fastapi import Depends, Request

from tgate_serve.api.errors import ApiError
from tgate_serve.api.jobs import Jobs
from tgate_serve.api.limits import Limits
from tgate_serve.handle import Cancelled, Handle
from tgate_serve.metrics import Metrics
from tgate_serve.model import Drawing, Model, Wish

T = TypeVar("T")

_THREADS = 2
"""Of encoders, and as many of decoders, beside the workers' own: behind slow decoders no worker is left without work,
and nobody is kept from hearing that the queue is full."""


class Service:
    """The models of one server, which it does not own, by the names that they are served under."""

    def __init__(
        self,
        models: Mapping[str, Model],
        metrics: Metrics,
        limits: Limits | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Serve ``models``, the first of them to those who name none. ``clock``: Unix time in seconds, by which videos
        expire."""
        self.models = models
        self.metrics = metrics
        self.limits = limits or Limits()
        self.ready = False
        """Whether requests are taken; set once all models are open, and unset when the server is to stop."""
        self.jobs = Jobs(self.limits.jobs, self.limits.job_s, clock)
        metrics.jobs = self.jobs.counts
        self._handles: dict[str, Handle] = {}
        self._encoders = ThreadPoolExecutor(_THREADS, thread_name_prefix="tgate-encode")
        self._decoders = ThreadPoolExecutor(_THREADS, thread_name_prefix="tgate-decode")

    def model(self, name: str | None, *, video: bool) -> Model:
        """The model of a name, or the first that makes such pictures. Raises :class:`ApiError`."""
        kind = [model for model in self.models.values() if model.video == video]
        what, other = ("videos", "/v1/images/generations") if video else ("pictures", "/v1/videos")
        if name is None:
            if not kind:
                raise ApiError(400, f"no model that makes {what} is served; ask at {other}", code="invalid_request")
            return kind[0]
        found = self.find(name)
        if found not in kind:
            raise ApiError(400, f"model {name} makes no {what}; ask at {other}", code="invalid_value", param="model")
        return found

    def find(self, name: str) -> Model:
        """The model of a name. Raises :class:`ApiError`."""
        if name not in self.models:
            there = ", ".join(self.models)
            raise ApiError(404, f"that model is not served; there is {there}", code="model_not_found", param="model")
        return self.models[name]

    def check(self, model: Model, wish: Wish) -> None:
        """Raises :class:`~tgate_engine.errors.RequestError` for what cannot be drawn or is more than the limits
        allow."""
        limits, manifest = self.limits, model.session.manifest
        for name, text in (("prompt", wish.prompt), ("negative_prompt", wish.negative_prompt)):
            if text is not None and len(text) > limits.prompt:
                message = f"{name} has {len(text)} characters, and at most {limits.prompt} are read; shorten it"
                raise ApiError(400, message, code="invalid_value", param=name)
        if wish.images > limits.images:
            message = f"at most {limits.images} images are drawn at a time, got {wish.images}"
            raise ApiError(400, message, code="invalid_value", param="n")
        _, size, _ = model.check(wish)
        shape = model.session.shapes(size)[0]
        pixels = shape.width * shape.height * manifest.frames * wish.images
        if pixels > limits.pixels:
            message = (
                f"a request may be for {limits.pixels} pixels, and {wish.images} of {size} are {pixels}; ask for fewer"
            )
            raise ApiError(400, message, code="invalid_value", param="n" if wish.images > 1 else "size")

    async def submit(self, model: Model, wish: Wish) -> Drawing:
        """Have a wish drawn. Raises as :meth:`check` and :meth:`~tgate_serve.model.Model.submit` do."""
        came_s = time.monotonic()
        self.check(model, wish)
        return await self.encoding(lambda: model.submit(wish, came_s))

    async def encoding(self, work: Callable[[], T]) -> T:
        """What ``work`` returns, which encodes, in one of few threads."""
        return await asyncio.get_running_loop().run_in_executor(self._encoders, work)

    async def decoding(self, work: Callable[[], T]) -> T:
        """What ``work`` returns, which decodes, in one of few threads."""
        return await asyncio.get_running_loop().run_in_executor(self._decoders, work)

    @contextmanager
    def under_way(self, handle: Handle, identity: str) -> Iterator[None]:
        """While a request is waited for it can be called off by its identity; nobody draws on after that."""
        self._handles[identity] = handle
        try:
            yield
        finally:
            self._handles.pop(identity, None)
            if not handle.done():
                handle.cancel()

    def cancel(self, identity: str) -> None:
        """Call a request off. Raises :class:`ApiError` where it is not under way, or is through already."""
        if identity not in self._handles or not self._handles[identity].cancel():
            raise ApiError(404, "no request of that id is under way", code="not_found")

    def close(self) -> None:
        """Call off the videos that are not through, which nobody can fetch any more, and let the threads end."""
        self.jobs.close()
        for threads in (self._encoders, self._decoders):
            threads.shutdown(cancel_futures=True)


def new_identity(kind: str) -> str:
    """An id that nobody guesses."""
    return f"{kind}_{secrets.token_hex(12)}"


def identity_of(request: Request, kind: str) -> str:
    """The id that whoever passed the request on gave it, or else a new one. No client can say it: it is no header."""
    return getattr(request.state, "identity", None) or new_identity(kind)


async def unless_gone(request: Request, awaited: Awaitable[T]) -> T:
    """What is awaited; raises :class:`~tgate_serve.handle.Cancelled` once the client has hung up."""
    work = asyncio.ensure_future(awaited)
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise Cancelled("the client has gone")
        return work.result()
    finally:
        for task in (work, gone):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def service_of(request: Request) -> Service:
    """The service of a request's application."""
    service = request.app.state.service
    assert isinstance(service, Service)
    return service


Served = Annotated[Service, Depends(service_of)]
"""A route's parameter: the service of its application."""
