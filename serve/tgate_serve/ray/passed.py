"""A request that is passed on to a replica, and to another one where that one dies."""

from __future__ import annotations

import asyncio
import logging
import re
from typing import Any

from fastapi import Response
from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentHandle
from starlette.types import Receive, Scope, Send

from tgate_serve.api.errors import ApiError
from tgate_serve.api.service import new_identity
from tgate_serve.ray.asked import Asked
from tgate_serve.ray.told import Told

log = logging.getLogger("tgate")

_MOST = 3
"""Replicas that may end under a request: more are its own doing."""
_PAUSE_S = 1.0
"""Before a replica is asked again that had no room, or may be the one that stops: Ray learns of that in a moment."""
_BUSY, _STOPPED = 429, 503
_ID, _UUID = b"x-request-id", r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"


class Passed(Response):
    """The answer of whichever replica lives to give it. Once a replica has taken a request a full queue elsewhere is
    waited for, and not told. A client that hangs up calls it off."""

    def __init__(self, draws: DeploymentHandle[Any], name: str, asked: Asked) -> None:
        """``draws``: streams what :meth:`~tgate_serve.ray.replica.Replica.answer` yields. ``name``: the model's."""
        super().__init__()
        self._draws, self._name, self._asked, self._told = draws, name, asked, Told()
        self._ended = 0
        self._identity = ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request. Ray cancels this where its client has gone."""
        self._identity = _rays(scope) or new_identity("img")
        while self._ended < _MOST:
            try:
                counts = await self._attempt(scope, send)
            except (RayActorError, ObjectLostError) as error:
                if self._told.ended:
                    return
                log.warning("%s: its replica has ended (%s)", self._identity, type(error).__name__)
                self._ended += 1
                continue
            except BackPressureError:
                counts = False
                if not self._ended:
                    refusal = ApiError(429, "the queue is full; ask again", code="queue_full", retry_s=1)
                    await refusal.answer()(scope, receive, send)
                    return
            if self._told.ended:
                return
            self._ended += counts
            await asyncio.sleep(_PAUSE_S)
        refusal = ApiError(503, f"{_MOST} replicas have ended at this request; ask again", code="stopped", retry_s=1)
        if self._told.began:
            await send(self._told.failed(bytes(refusal.answer().body)))
        else:
            await refusal.answer()(scope, receive, send)

    async def _attempt(self, scope: Scope, send: Send) -> bool:
        """Send what a replica answers, unless it stops, or has no room for a request that was taken before. Whether
        that counts as an end."""
        body = self._asked.body(again=self._ended > 0)
        answer = self._draws.remote(self._name, _travelling(scope, self._identity, len(body)), body)
        whole = False
        try:
            async for message in answer:
                status = message.get("status")
                if status == _STOPPED or (status == _BUSY and self._ended):
                    return bool(status == _STOPPED)
                if message["type"] == "http.response.start" and self._identity == _rays(scope):
                    message["headers"] = [each for each in message["headers"] if each[0].lower() != _ID]
                for due in self._told.due(message):
                    await send(due)
            whole = True
            return not self._told.ended
        finally:
            if not whole:
                answer.cancel()


def _rays(scope: Scope) -> str | None:
    """The id by which Ray knows a request, unless its client has chosen one that may be anybody's. Ray adds it to the
    answer, whatever is there."""
    said = [value.decode("latin-1") for name, value in scope["headers"] if name.lower() == _ID]
    return said[-1] if said and re.fullmatch(_UUID, said[-1]) else None


def _travelling(scope: Scope, identity: str, length: int) -> dict[str, Any]:
    """What a replica sees of a request: plain values, and no key."""
    left_out = (b"authorization", b"content-length", b"transfer-encoding")
    headers = [(name, value) for name, value in scope["headers"] if name.lower() not in left_out]
    return {
        **{name: scope[name] for name in ("type", "http_version", "scheme", "method", "path", "query_string")},
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "root_path": scope.get("root_path", ""),
        "headers": [*headers, (b"content-length", str(length).encode())],
        "state": {"identity": identity},
    }
