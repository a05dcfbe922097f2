"""What the application for Ray Serve is made of, without Ray running: how it is asked for, and what is sent twice."""

from __future__ import annotations

import asyncio
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.parser import text_string_to_metric_families
from starlette.types import Message

from tgate_engine.bundle import Bundle
from tgate_engine.errors import RequestError
from tgate_runtime.mini import place_of

pytest.importorskip("ray")
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError

from tgate_serve.ray import build
from tgate_serve.ray.asked import Asked
from tgate_serve.ray.away import Away
from tgate_serve.ray.passed import Passed
from tgate_serve.ray.settings import Settings
from tgate_serve.ray.summed import summed
from tgate_serve.ray.told import Told

# --- how it is asked for ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ({}, "say bundles=..., such as bundles=bundles/a,bundles/b"),
        ({"bundle": "mini"}, "'bundle' is not known; there is bundles, replicas"),
        ({"bundles": "mini", "replicas": "many"}, "replicas: how many there are, such as 2, or at least and at most"),
        ({"bundles": "mini", "replicas": "3-2"}, "such as 1-4, got '3-2'"),
        ({"bundles": "mini", "replicas": 0}, "such as 1-4, got '0'"),
        ({"bundles": "mini", "threads": "none"}, "threads: input should be a valid integer"),
        ({"bundles": "mini", "engine": "ort"}, "there is no engine 'ort'; the engines are ort-cpu"),
        ({"bundles": "mini", "engine": "ort-cuda", "threads": 2}, "engine ort-cuda computes on a GPU"),
        ({"bundles": "mini,mini"}, "two bundles would be called 'mini'"),
        ({"bundles": "nowhere"}, "nowhere is not a bundle: there is no such directory"),
        ({"bundles": "mini", "plans": "nix"}, "the bundle has no plan 'nix'"),
        ({"bundles": "mini", "sizes": "8x8"}, "the bundle has no size 8x8"),
        ({"bundles": "mini", "api_key_file": "nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_be_served_is_refused_in_one_line(said: dict[str, Any], told: str) -> None:
    with pytest.raises(RequestError) as refused:
        build(said)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
    assert isinstance(refused.value, click.ClickException)  # of which Ray's commands show the line alone
    assert refused.value.format_message() == str(refused.value)


def test_a_bundle_of_videos_is_refused() -> None:
    bundle = Bundle.open(place_of("mini"), check_digests=False)
    film = replace(bundle, manifest=replace(bundle.manifest, frames=4, fps=8))
    with pytest.raises(RequestError, match="film makes videos"):
        Away("film", film, Settings.of({"bundles": "film"}))


def test_replicas_follow_the_load_between_two_numbers() -> None:
    application = build({"bundles": "mini", "replicas": "1-4", "rows": "6", "queue": "10", "threads": "3"})
    replicas = application._bound_deployment.init_args[0]._bound_deployment
    scaling = replicas._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (1, 4)
    assert scaling.get_target_ongoing_requests() == 6
    assert replicas._deployment_config.max_ongoing_requests > 6 + 10
    assert replicas.ray_actor_options["num_cpus"] == 3


def test_an_engine_for_gpus_gets_one() -> None:
    application = build({"bundles": "mini", "engine": "ort-cuda"})
    replicas = application._bound_deployment.init_args[0]._bound_deployment
    assert replicas.ray_actor_options["num_gpus"] == 1


def test_directories_are_found_from_wherever_a_process_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(place_of("mini"), tmp_path / "own")
    monkeypatch.chdir(tmp_path)
    places = build({"bundles": "mini,own"})._bound_deployment.init_args[2]
    assert places == {"mini": "mini", "own": str(tmp_path / "own")}


def test_settings_are_texts_or_values() -> None:
    texts = {"bundles": "a,b", "replicas": "1-2", "gpus": "0.5", "models_per_replica": "1", "engine": "aoti"}
    values = {"bundles": ["a", "b"], "replicas": (1, 2), "gpus": 0.5, "models_per_replica": 1, "engine": "aoti"}
    assert Settings.of(texts) == Settings.of(values)
    assert Settings.of(texts).gpus_kept == 0.5
    assert not Settings.of(texts).on_cpu


# --- what is asked twice ------------------------------------------------------------------------


def test_each_attempt_has_the_same_seed() -> None:
    asked = Asked(b'{"prompt": "x", "n": 2}')
    first, second = json.loads(asked.body(again=False)), json.loads(asked.body(again=True))
    assert first == second
    assert {**first, "seed": None} == {"prompt": "x", "n": 2, "seed": None}
    assert first["seed"] != json.loads(Asked(b'{"prompt": "x", "n": 2}').body(again=False))["seed"]


def test_a_seed_that_was_said_stays() -> None:
    body = Asked('{"prompt": "\N{CAT}", "seed": 7}'.encode()).body(again=False)
    assert json.loads(body) == {"prompt": "\N{CAT}", "seed": 7}


def test_a_second_attempt_has_the_time_that_is_left() -> None:
    asked = Asked(b'{"prompt": "x", "within_s": 5}')
    assert json.loads(asked.body(again=False))["within_s"] == 5
    assert 0 < json.loads(asked.body(again=True))["within_s"] < 5
    assert json.loads(Asked(b'{"within_s": 1e-9}').body(again=True))["within_s"] > 0


@pytest.mark.parametrize("body", [b"", b"{", b"[1]", b"null", b"\xff", b"[" * 100_000, b'{"a":' * 100_000])
def test_what_is_no_request_stays_as_it_is(body: bytes) -> None:
    assert Asked(body).model is None
    assert Asked(body).body(again=True) == body


@pytest.mark.parametrize("within", ["-1", '"5"', "true", "null", "1e400", "NaN", "1" + "0" * 400])
def test_a_time_that_is_none_is_left_to_the_replica(within: str) -> None:
    said = f'{{"within_s": {within}}}'.encode()
    assert repr(json.loads(Asked(said).body(again=True))["within_s"]) == repr(json.loads(said)["within_s"])


# --- what is told once --------------------------------------------------------------------------

STREAM = [(b"content-type", b"text/event-stream; charset=utf-8")]
JSON = [(b"content-type", b"application/json")]


def start(headers: list[tuple[bytes, bytes]], status: int = 200) -> dict[str, Any]:
    return {"type": "http.response.start", "status": status, "headers": headers}


def part(body: bytes, *, more: bool = True) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": more}


def step(image: int, index: int) -> dict[str, Any]:
    event = {"type": "image_generation.step", "image_index": image, "step": index, "done": image + index}
    return part(f"event: image_generation.step\ndata: {json.dumps(event)}\n\n".encode())


def told(answer: Told, *messages: dict[str, Any]) -> list[Message]:
    return [due for message in messages for due in answer.due(message)]


def test_an_answer_in_one_piece_waits_until_it_is_whole() -> None:
    answer = Told()
    whole = [start(JSON), part(b"{"), part(b"}", more=False)]
    assert told(answer, *whole[:2]) == []
    assert not answer.ended
    assert told(answer, *whole) == whole  # of another replica
    assert answer.ended


def test_events_are_told_once_in_whatever_order_they_come_again() -> None:
    answer, beat = Told(), part(b": waiting\n\n")
    first = [start(STREAM), beat, step(0, 0), step(1, 0), step(0, 1)]
    assert told(answer, *first) == first
    assert answer.began
    again = [start(STREAM), beat, step(0, 0), step(0, 1), step(0, 2), step(1, 0), step(1, 1), part(b"", more=False)]
    assert told(answer, *again) == [beat, step(0, 2), step(1, 1), again[-1]]
    assert answer.ended


def test_a_second_attempt_that_is_refused_ends_the_stream_with_its_error() -> None:
    answer = Told()
    told(answer, start(STREAM), step(0, 0))
    error = b'{"error": {"message": "too late", "code": "too_late"}}'
    (last,) = told(answer, start(JSON, 410), part(error, more=False))
    assert last["body"].startswith(b"event: error\n")
    assert json.loads(last["body"].partition(b"data: ")[2]) == {"type": "error", **json.loads(error)}
    assert not last["more_body"]
    assert answer.ended


# --- who is asked -------------------------------------------------------------------------------

WHOLE = [start(JSON), part(b"{}", more=False)]
BUSY = [start(JSON, 429), part(b"busy", more=False)]
STOPPED = [start(JSON, 503), part(b"stopped", more=False)]
DIES = RayActorError()


class Replicas:
    """A handle whose replicas answer by turns what they were told to."""

    def __init__(self, *answers: list[Any]) -> None:
        self.answers = list(answers)
        self.asked: list[tuple[str, dict[str, Any], bytes]] = []

    def remote(self, name: str, scope: dict[str, Any], body: bytes) -> Replicas:
        self.asked.append((name, scope, body))
        self.parts = iter(self.answers.pop(0))
        return self

    def cancel(self) -> None:
        self.parts = iter(())

    def __aiter__(self) -> Replicas:
        return self

    async def __anext__(self) -> Any:
        for each in self.parts:
            if isinstance(each, Exception):
                raise each
            return {**each}
        raise StopAsyncIteration


def passed(monkeypatch: pytest.MonkeyPatch, replicas: Replicas, *headers: tuple[bytes, bytes]) -> list[Message]:
    """What a client gets of them."""
    monkeypatch.setattr("tgate_serve.ray.passed._PAUSE_S", 0.0)
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def receive() -> Message:
        raise AssertionError("the body has been read")

    scope = {"type": "http", "http_version": "1.1", "scheme": "http", "method": "POST", "path": "/p"}
    answer = Passed(replicas, "mini", Asked(b'{"prompt": "x"}'))
    asyncio.run(answer({**scope, "query_string": b"", "headers": list(headers)}, receive, send))
    assert not replicas.answers  # nobody is left who should have been asked
    return sent


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ([WHOLE], WHOLE),
        ([[DIES], WHOLE], WHOLE),
        ([[start(JSON), DIES], [DIES], WHOLE], WHOLE),
        ([[*WHOLE, DIES]], WHOLE),  # once all is sent nobody draws again
        ([BUSY], BUSY),  # it was never taken
        ([[DIES], BUSY, BUSY, BUSY, BUSY, WHOLE], WHOLE),  # it was
        ([[DIES], [BackPressureError(1, 1)], WHOLE], WHOLE),
        ([STOPPED, WHOLE], WHOLE),
        ([[start(STREAM), step(0, 0), DIES], BUSY, [start(STREAM), step(0, 0), step(0, 1), part(b"", more=False)]],
         [start(STREAM), step(0, 0), step(0, 1), part(b"", more=False)]),
    ],
)  # fmt: skip
def test_another_replica_is_asked_where_one_ends(
    monkeypatch: pytest.MonkeyPatch, answers: list[list[Any]], told: list[Any]
) -> None:
    replicas = Replicas(*answers)
    assert passed(monkeypatch, replicas) == told
    assert len({body for _, _, body in replicas.asked}) == 1
    assert len({scope["state"]["identity"] for _, scope, _ in replicas.asked}) == 1


