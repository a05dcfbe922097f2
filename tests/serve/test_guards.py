"""Who may ask, from where, how much and how fast."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse, Response
from starlette.types import Message, Receive, Scope, Send

from tests.serve.running import PATH, Server, running, until
from tgate_engine.errors import RequestError
from tgate_runtime.session import Session
from tgate_serve.api import guards
from tgate_serve.api.guards import LOOPBACK, Keys
from tgate_serve.api.limits import Limits
from tgate_serve.server import listening

KEYS = ("first-key-of-many-letters", "second-key-of-many-letters")


@pytest.fixture(scope="module")
def server(session: Session) -> Iterator[Server]:
    limits = Limits(body_bytes=2000, body_s=1.0, prompt=50, images=2, pixels=2 * 128 * 128)
    with running(session, rows=2, keys=Keys(KEYS), hosts=LOOPBACK, limits=limits) as found:
        yield found


def authorized(key: str = KEYS[0], kind: str = "Bearer") -> dict[str, str]:
    return {"authorization": f"{kind} {key}"}


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/mini", "/metrics", "/docs", "/openapi.json", "/nothing"])
@pytest.mark.parametrize(
    "headers", [{}, authorized("wrong"), authorized(kind="Basic"), authorized("x" * 5000), authorized("é")]
)
def test_without_a_key_nothing_is_told(server: Server, path: str, headers: dict[str, str]) -> None:
    raw = {name.encode(): value.encode() for name, value in headers.items()}
    answer = server.http.get(path, headers=raw)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("key", KEYS)
def test_every_key_opens(server: Server, key: str) -> None:
    assert server.http.get("/v1/models", headers=authorized(key)).status_code == 200
    assert server.http.get("/metrics", headers=authorized(key, "bearer")).status_code == 200
    assert [model.id for model in server.openai(api_key=key).models.list()] == ["mini"]


def test_openais_client_tells_of_a_wrong_key(server: Server) -> None:
    with pytest.raises(openai.AuthenticationError, match="an API key is wanted"):
        server.openai(api_key="wrong").images.generate(model="mini", prompt="a")


@pytest.mark.parametrize("path", ["/", "/health", "/ready", "/page/index.html"])
def test_what_needs_no_key(server: Server, path: str) -> None:
    answer = server.http.get(path)
    assert answer.status_code == 200
    assert answer.headers.get("cache-control") == ("no-cache" if path.startswith("/page") else None)


@pytest.mark.parametrize("path", ["/page/../api/app.py", "/page/%2e%2e/api/app.py", "/page//etc/passwd", "/healthy"])
def test_nothing_else_does(server: Server, path: str) -> None:
    assert server.http.get(path).status_code in (401, 404)


def test_another_sites_name_is_refused(server: Server) -> None:
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example"):
        answer = server.http.get("/health", headers={"host": host})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "host")
    for host in ("localhost", "127.0.0.1:1", "[::1]:8000", "LOCALHOST"):
        assert server.http.get("/health", headers={"host": host}).status_code == 200


def test_a_body_that_is_too_large(server: Server) -> None:
    answer = server.http.post(PATH, json={"prompt": "a" * 3000}, headers=authorized())
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large")
    parts = (b"x" * 500 for _ in range(10))  # nobody says how long it will be
    answer = server.http.post(PATH, content=parts, headers=authorized() | {"content-type": "application/json"})
    assert answer.status_code == 413


def test_more_than_the_limits_allow(server: Server) -> None:
    for asked, says in (
        ({"prompt": "a" * 51}, "prompt has 51 characters, and at most 50 are read; shorten it"),
        ({"prompt": "a", "negative_prompt": "b" * 51}, "negative_prompt has 51 characters"),
        ({"prompt": "a", "n": 3}, "at most 2 images are drawn at a time, got 3"),
    ):
        answer = server.http.post(PATH, json=asked, headers=authorized())
        assert answer.status_code == 400
        assert answer.json()["error"]["message"].startswith(says)


def test_pixels_are_limited(session: Session) -> None:
    with running(session, rows=2, limits=Limits(pixels=128 * 128)) as server:
        assert server.draw().status_code == 200
        _, error = server.refused(n=2)
        assert error["message"] == "a request may be for 16384 pixels, and 2 of 128x128 are 32768; ask for fewer"


def test_a_body_that_does_not_come(server: Server) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port))) as client:
        head = f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        client.sendall((head + f"Authorization: Bearer {KEYS[0]}\r\nContent-Length: 100\r\n\r\n{{").encode())
        client.settimeout(20)
        began_s = time.monotonic()
        answer = client.recv(4096)
    assert answer.startswith(b"HTTP/1.1 408")
    assert time.monotonic() - began_s < 10


def test_a_body_that_breaks_off_is_no_request(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has come of it may be a whole request by chance."""
    asked = []
    monkeypatch.setattr(server.service, "submit", lambda *_: asked.append(True))
    host, port = server.url.removeprefix("http://").split(":")

    def broken() -> float:
        text = server.http.get("/metrics", headers=authorized()).text
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(series))

    series, before = 'tgate_requests_total{route="none",status="400"}', 0.0
    before = broken()
    with socket.create_connection((host, int(port))) as client:
        head = f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        client.sendall(
            (head + f'Authorization: Bearer {KEYS[0]}\r\nContent-Length: 100\r\n\r\n{{"prompt": "a"}}').encode()
        )
    assert until(lambda: broken() == before + 1)
    assert not asked


