"""What stands before all routes: who may ask, from which host, how large and fast a body has to be, and how fast an
answer is to be read."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tgate_engine.errors import RequestError
from tgate_engine.plain_files import read_plain
from tgate_serve.api.errors import ApiError
from tgate_serve.api.limits import Limits
from tgate_serve.metrics import Metrics

log = logging.getLogger("tgate")

OPEN = ("/", "/page", "/health", "/ready")
"""What may be asked without a key: nothing of it draws, or tells of anybody's requests."""
LOOPBACK = ("localhost", "127.0.0.1", "[::1]")

_LEAST_KEY = 16
_MOST_BYTES = 2**20
_READ_S = 60.0
"""How long a client may leave a part of an answer unread."""
_PART_BYTES = 2**18
"""The parts that answers are sent in: what is sent whole is kept for as long as its client leaves it unread."""


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
        limits: Limits,
        keys: Keys | None = None,
        hosts: Collection[str] | None = None,
    ) -> None:
        """``keys``: None lets everybody in. ``hosts``: what a Host header may name, without a port; None is anything. A
        server on loopback names its own: a page of another site, in a browser here, may otherwise have its name
        resolved to this host and ask."""
        self._app, self._metrics, self._limits = app, metrics, limits
        self._keys, self._hosts = keys, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 500  # what a client gets whose answer never began

        async def sent(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            for part in _parts(message):
                async with asyncio.timeout(_READ_S):
                    await send(part)

        try:
            self._check(_path(scope), headers := Headers(scope=scope))
            body = await self._body(receive, headers)
        except ApiError as error:
            await error.answer()(scope, receive, sent)
        else:
            try:
                await self._app(scope, _again(body, receive), sent)
            except TimeoutError:
                log.info("an answer was cut, since its client left it unread for %.0f s", _READ_S)
        finally:
            self._metrics.answered(_route(scope), status)

    def _check(self, path: str, headers: Headers) -> None:
        if self._hosts is not None and _name(headers.get("host", "")) not in self._hosts:
            message = f"this server answers to {', '.join(self._hosts)} alone; start it with --host for others"
            raise ApiError(403, message, code="host")
        if self._keys is not None and not _open(path) and not self._keys.allow(headers.get("authorization")):
            raise ApiError(401, "an API key is wanted: Authorization: Bearer KEY", code="invalid_api_key")

    async def _body(self, receive: Receive, headers: Headers) -> bytes:
        """All of a request's body. Raises :class:`ApiError` where it is too large, comes too slowly, or breaks off."""
        most = self._limits.body_bytes
        too_large = ApiError(413, f"a body may have {most} bytes; ask for less at a time", code="too_large")
        length = headers.get("content-length", "0")
        if length.isascii() and length.isdigit() and int(length) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(self._limits.body_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] != "http.request":  # nobody is there to be answered, or to be drawn for
                        raise ApiError(400, "the body broke off; send all of it", code="incomplete")
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise too_large
                    more = message.get("more_body", False)
        except TimeoutError:
            text = f"the body was not there within {self._limits.body_s:.0f} s; send it faster"
            raise ApiError(408, text, code="timeout") from None
        return bytes(body)


def _parts(message: Message) -> Iterator[Message]:
    """The same message, or those that say it in parts."""
    body = message.get("body", b"")
    while len(body) > _PART_BYTES:
        yield {**message, "body": bytes(body[:_PART_BYTES]), "more_body": True}
        body = memoryview(body)[_PART_BYTES:]
    yield {**message, "body": bytes(body)} if "body" in message else message


def _again(body: bytes, receive: Receive) -> Receive:
    """What gives a body that was read, and then what comes after it."""
    parts = [body]

    async def received() -> Message:
        return {"type": "http.request", "body": parts.pop()} if parts else await receive()

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