@pytest.mark.parametrize(
    ("answers", "status", "code"),
    [
        ([[DIES], [DIES], [DIES]], 503, "stopped"),
        ([[DIES], STOPPED, [DIES]], 503, "stopped"),
        ([[BackPressureError(1, 1)]], 429, "queue_full"),
    ],
)
def test_a_request_that_nobody_draws_is_told_so(
    monkeypatch: pytest.MonkeyPatch, answers: list[list[Any]], status: int, code: str
) -> None:
    first, last = passed(monkeypatch, Replicas(*answers))
    assert first["status"] == status
    assert (b"retry-after", b"1") in first["headers"]
    assert json.loads(last["body"])["error"]["code"] == code


def test_a_stream_that_nobody_draws_on_ends_with_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    *_, last = passed(monkeypatch, Replicas([start(STREAM), step(0, 0), DIES], [DIES], [DIES]))
    assert json.loads(last["body"].partition(b"data: ")[2])["error"]["code"] == "stopped"
    assert not last["more_body"]


def test_a_key_stays_and_an_id_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    identity = b"0123abcd-0123-4567-89ab-0123456789ab"
    replicas = Replicas([start([*JSON, (b"x-request-id", identity)]), WHOLE[1]])
    first, _ = passed(monkeypatch, replicas, (b"authorization", b"Bearer x"), (b"x-request-id", identity))
    assert first["headers"] == JSON  # Ray adds it
    ((_, scope, _),) = replicas.asked
    assert scope["state"]["identity"] == identity.decode()
    assert b"authorization" not in dict(scope["headers"])


