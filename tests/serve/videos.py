"""A server in a thread with two small video models, one of prompts and one of pictures, whose calls can be held up."""

from __future__ import annotations

import base64
import functools
import io
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import uvicorn
from PIL import Image

from tests.conftest import family_settings
from tests.tiny_families import make_tiny
from tgate_engine.report import Silent
from tgate_export.build import export
from tgate_runtime.session import Session
from tgate_serve import server
from tgate_serve.api.app import create_app
from tgate_serve.api.limits import Limits
from tgate_serve.api.service import Service
from tgate_serve.metrics import Metrics
from tgate_serve.model import Model
from tgate_serve.worker import Worker

VARIANTS = {"latte": "latte_b", "svd": "svd_b"}
PROMPT = "a red fox runs over snow"
GIF: dict[str, Any] = {"output_format": "gif"}
FOX: dict[str, Any] = {"model": "latte", "prompt": PROMPT, **GIF}
WAIT_S = 60.0
DRAIN_S = 30


def write_bundles(folder: Path) -> None:
    """A bundle of each, of few graphs and steps."""
    for name, variant in VARIANTS.items():
        checkpoint = make_tiny(folder / f"{name}-checkpoint", variant)
        settings = family_settings(variant, checkpoint, folder / name, method="guidance_delta")
        export(replace(settings, steps=6, m=3, batches=[(1, 1)]), Silent())


class Gate:
    """What a worker goes through after each call, before it tells of the step: open, but for a while."""

    def __init__(self) -> None:
        self._open = threading.Event()
        self._open.set()
        self._passes = threading.Semaphore(0)

    def __call__(self, *_: object) -> None:
        while not self._open.is_set() and not self._passes.acquire(timeout=0.005):
            pass

    def let_pass(self, calls: int) -> None:
        """So many calls, while it is shut."""
        self._passes.release(calls)

    @contextmanager
    def shut(self) -> Iterator[None]:
        self._passes = threading.Semaphore(0)
        self._open.clear()
        try:
            yield
        finally:
            self.open()

    def open(self) -> None:
        self._open.set()


class Models:
    """Both, with one row each: whoever comes second waits."""

    def __init__(self, folder: Path, *, queue: int = 3) -> None:
        self.gate = Gate()
        self.models: dict[str, Model] = {}
        for name in VARIANTS:
            session = Session.open(folder / name, threads=1)
            worker = Worker(session, rows=1, queue=queue, on_call=self.gate)
            self.models[name] = Model(name, session, worker)

    def close(self) -> None:
        self.gate.open()
        for model in self.models.values():
            model.worker.close()
            model.session.close()


class Running:
    """A server that answers. ``server.should_exit`` is what a signal sets."""

    def __init__(self, models: Mapping[str, Model], limits: Limits, clock: Callable[[], float]) -> None:
        self.service = Service(models, Metrics(models), limits, clock)
        config = uvicorn.Config(create_app(self.service), log_config=None)
        self.server = server._Server(config, self.service, DRAIN_S)
        self.listener = server.listening("127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=lambda: self.server.run(sockets=[self.listener]))
        self.thread.start()
        self.client = httpx.Client(base_url=self.url, timeout=WAIT_S)

    def ask(self, status: int = 200, **asked: Any) -> dict[str, Any]:
        """The answer to a POST of JSON; of one that is refused, the error."""
        return told(self.client.post("/v1/videos", json=asked), status)

    def get(self, path: str, status: int = 200, **query: Any) -> dict[str, Any]:
        return told(self.client.get(f"/v1/videos{path}", params=query), status)

    def until(self, identity: str, *statuses: str) -> dict[str, Any]:
        """The video once it has one of those."""
        return until(lambda: self.get(f"/{identity}"), lambda video: video["status"] in statuses)

    def content(self, identity: str) -> bytes:
        """Of a video, once it is completed."""
        video = self.until(identity, "completed", "failed", "cancelled")
        assert video["status"] == "completed", video["error"]
        return self.client.get(f"/v1/videos/{identity}/content").raise_for_status().content

    def close(self) -> None:
        self.server.should_exit = self.server.force_exit = True
        self.client.close()
        self.thread.join()


def told(response: httpx.Response, status: int) -> dict[str, Any]:
    body = response.json()
    assert response.status_code == status, body
    found = body if status == 200 else body["error"]
    assert isinstance(found, dict)
    return found


def until(look: Callable[[], Any], enough: Callable[[Any], bool]) -> Any:
    """What ``look`` sees once it is enough."""
    end_s = time.monotonic() + WAIT_S
    while not enough(seen := look()):
        assert time.monotonic() < end_s, seen
        time.sleep(0.01)
    return seen


@contextmanager
def running(
    models: Mapping[str, Model], limits: Limits | None = None, clock: Callable[[], float] = time.time
) -> Iterator[Running]:
    server_there = Running(models, limits or Limits(), clock)
    try:
        until(lambda: server_there.server.started, bool)
        yield server_there
    finally:
        server_there.close()


@functools.cache
def start() -> Image.Image:
    return Image.fromarray(np.random.default_rng(3).integers(0, 256, (20, 40, 3), np.uint8))


@functools.cache
def png() -> bytes:
    content = io.BytesIO()
    start().save(content, "PNG")
    return content.getvalue()


def data_url(content: bytes = b"") -> dict[str, str]:
    return {"image_url": f"data:image/png;base64,{base64.b64encode(content or png()).decode()}"}


def frames_of(content: bytes) -> list[Image.Image]:
    with Image.open(io.BytesIO(content)) as image:
        found = []
        for i in range(image.n_frames):  # type: ignore[attr-defined]
            image.seek(i)
            found.append(image.convert("RGB"))
        return found
