"""``tgate serve`` as a process: how it starts, what it refuses, how it ends."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import httpx
import numpy as np
import pytest

from tests.serve.running import PATH, alone, pixels, until
from tgate_runtime.session import Session

COMMAND = [sys.executable, "-m", "tgate_engine", "serve"]
WAIT_S = 120


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    return subprocess.run([*COMMAND, *arguments], text=True, capture_output=True, timeout=WAIT_S, check=False)


@dataclass(frozen=True)
class Process:
    """A server's process, and where it answers."""

    popen: subprocess.Popen[str]
    url: str
    log: IO[str]

    def end(self, *signals: signal.Signals) -> tuple[int, str]:
        """Its exit status after those signals, and what it wrote to standard error."""
        for number in signals:
            self.popen.send_signal(number)
        status = self.popen.wait(WAIT_S)
        self.log.seek(0)
        return status, self.log.read()


@contextmanager
def serving(*arguments: str) -> Iterator[Process]:
    command = [*COMMAND, *arguments, "--port", "0", "--threads", "1"]
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=log) as popen,
    ):
        try:
            assert popen.stdout is not None
            match = re.search(r"http://\S+", popen.stdout.readline())
            if match is None:
                log.seek(0)
                raise AssertionError(log.read())
            yield Process(popen, match[0], log)
        finally:
            popen.kill()


def test_a_server_ends_what_was_asked_and_then_itself(session: Session) -> None:
    place = session.bundle.path
    with serving(f"mini={place}", f"star={place}", "--plan", "default") as process, ThreadPoolExecutor(6) as pool:
        url = process.url
        models = httpx.get(f"{url}/v1/models").json()["data"]
        assert [model["id"] for model in models] == ["mini", "star"]
        assert [plan["name"] for plan in models[1]["tgate"]["plans"]] == ["default"]

        def draw(seed: int) -> httpx.Response:
            body = {"prompt": "a green star", "seed": seed, "n": 2, "model": ("mini", "star")[seed % 2]}
            return httpx.post(f"{url}{PATH}", json=body, timeout=WAIT_S)

        asked = [pool.submit(draw, seed) for seed in range(6)]

        def arrived() -> bool:
            loads = httpx.get(f"{url}/health").json()["models"].values()
            return sum(load["running"] + load["waiting"] for load in loads) == 12

        assert until(arrived)
        process.popen.send_signal(signal.SIGTERM)
        for seed, answer in enumerate(each.result() for each in asked):
            assert answer.status_code == 200
            first, _ = answer.json()["data"]
            np.testing.assert_array_equal(pixels(first["b64_json"]), alone(session, seed=seed)[0])
        status, stderr = process.end()
    assert status == 0
    assert stderr.rstrip().endswith("stopped")
    assert "Traceback" not in stderr
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


@pytest.mark.parametrize(
    ("drain_s", "signals"), [("0", [signal.SIGTERM]), ("60", [signal.SIGTERM, signal.SIGTERM])], ids=["late", "twice"]
)
@pytest.mark.parametrize("stream", [False, True])
def test_who_is_not_waited_for_is_told(drain_s: str, signals: list[signal.Signals], stream: bool) -> None:
    with serving("mini", "--drain-seconds", drain_s) as process, ThreadPoolExecutor(2) as pool:
        body = {"prompt": "a", "n": 10, "plan": "ungated", "stream": stream}
        asked = [pool.submit(httpx.post, f"{process.url}{PATH}", json=body, timeout=WAIT_S) for _ in range(2)]

        def there() -> int:
            model = httpx.get(f"{process.url}/health").json()["models"]["mini"]
            return int(model["running"] + model["waiting"])

        assert until(lambda: there() == 20)
        for number in signals[:-1]:
            process.popen.send_signal(number)
            threading.Event().wait(0.3)
            assert process.popen.poll() is None
        status, stderr = process.end(signals[-1])
        for answer in (each.result() for each in asked):
            assert answer.status_code == (200 if stream else 503)
            assert answer.text.count('"the server has stopped; ask again"') == 1
    assert status == 0
    assert "Traceback" not in stderr