def test_a_body_in_many_parts_costs_no_more_than_in_few(server: Server) -> None:
    """Each part is looked at once; to add up all of them each time would keep everybody waiting."""
    parts = 50_000
    left = iter(range(parts))

    async def received() -> Message:
        await asyncio.sleep(0)  # so that the time may run out
        return {"type": "http.request", "body": b"x", "more_body": next(left) < parts - 1}

    guarded = guards.Guards(PlainTextResponse("x"), metrics=server.service.metrics, limits=Limits(body_s=5.0))
    body = asyncio.run(guarded._body(received, Headers({})))
    assert body == b"x" * parts


def test_who_does_not_read_is_cut(server: Server, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    monkeypatch.setattr(guards, "_READ_S", 0.05)
    ended = []

    async def answers(scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await PlainTextResponse("x")(scope, receive, send)
        finally:
            ended.append(True)

    async def received() -> Message:
        return {"type": "http.request", "body": b""}

    async def unread(_: Message) -> None:
        await asyncio.sleep(60)

    scope = {"type": "http", "path": "/", "headers": [], "method": "GET"}
    guarded = guards.Guards(answers, metrics=server.service.metrics, limits=Limits())
    with caplog.at_level(logging.INFO, "tgate"):
        asyncio.run(guarded(scope, received, unread))
    assert ended
    assert "left it unread" in caplog.text


def test_a_large_answer_is_sent_in_parts(server: Server) -> None:
    """What is handed over at once is kept for as long as a client likes, and none of it has a time."""
    body = bytes(range(256)) * 5000
    sent: list[Message] = []

    async def received() -> Message:
        return {"type": "http.request", "body": b""}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {"type": "http", "path": "/", "headers": [], "method": "GET"}
    guarded = guards.Guards(Response(body), metrics=server.service.metrics, limits=Limits())
    asyncio.run(guarded(scope, received, send))
    parts = sent[1:]
    assert b"".join(part["body"] for part in parts) == body
    assert max(len(part["body"]) for part in parts) <= 2**18
    assert [part.get("more_body", False) for part in parts] == [True] * (len(parts) - 1) + [False]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such option")
def test_a_connection_whose_other_side_takes_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what was sent already, by the system: a client that has vanished says nothing."""
    monkeypatch.setattr("tgate_serve.server._UNTAKEN_MS", 500)
    with listening("127.0.0.1", 0) as listener, socket.create_connection(listener.getsockname()):
        connection, _ = listener.accept()
        with connection:
            connection.setblocking(False)

            def dropped() -> bool:
                try:
                    connection.send(b"x" * 2**16)
                except BlockingIOError:
                    return False
                except (TimeoutError, BrokenPipeError):  # the first time, and from then on
                    return True
                return False

            assert until(dropped)


def test_what_is_no_route_is_no_metric(server: Server) -> None:
    for path in ("/a", "/b", "/v1/models/x"):
        server.http.get(path, headers=authorized())
    lines = server.http.get("/metrics", headers=authorized()).text
    assert 'route="/a"' not in lines
    assert 'tgate_requests_total{route="none",status="404"}' in lines
    assert 'tgate_requests_total{route="/v1/models/{name}",status="404"}' in lines


def test_a_file_of_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    file.write_text(f"# ours\n\n  {KEYS[0]} \n{KEYS[1]}\n")
    keys = Keys.load(file)
    assert keys.allow(f"Bearer {KEYS[1]}")
    assert not keys.allow("Bearer # ours")
    assert not keys.allow(None)
    for content, says in (("", "holds no API key"), ("# x\n", "holds no API key"), ("short\n", "key 1 in .* 16 ASCII")):
        file.write_text(content)
        with pytest.raises(RequestError, match=says):
            Keys.load(file)
    with pytest.raises(RequestError):
        Keys.load(tmp_path / "none")
