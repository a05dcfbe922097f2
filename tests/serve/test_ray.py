"""Two replicas under Ray Serve: a replica that is killed costs no request, and clients see what one server shows."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import secrets
import shutil
import signal
import socket
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tgate_engine.bundle import Bundle
from tgate_runtime.engines import open_engine
from tgate_runtime.mini import place_of
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.session import Session
from tgate_serve.api.app import create_app
from tgate_serve.api.service import Service
from tgate_serve.server import Serving, opened

ray = pytest.importorskip("ray")
from fastapi.testclient import TestClient  # noqa: E402
from ray import serve  # noqa: E402

from tgate_serve.ray import build  # noqa: E402

PROMPT = "a green star"
PATH = "/v1/images/generations"
WAIT_S = 60.0
ROWS, QUEUE = 4, 16


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """A Ray of this file's own, and the address that its applications answer at."""
    keep = {name: os.environ.get(name) for name in ("RAY_USAGE_STATS_ENABLED", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN")}
    # Who finds no token writes one into the home directory.
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # Ray's sockets lie in it, and their names may be 107 long
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    try:
        ray.init(num_cpus=4, include_dashboard=False, _temp_dir=folder, log_to_driver=False, logging_level="ERROR")
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        yield f"http://127.0.0.1:{port}"
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
        for name, value in keep.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)


class Client:
    """What a client does with the application."""

    def __init__(self, url: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=WAIT_S)

    def draw(self, **asked: Any) -> httpx.Response:
        return self.http.post(PATH, json={"prompt": PROMPT, **asked})

    def events(self, **asked: Any) -> Iterator[dict[str, Any]]:
        with self.http.stream("POST", PATH, json={"prompt": PROMPT, "stream": True, **asked}) as answer:
            assert answer.status_code == 200, answer.read()
            yield {"type": "began", "id": answer.headers["X-Request-Id"]}
            yield from (json.loads(line[6:]) for line in answer.iter_lines() if line.startswith("data: "))

    def counted(self, metric: str, text: str | None = None, **labels: str) -> Counter[str]:
        """A metric by replica; ``text``: of one look at all metrics, for several at the same time."""
        found: Counter[str] = Counter()
        text = self.http.get("/metrics").text if text is None else text
        for name, said, value in re.findall(r"^(\w+)\{(.*)\} (\S+)$", text, re.MULTILINE):
            tags = dict(re.findall(r'(\w+)="([^"]*)"', said))
            if name == metric and labels.items() <= tags.items():
                found[tags["replica"]] += round(float(value))
        return found

    def there(self) -> int:
        """Images that run or wait."""
        return sum(self.counted("tgate_images").values())

    def cancelled(self) -> int:
        return sum(self.counted("tgate_images_ended_total", how="cancelled").values())


@pytest.fixture(scope="module")
def client(cluster: str) -> Iterator[Client]:
    """Of two replicas of ``mini``."""
    said = {"bundles": "mini", "replicas": "2", "threads": "1", "rows": str(ROWS), "queue": str(QUEUE)}
    serve.run(build(said), name="tgate")
    client = Client(cluster)
    yield client
    client.http.close()


@pytest.fixture(scope="module")
def alone() -> Iterator[Callable[[int], NDArray[np.uint8]]]:
    """What a pipeline draws of a seed."""
    with Session.open("mini", threads=1) as session:
        known: dict[int, NDArray[np.uint8]] = {}

        def draw(seed: int) -> NDArray[np.uint8]:
            if seed not in known:
                known[seed] = np.asarray(Pipeline(session)(PROMPT, seed=seed).images[0])
            return known[seed]

        yield draw


def pixels(text: str) -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


def until(true: Callable[[], bool], wait_s: float = WAIT_S) -> bool:
    end_s = time.monotonic() + wait_s
    while not (found := true()) and time.monotonic() < end_s:
        time.sleep(0.02)
    return found


def pid_of(replica: str) -> int:
    actor = ray.get_actor(f"SERVE_REPLICA::tgate#Replica#{replica}", namespace="serve")
    return int(ray.get(actor.__ray_call__.remote(lambda _: os.getpid())))


def both(client: Client) -> dict[str, int]:
    """The processes of two replicas that answer, by their ids, once there are two."""
    assert until(lambda: len(client.counted("tgate_planned_bytes")) == 2)
    return {replica: pid_of(replica) for replica in client.counted("tgate_planned_bytes")}


def test_no_accepted_request_is_lost_when_a_replica_is_killed(
    client: Client, alone: Callable[[int], NDArray[np.uint8]]
) -> None:
    pids = both(client)
    seeds = [seed for seed in range(8) for _ in range(3)]
    with ThreadPoolExecutor(len(seeds)) as pool:
        answers = [pool.submit(client.draw, seed=seed) for seed in seeds]
        running: Counter[str] = Counter()

        def all_taken() -> bool:
            nonlocal running
            text = client.http.get("/metrics").text
            running = client.counted("tgate_images", text, state="running")
            ended = client.counted("tgate_images_ended_total", text, how="through")
            return sum((client.counted("tgate_images", text) + ended).values()) >= len(seeds)

        assert until(all_taken)
        assert min(running.values()) > 0
        os.kill(pids[max(running, key=lambda replica: running[replica])], signal.SIGKILL)
        assert not all(answer.done() for answer in answers)
        drawn = [answer.result() for answer in answers]
    assert [answer.status_code for answer in drawn] == [200] * len(seeds)
    for seed, answer in zip(seeds, drawn, strict=True):
        (picture,) = answer.json()["data"]
        assert picture["seed"] == seed
        np.testing.assert_array_equal(pixels(picture["b64_json"]), alone(seed))


def test_a_stream_goes_on_when_its_replica_is_killed(client: Client, alone: Callable[[int], NDArray[np.uint8]]) -> None:
    pids = both(client)
    events = []
    for event in client.events(n=2, seed=2, stream_steps=True, partial_images=1):
        events.append(event)
        if event.get("done") == 5 and pids:
            running = client.counted("tgate_images", state="running")
            os.kill(pids[max(running, key=lambda replica: running[replica])], signal.SIGKILL)
            pids = {}
    ids = {event["id"] for event in events if "id" in event}
    told = Counter(key(event) for event in events if "image_index" in event)
    assert len(ids) == 1
    assert set(told.values()) == {1}
    assert Counter(kind for kind, *_ in told) == {
        "image_generation.step": 50,
        "image_generation.partial_image": 2,
        "image_generation.completed": 2,
    }
    for event in events[-2:]:
        np.testing.assert_array_equal(pixels(event["b64_json"]), alone(event["seed"]))
    assert {event["seed"] for event in events[-2:]} == {2, 3}


def key(event: Mapping[str, Any]) -> tuple[Any, ...]:
    """What an event tells of, as a person would say it."""
    return tuple(event.get(name) for name in ("type", "image_index", "step", "partial_image_index", "graph"))


@pytest.fixture(scope="module")
def plain() -> Iterator[TestClient]:
    """The same server in one process, without Ray."""
    bundle = Bundle.open(place_of("mini"))
    serving = Serving(rows=ROWS, queue=QUEUE)
    with (
        opened({"mini": bundle}, open_engine("ort-cpu", threads=1), serving) as (models, metrics),
        TestClient(create_app(Service(models, metrics))) as client,
    ):
        yield client


def test_a_stream_has_the_events_of_one_server(client: Client, plain: TestClient) -> None:
    asked = {"prompt": PROMPT, "stream": True, "seed": 9, "partial_images": 2, "stream_steps": True}
    lines = plain.post(PATH, json=asked).text.splitlines()
    there = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
    here = list(client.events(**asked))[1:]
    assert [key(event) for event in here] == [key(event) for event in there]
    for mine, theirs in zip(here, there, strict=True):
        assert mine.keys() == theirs.keys()
        if "b64_json" in mine:
            np.testing.assert_array_equal(pixels(mine["b64_json"]), pixels(theirs["b64_json"]))


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("POST", PATH, b'{"prompt": "x", "steps": 3}'),
        ("POST", PATH, b'{"prompt": "x", "model": "nix"}'),
        ("POST", PATH, b'{"prompt": "x", "model": 3}'),
        ("POST", PATH, b'{"prompt": "x", "n": 0, "within_s": 1e400}'),
        ("POST", PATH, b'{"prompt": "x", "plan": "nix"}'),
        ("POST", PATH, b"{"),
        ("POST", PATH, b"[" * 100_000),
        ("POST", PATH, b" " * (2**25 + 1)),
        ("DELETE", f"{PATH}/img_nix", b""),
        ("PUT", PATH, b""),
        ("GET", "/v1/nix", b""),
        ("POST", "/v1/videos", b'{"prompt": "x"}'),
        ("GET", "/v1/videos", b""),
        ("GET", "/v1/videos/video_nix", b""),
        ("GET", "/", b""),
        ("GET", "/openapi.json", b""),
        ("GET", "/health", b""),
        ("GET", "/ready", b""),
    ],
)
def test_answers_are_those_of_one_server(
    client: Client, plain: TestClient, method: str, path: str, body: bytes
) -> None:
    kind = {"Content-Type": "application/json"}
    here, there = (each.request(method, path, content=body, headers=kind) for each in (client.http, plain))
    assert here.status_code == there.status_code
    assert here.headers["content-type"] == there.headers["content-type"]
    assert here.text == there.text


