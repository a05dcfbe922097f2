"""A server that really listens, in a thread of the test's own process, and what a client sees of it."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np
import openai
import uvicorn
from numpy.typing import NDArray
from PIL import Image

from tgate_runtime.pipeline import Pipeline
from tgate_runtime.session import Session
from tgate_serve.api.app import create_app
from tgate_serve.api.guards import Keys
from tgate_serve.api.limits import Limits
from tgate_serve.api.service import Service
from tgate_serve.metrics import Metrics
from tgate_serve.model import Model
from tgate_serve.server import listening
from tgate_serve.worker import Worker

WAIT_S = 120.0
PATH = "/v1/images/generations"


class Server:
    """``url`` of a server, ``service`` behind it, and a client without retries."""

    def __init__(self, url: str, service: Service) -> None:
        self.url = url
        self.service = service
        self.http = httpx.Client(base_url=url, timeout=WAIT_S)

    @property
    def worker(self) -> Worker:
        """Of its first model."""
        return next(iter(self.service.models.values())).worker

    def openai(self, **more: Any) -> openai.OpenAI:
        """OpenAI's own client."""
        return openai.OpenAI(base_url=f"{self.url}/v1", max_retries=0, timeout=WAIT_S, **{"api_key": "none", **more})

    def draw(self, **asked: Any) -> httpx.Response:
        return self.http.post(PATH, json={"prompt": "a green star", **asked})

    def refused(self, **asked: Any) -> tuple[int, dict[str, Any]]:
        """The status and the error of a request that is not drawn."""
        answer = self.draw(**asked)
        assert answer.status_code >= 400, answer.text[:200]
        return answer.status_code, answer.json()["error"]

    def events(self, **asked: Any) -> Iterator[dict[str, Any]]:
        """The events of a stream, as they come."""
        body = {"prompt": "a green star", "stream": True, **asked}
        with self.http.stream("POST", PATH, json=body) as answer:
            assert answer.status_code == 200, answer.read()
            assert answer.headers["content-type"].startswith("text/event-stream")
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    yield json.loads(line[6:])


@contextmanager
def running(
    session: Session,
    *,
    keys: Keys | None = None,
    hosts: Collection[str] | None = None,
    limits: Limits | None = None,
    **worker: Any,
) -> Iterator[Server]:
    """A server of one model, ``mini``, with a worker of its own. ``worker``: its arguments."""
    models: dict[str, Model] = {}
    metrics = Metrics(models)
    with Worker(session, on_call=metrics.on_call("mini"), **worker) as made, listening("127.0.0.1", 0) as listener:
        models["mini"] = Model("mini", session, made)
        service = Service(models, metrics, limits)
        app = create_app(service, keys=keys, hosts=hosts)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=10))
        thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listener])))
        thread.start()
        try:
            assert until(lambda: server.started)
            found = Server(f"http://127.0.0.1:{listener.getsockname()[1]}", service)
            yield found
            found.http.close()
        finally:
            server.should_exit = True
            thread.join()


def until(true: Any) -> bool:
    """Whether it comes true in time."""
    end_s = time.monotonic() + WAIT_S
    while not true() and time.monotonic() < end_s:
        time.sleep(0.01)
    return bool(true())


def picture(text: str) -> Image.Image:
    """A picture of an answer."""
    return Image.open(io.BytesIO(base64.b64decode(text)))


def pixels(text: str) -> NDArray[np.uint8]:
    return np.asarray(picture(text).convert("RGB"))


def alone(session: Session, prompt: str = "a green star", **asked: Any) -> Sequence[NDArray[np.uint8]]:
    """What a pipeline draws of the same request."""
    return [np.asarray(image) for image in Pipeline(session)(prompt, **asked).images]
