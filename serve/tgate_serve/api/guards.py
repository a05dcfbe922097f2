"""What stands before all routes: who may ask, from which host, how fast a body has to come and an answer to be read."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from collections.abc import Collection
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tgate_engine.errors import RequestError
from tgate_engine.plain_files import read_plain
from tgate_serve.api.errors import ApiError
from tgate_serve.metrics import Metrics

OPEN = ("/", "/page", "/health", "/ready")
"""What may be asked without a key: nothing of it draws, or tells of anybody's requests."""
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")

_LEAST_KEY = 16
_MOST_BYTES = 2**20
_READ_S = 60.0
"""How long a client may leave a part of an answer unread."""


class Keys:
    """API keys; kept as their digests, compared in constant time."""

    def __init__(self, keys: Collection[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    @staticmethod
    def load(path: Path) -> Keys:
        """Those of a file, one a line; lines that begin with # are none. Raises :class:`RequestError` for a file
        without one, and for a key that is easily guessed."""
        lines = [
            line.strip() for line in read_plain(path, _MOST_BYTES, RequestError).decode("utf-8", "replace").splitlines()
        ]
        keys = [line for line in lines if line and not line.startswith("#")]
        if not keys:
            raise RequestError(f"{path} holds no API key: one a line, of at least {_LEAST_KEY} characters")
        if short := [i for i, key in enumerate(keys, 1) if len(key) < _LEAST_KEY or not key.isascii()]:
            raise RequestError(
                f"key {short[0]} in {path} is not of at least {_LEAST_KEY} ASCII characters; `openssl rand -hex 24` "
                "makes one"
            )
        return Keys(keys)

    def allow(self, authorization: str | None) -> bool:
        """Whether the header has one of them, as ``Bearer KEY``."""
        kind, _, key = (authorization or "").partition(" ")
        given = hashlib.sha256(key.strip().encode()).digest()
        found = [hmac.compare_digest(given, digest) for digest in self._digests]
        return kind.lower() == "bearer" and any(found)


class Guards:
    """The outermost layer of the application."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        body_s: float,
        keys: Keys | None = None,
        hosts: Collection[str] | None = None,
    ) -> None:
        """``keys``: None lets everybody in. ``hosts``: what a Host header may name, without a port; None is anything. A
        server on loopback names its own: a page of another site, in a browser here, may otherwise have its name
        resolved to this host and ask."""
        self._app, self._metrics = app, metrics
        self._body_s, self._keys, self._hosts = body_s, keys, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500  # what a client gets whose answer never began

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            async with asyncio.timeout(_READ_S):
                await send(message)

        try:
            refusal = self._refusal(_path(scope), Headers(scope=scope))
            if refusal is not None:
                await refusal.answer()(scope, receive, sent)
            else:
                await self._app(scope, self._in_time(receive), sent)
        finally:
            self._metrics.answered(_route(scope), status)

    def _refusal(self, path: str, headers: Headers) -> ApiError | None:
        if self._hosts is not None and _name(headers.get("host", "")) not in self._hosts:
            return ApiError(
                403,
                f"this server answers to {', '.join(self._hosts)} alone; start it with --host for others",
                code="host",
            )
        if self._keys is not None and not _open(path) and not self._keys.allow(headers.get("authorization")):
            return ApiError(401, "an API key is wanted: Authorization: Bearer KEY", code="invalid_api_key")
        return None

    def _in_time(self, receive: Receive) -> Receive:
        """A body that is there in time; its sender has gone otherwise."""
        ends_s: float | None = asyncio.get_running_loop().time() + self._body_s

        async def received() -> Message:
            nonlocal ends_s
            try:
                async with asyncio.timeout_at(ends_s):
                    message = await receive()
            except TimeoutError:
                raise ApiError(
                    408, f"the body was not there within {self._body_s:.0f} s; send it faster", code="timeout"
                ) from None
            if message["type"] != "http.request" or not message.get("more_body"):
                ends_s = None
            return message

        return received


def _path(scope: Scope) -> str:
    """What is asked for, wherever the application hangs."""
    return str(scope["path"]).removeprefix(scope.get("root_path", "")) or "/"


def _open(path: str) -> bool:
    return any(path == each or (each != "/" and path.startswith(f"{each}/")) for each in OPEN)


def _name(host: str) -> str:
    """A Host header without its port."""
    name, _, port = host.rpartition(":")
    return (name if name and port.isdigit() else host).lower()


def _route(scope: Any) -> str:
    """The route as it is written, or that there is none: what clients make up must not become metrics."""
    return str(getattr(scope.get("route"), "path", "none"))