def test_edits_are_refused_by_name(client: Client) -> None:
    """What they begin from would have to travel to a replica, which the ingress does not do."""
    answer = client.http.post("/v1/images/edits", json={"prompt": PROMPT})
    assert answer.status_code == 400
    assert "are not drawn by replicas; ask a server that `tgate serve` started" in answer.json()["error"]["message"]


def test_models_are_told_as_one_server_tells_them(client: Client, plain: TestClient) -> None:
    here, there = (each.get("/v1/models/mini").json() for each in (client.http, plain))
    assert {**here, "created": 0} == {**there, "created": 0}


def test_a_seed_that_was_not_said_is_told(client: Client, alone: Callable[[int], NDArray[np.uint8]]) -> None:
    (picture,) = client.draw().json()["data"]
    np.testing.assert_array_equal(pixels(picture["b64_json"]), alone(picture["seed"]))


def test_who_hangs_up_frees_the_place(client: Client) -> None:
    before = client.cancelled()
    events = client.events(n=10, stream_steps=True)
    assert until(lambda: next(events)["type"].endswith("step"))
    events.close()  # type: ignore[attr-defined]
    assert until(lambda: client.cancelled() > before and client.there() == 0)
    between = client.cancelled()
    with pytest.raises(httpx.ReadTimeout):
        client.http.post(PATH, json={"prompt": PROMPT, "n": 10}, timeout=0.3)
    assert until(lambda: client.cancelled() > between and client.there() == 0)


