"""Half an hour of everything at once: pictures, streams, clients that hang up, cancel, read slowly or ask for nonsense.
``TGATE_SOAK_S`` is how long, in seconds."""

from __future__ import annotations

import os
import random
import signal
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx
import numpy as np
import psutil
import pytest

from tests.serve.running import PATH, alone, pixels
from tests.serve.test_process import serving
from tgate_runtime.session import Session

SOAK_S = float(os.environ.get("TGATE_SOAK_S", "1800"))
CLIENTS = 12
SEEDS = range(6)
WAIT_S = 300.0


class Client:
    """One of many, which does something else each time. ``seen``: what came of it."""

    def __init__(self, url: str, number: int, seen: Counter[str], pictures: dict[int, np.ndarray[Any, Any]]) -> None:
        self._url = url
        self._http = httpx.Client(base_url=url, timeout=WAIT_S)
        self._address = (url.removeprefix("http://").split(":")[0], int(url.rpartition(":")[2]))
        self._random = random.Random(number)
        self._seen, self._pictures = seen, pictures
        self.errors: list[str] = []

    def run(self, end_s: float) -> None:
        """Until then. What must not be is noted in :attr:`errors`."""
        ways: list[tuple[Callable[[], str], int]] = [
            (self.draw, 6),
            (self.stream, 3),
            (self.hang_up, 3),
            (self.cancel, 2),
            (self.read_slowly, 1),
            (self.nonsense, 3),
            (self.too_late, 1),
        ]
        while time.monotonic() < end_s and not self.errors:
            (way,) = self._random.choices([way for way, _ in ways], [weight for _, weight in ways])
            try:
                self._seen[f"{way.__name__}: {way()}"] += 1
            except Exception as error:
                self.errors.append(f"{way.__name__}: {type(error).__name__} {error}")
        self._http.close()

    def body(self, **more: Any) -> dict[str, Any]:
        seed = self._random.choice(SEEDS)
        return {"prompt": "a green star", "seed": seed, "priority": self._random.randrange(3), **more}

    def right(self, body: dict[str, Any], text: str) -> None:
        if not np.array_equal(pixels(text), self._pictures[body["seed"]]):
            raise AssertionError(f"seed {body['seed']} came out otherwise")

    def draw(self) -> str:
        body = self.body()
        answer = self._http.post(PATH, json=body)
        if answer.status_code == 429:
            time.sleep(0.2)
            return "busy"
        self.right(body, answer.json()["data"][0]["b64_json"])
        return "drawn"

    def stream(self) -> str:
        body = self.body(stream=True, partial_images=2, stream_steps=True)
        with self._http.stream("POST", PATH, json=body) as answer:
            if answer.status_code == 429:
                return "busy"
            data = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
        last = httpx.Response(200, content=data[-1]).json()
        self.right(body, last["b64_json"])
        return f"{sum('partial_image' in each for each in data)} looks"

    def hang_up(self) -> str:
        content = httpx.Request("POST", "http://a/", json=self.body(n=self._random.randint(1, 4))).content
        with socket.create_connection(self._address) as client:
            head = [f"POST {PATH} HTTP/1.1", "Host: localhost", "Content-Type: application/json"]
            client.sendall("\r\n".join([*head, f"Content-Length: {len(content)}", "", ""]).encode() + content)
            time.sleep(self._random.random())
        return "gone"

    def cancel(self) -> str:
        with self._http.stream("POST", PATH, json=self.body(stream=True, n=2)) as answer:
            if answer.status_code == 429:
                return "busy"
            identity = answer.headers["x-request-id"]
            status = httpx.delete(f"{self._url}{PATH}/{identity}", timeout=WAIT_S).status_code
            text = answer.read().decode()
        if status == 200 and '"cancelled"' not in text and "completed" not in text:
            raise AssertionError(f"neither cancelled nor completed: {text[-300:]}")
        return f"cancelled {status}"

    def read_slowly(self) -> str:
        body = self.body(stream=True, partial_images=3)
        last = b""
        with self._http.stream("POST", PATH, json=body) as answer:
            if answer.status_code == 429:
                return "busy"
            for part in answer.iter_raw(4096):
                time.sleep(0.02)
                last = part
        return "read to the end" if last.endswith(b"\n\n") else "cut"

    def nonsense(self) -> str:
        wrong = (
            {"nothing": 1},
            {"n": -1},
            {"size": "1x1"},
            {"plan": "none"},
            {"prompt": "x" * 40_000},
            {"model": "no"},
        )
        answer = self._http.post(PATH, json=self.body(**self._random.choice(wrong)))
        if answer.status_code not in (400, 404):
            raise AssertionError(answer.text[:300])
        return "refused"

    def too_late(self) -> str:
        answer = self._http.post(PATH, json=self.body(within_s=0.3))
        if answer.status_code not in (200, 410, 429):
            raise AssertionError(answer.text[:300])
        return str(answer.status_code)


@pytest.mark.slow
def test_a_long_day(session: Session, capsys: pytest.CaptureFixture[str]) -> None:
    pictures = {seed: alone(session, seed=seed)[0] for seed in SEEDS}
    seen: Counter[str] = Counter()
    with serving("mini", "--plan", "default", "--rows", "8", "--queue", "12") as process:
        url = process.url
        end_s = time.monotonic() + SOAK_S
        clients = [Client(url, number, seen, pictures) for number in range(CLIENTS)]
        threads = [threading.Thread(target=client.run, args=(end_s,)) for client in clients]
        for thread in threads:
            thread.start()
        server, memory = psutil.Process(process.popen.pid), []
        while any(thread.is_alive() for thread in threads):
            memory.append((server.memory_info().rss, server.num_fds(), server.num_threads()))
            time.sleep(SOAK_S / 200)
        for thread in threads:
            thread.join()
        assert [client.errors for client in clients if client.errors] == []
        health = httpx.get(f"{url}/health").json()
        assert health == {"status": "ok", "models": {"mini": {"running": 0, "waiting": 0}}}
        metrics = httpx.get(f"{url}/metrics").text
        assert 'tgate_images_ended_total{how="failed",model="mini"} 0.0' in metrics
        status, stderr = process.end(signal.SIGTERM)
        assert status == 0
        assert "Traceback" not in stderr
    half = len(memory) // 2
    early, late = (np.median([rss for rss, *_ in part]) for part in (memory[half // 2 : half], memory[-half // 2 :]))
    with capsys.disabled():
        print(f"\n{dict(seen)}; {early / 2**20:.0f} MiB, then {late / 2**20:.0f}")
    assert late < 1.05 * early
    assert max(fds for _, fds, _ in memory[half:]) < 100
    assert max(threads for *_, threads in memory[half:]) <= max(threads for *_, threads in memory[:half])