def test_headers_have_a_limit() -> None:
    """Before a key is asked for, and whichever parsers are installed beside the server."""
    with serving("mini") as process:
        host, port = process.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            client.settimeout(WAIT_S)
            client.sendall(f"GET /health HTTP/1.1\r\nHost: {host}\r\nX-Long: ".encode())
            with contextlib.suppress(ConnectionError):  # it may hang up before all of it is there
                client.sendall(b"x" * 2**20 + b"\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                assert client.recv(100).startswith(b"HTTP/1.1 4")
        assert httpx.get(f"{process.url}/health").status_code == 200


def test_a_second_signal_ends_it_at_once() -> None:
    with serving("mini") as process:
        body = {"prompt": "a", "n": 10, "plan": "ungated", "stream": True}
        with httpx.stream("POST", f"{process.url}{PATH}", json=body, timeout=WAIT_S):
            process.popen.send_signal(signal.SIGINT)
            threading.Event().wait(0.3)
            assert process.popen.poll() is None
            status, _ = process.end(signal.SIGINT)
    assert status == 0


def test_what_nobody_may_reach_needs_a_key_or_a_word(tmp_path: Path) -> None:
    done = run("mini", "--host", "0.0.0.0")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == (
        "tgate: error: 0.0.0.0 can be reached from other machines: give --api-key-file, or --without-api-key if "
        "whoever reaches it may draw"
    )
    keys = tmp_path / "keys"
    keys.write_text("a-key-of-enough-letters\n")
    with serving("mini", "--host", "0.0.0.0", "--api-key-file", str(keys)) as process:
        port = process.url.rpartition(":")[2]
        here = f"http://127.0.0.1:{port}"
        assert httpx.get(f"{here}/health", headers={"host": "any.example"}).status_code == 200
        assert httpx.get(f"{here}/v1/models").status_code == 401
        named = httpx.get(f"{here}/v1/models", headers={"authorization": "Bearer a-key-of-enough-letters"})
        assert named.status_code == 200


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (["nothing-here"], 1, "nothing-here"),
        (["mini", "mini"], 1, "two bundles would be called 'mini'; give one a name: NAME=DIRECTORY"),
        (["=mini"], 1, "a bundle is a directory, or NAME=DIRECTORY, got '=mini'"),
        (["star="], 1, "a bundle is a directory, or NAME=DIRECTORY, got 'star='"),
        (["a/b=mini"], 1, "a model's name is printable and without /, got 'a/b'"),
        (["mini", "--plan", "fast"], 1, "fast"),
        (["mini", "--size", "512x512"], 1, "512x512"),
        (["mini", "--memory-limit", "10MiB"], 1, "8 images of 128x128 at once take .* and 10485760 are allowed"),
        (["mini", "--memory-limit", "10"], 2, "expected a size such as 900MiB or 8GiB, got '10'"),
        (["mini", "--port", "65536"], 2, "from 0 to 65535"),
        (["mini", "--host", "no.such.host.example"], 1, "can be reached from other machines"),
        (["mini", "--host", "no.such.host.example", "--without-api-key"], 1, "cannot listen on no.such.host.example"),
        (["mini", "--api-key-file", "/dev/null"], 1, "/dev/null"),
        (["mini", "--queue", "0"], 2, "--queue"),
        ([], 2, "BUNDLE"),
    ],
)
def test_what_cannot_be_served(arguments: list[str], status: int, says: str) -> None:
    done = run(*arguments)
    assert done.returncode == status
    assert "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("tgate: error: ")
    assert re.search(says, last)


def test_a_port_that_is_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = run("mini", "--port", str(port))
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1 port {port} (Address already in use)" in done.stderr


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "fastapi.py").write_text("raise ModuleNotFoundError(\"No module named 'fastapi'\", name='fastapi')\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*COMMAND, "mini"], text=True, capture_output=True, check=False, env={**os.environ, "PYTHONPATH": path}
    )
    assert done.returncode == 1
    assert done.stderr == "tgate: error: serving needs fastapi; pip install 'tgate-engine[serve,cpu]'\n"