def test_a_request_is_called_off_wherever_it_is(client: Client) -> None:
    events = client.events(n=10, stream_steps=True)
    identity = next(events)["id"]
    assert until(lambda: next(events)["type"].endswith("step"))
    assert client.http.delete(f"{PATH}/{identity}").json() == {"id": identity, "cancelled": True}
    last = list(events)[-1]
    assert last["type"] == "error"
    assert last["error"]["code"] == "cancelled"


def test_full_queues_are_told_with_a_time(client: Client) -> None:
    with ThreadPoolExecutor(6) as pool:
        asked = [pool.submit(begun, client, n=10) for _ in range(6)]  # of whom each replica has room for two
        told = [each.result() for each in asked]
    refused = [answer for answer in told if answer.status_code == 429]
    assert len(refused) >= 2
    assert Counter(answer.status_code for answer in told).keys() == {200, 429}
    assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
    assert until(lambda: client.there() == 0)


def begun(client: Client, **asked: Any) -> httpx.Response:
    """The beginning of a stream, which is hung up a while later."""
    with client.http.stream("POST", PATH, json={"prompt": PROMPT, "stream": True, **asked}) as answer:
        if answer.status_code == 200:
            time.sleep(0.5)
        return answer


def test_models_that_do_not_fit_take_turns(
    cluster: str, client: Client, alone: Callable[[int], NDArray[np.uint8]], tmp_path: Path
) -> None:
    shutil.copytree(place_of("mini"), tmp_path / "other")
    keys, key = tmp_path / "keys", secrets.token_hex(16)
    keys.write_text(key)
    said = {"bundles": ["mini", str(tmp_path / "other")], "models_per_replica": 1, "api_key_file": str(keys)}
    serve.run(build(said), name="several", route_prefix="/several")
    several = Client(f"{cluster}/several")
    assert several.draw().status_code == 401
    assert several.http.get("/health").status_code == 200
    several.http.headers["Authorization"] = f"Bearer {key}"
    assert [model["id"] for model in several.http.get("/v1/models").json()["data"]] == ["mini", "other"]
    assert several.counted("tgate_planned_bytes", model="mini")
    names = ["other", "mini"] * 2
    with ThreadPoolExecutor(len(names)) as pool:
        drawn = list(pool.map(lambda name: several.draw(model=name, seed=4), names))
    assert [answer.status_code for answer in drawn] == [200] * len(names)
    assert [answer.json()["tgate"]["model"] for answer in drawn] == names
    for answer in drawn:
        np.testing.assert_array_equal(pixels(answer.json()["data"][0]["b64_json"]), alone(4))
    planned = {name: len(several.counted("tgate_planned_bytes", model=name)) for name in ("mini", "other")}
    assert sorted(planned.values()) == [0, 1]  # one of them is in memory