# --- what is counted ----------------------------------------------------------------------------


def test_metrics_of_replicas_are_told_apart_and_those_of_one_added() -> None:
    def counted(images: int, requests: int, seconds: float, model: str) -> CollectorRegistry:
        registry = CollectorRegistry()
        Gauge("tgate_images", "now", ("model",), registry=registry).labels(model).set(images)
        Counter("tgate_requests", "all", ("route",), registry=registry).labels("/").inc(requests)
        Histogram("tgate_step_seconds", "calls", ("model",), registry=registry, buckets=(1, 2)).labels(model).observe(
            seconds
        )
        return registry

    one = [*counted(3, 5, 0.5, "a").collect(), *counted(1, 7, 1.5, "b").collect()]
    two = list(counted(2, 11, 9.0, "a").collect())
    text = summed({"one": one, "two": two}).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert families["tgate_requests"].type == "counter"
    values = {
        (sample.name, *sorted(sample.labels.items())): sample.value
        for family in families.values()
        for sample in family.samples
    }
    assert values["tgate_requests_total", ("replica", "one"), ("route", "/")] == 12
    assert values["tgate_requests_total", ("replica", "two"), ("route", "/")] == 11
    assert values["tgate_images", ("model", "a"), ("replica", "one")] == 3
    assert values["tgate_images", ("model", "b"), ("replica", "one")] == 1
    assert values["tgate_images", ("model", "a"), ("replica", "two")] == 2
    assert values["tgate_step_seconds_bucket", ("le", "1.0"), ("model", "a"), ("replica", "one")] == 1
    assert values["tgate_step_seconds_bucket", ("le", "2.0"), ("model", "a"), ("replica", "two")] == 0
    assert values["tgate_step_seconds_count", ("model", "a"), ("replica", "two")] == 1
