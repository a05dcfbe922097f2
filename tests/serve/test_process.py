"""``tgate serve`` as a process: how it starts, what it refuses, how it ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest

from tests.serve.running import PATH, alone, pixels
from tgate_runtime.session import Session

COMMAND = [sys.executable, "-m", "tgate_engine", "serve"]
WAIT_S = 120


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    return subprocess.run([*COMMAND, *arguments], text=True, capture_output=True, timeout=WAIT_S, check=False)


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server's process, and where it answers."""
    command = [*COMMAND, *arguments, "--port", "0", "--threads", "1"]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            match = re.search(r"http://\S+", line)
            assert match, line + (process.stderr.read() if process.stderr else "")
            yield process, match[0]
        finally:
            process.kill()


def test_a_server_ends_what_was_asked_and_then_itself(session: Session) -> None:
    with serving("mini", "star=mini", "--plan", "default") as (process, url), ThreadPoolExecutor(6) as pool:
        models = httpx.get(f"{url}/v1/models").json()["data"]
        assert [model["id"] for model in models] == ["mini", "star"]
        assert [plan["name"] for plan in models[1]["tgate"]["plans"]] == ["default"]
        sent = threading.Barrier(7)

        def draw(seed: int) -> httpx.Response:
            sent.wait()
            body = {"prompt": "a green star", "seed": seed, "model": ("mini", "star")[seed % 2]}
            return httpx.post(f"{url}{PATH}", json=body, timeout=WAIT_S)

        asked = [pool.submit(draw, seed) for seed in range(6)]
        sent.wait()
        threading.Event().wait(0.5)
        process.send_signal(signal.SIGTERM)
        for seed, answer in enumerate(each.result() for each in asked):
            assert answer.status_code == 200
            np.testing.assert_array_equal(pixels(answer.json()["data"][0]["b64_json"]), alone(session, seed=seed)[0])
        _, stderr = process.communicate(timeout=WAIT_S)
    assert process.returncode == 0
    assert stderr.rstrip().endswith("stopped")
    assert "Traceback" not in stderr
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


def test_a_second_signal_ends_it_at_once() -> None:
    with serving("mini") as (process, url):
        body = {"prompt": "a", "n": 10, "plan": "ungated", "stream": True}
        with httpx.stream("POST", f"{url}{PATH}", json=body, timeout=WAIT_S):
            process.send_signal(signal.SIGINT)
            threading.Event().wait(0.3)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=10)
    assert process.returncode == 0


def test_what_nobody_may_reach_needs_a_key_or_a_word(tmp_path: Path) -> None:
    done = run("mini", "--host", "0.0.0.0")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1] == (
        "tgate: error: 0.0.0.0 can be reached from other machines: give --api-key-file, or --without-api-key if "
        "whoever reaches it may draw"
    )
    keys = tmp_path / "keys"
    keys.write_text("a-key-of-enough-letters\n")
    with serving("mini", "--host", "0.0.0.0", "--api-key-file", str(keys)) as (_, url):
        port = url.rpartition(":")[2]
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
        (["a/b=mini"], 1, "a model's name is printable and without /, got 'a/b'"),
        (["mini", "--plan", "fast"], 1, "fast"),
        (["mini", "--size", "512x512"], 1, "512x512"),
        (["mini", "--memory-limit", "10MiB"], 1, "16 images of 128x128 at once take .* and 10485760 are allowed"),
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
