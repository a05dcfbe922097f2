"""Pictures over HTTP are those that a pipeline draws, whoever asks, in whatever form; what cannot be is refused by
name."""

from __future__ import annotations

import base64
import io
import logging
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest

from tests.serve.running import PATH, Server, alone, picture, pixels, running, until
from tests.toy_bundle import Toy, build
from tgate_engine.errors import EngineError
from tgate_engine.graph import Role
from tgate_runtime.encoder import Encoder
from tgate_runtime.session import Session
from tgate_runtime.stamps import read_stamp
from tgate_runtime.state import State
from tgate_serve.handle import Drawn
from tgate_serve.worker import Worker


@pytest.fixture(scope="module")
def server(session: Session) -> Iterator[Server]:
    with running(session, rows=6, added=0.1) as found:
        yield found


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While this event is not set, no call is made."""
    event, real = threading.Event(), State.take

    def take(self: State, rows: range) -> Any:
        assert event.wait(60)
        return real(self, rows)

    monkeypatch.setattr(State, "take", take)
    yield event
    event.set()


# --- what is drawn ------------------------------------------------------------------------------


def test_openais_client_draws_what_a_pipeline_draws(server: Server, session: Session) -> None:
    answer = server.openai().images.generate(
        model="mini",
        prompt="a red circle",
        n=2,
        size="128x128",
        response_format="b64_json",
        extra_body={"seed": 7, "negative_prompt": "blue", "guidance_scale": 3.0},
    )
    expected = alone(session, "a red circle", num_images=2, seed=7, negative_prompt="blue", guidance_scale=3.0)
    assert answer.data is not None
    for image, pipeline in zip(answer.data, expected, strict=True):
        np.testing.assert_array_equal(pixels(str(image.b64_json)), pipeline)
    assert (answer.size, answer.output_format, answer.background) == ("128x128", "png", "opaque")
    assert [image.model_extra for image in answer.data] == [{"seed": 7}, {"seed": 8}]
    report = answer.model_extra["tgate"]  # type: ignore[index]
    assert report["plan"] == "default"
    assert report["steps"] == {"full": 8, "reuse_self": 7, "reuse_cross": 10}
    assert report["guidance_scale"] == 3.0
    assert report["cut"] is None
    record = read_stamp(base64.b64decode(str(answer.data[1].b64_json)), "the answer")
    assert (record.prompt, record.seed, record.negative_prompt, record.plan.name) == (
        "a red circle",
        8,
        "blue",
        "default",
    )


def test_openais_client_sees_a_picture_form(server: Server, session: Session) -> None:
    stream = server.openai().images.generate(
        model="mini", prompt="a green star", stream=True, partial_images=3, extra_body={"seed": 3}
    )
    events = list(stream)
    assert [event.type for event in events] == ["image_generation.partial_image"] * 3 + ["image_generation.completed"]
    assert [getattr(event, "partial_image_index", None) for event in events] == [0, 1, 2, None]
    (final,) = alone(session, seed=3)
    np.testing.assert_array_equal(pixels(events[-1].b64_json), final)
    errors = [np.abs(pixels(event.b64_json).astype(float) - final).mean() for event in events]
    assert errors == sorted(errors, reverse=True)  # each look is nearer to what it becomes
    assert errors[2] < 0.5 * errors[0]


def test_a_stream_tells_of_each_step(server: Server) -> None:
    events = list(server.events(seed=3, n=2, stream_steps=True, partial_images=1))
    steps = [event for event in events if event["type"] == "image_generation.step"]
    assert [step["done"] for step in steps] == list(range(1, 51))
    assert {step["total"] for step in steps} == {50}
    plan = server.worker.session.plan("default")
    for image in range(2):
        own = [step["graph"] for step in steps if step["image_index"] == image]
        assert own == [step.graph for step in plan.steps]
    assert all(step["elapsed_ms"] > 0 and step["company"] in (1, 2) for step in steps)
    assert events[0] == {"type": "image_generation.queued", "id": steps[0]["id"], "ahead": events[0]["ahead"]}
    last = events[-2:]
    assert [event["type"] for event in last] == ["image_generation.completed"] * 2
    assert [event["seed"] for event in last] == [3, 4]
    assert last[0]["tgate"]["company"] > 1


def test_pictures_do_not_depend_on_company(server: Server, session: Session) -> None:
    asked = [
        {"prompt": "a green star", "seed": 1},
        {"prompt": "a red circle", "seed": 2, "plan": "ungated"},
        {"prompt": "a blue square", "seed": 3, "guidance_scale": 2.0},
        {"prompt": "a yellow triangle", "seed": 4, "plan": "guidance_stopped", "priority": 9},
        {"prompt": "a green star", "seed": 5, "negative_prompt": "a circle"},
        {"prompt": "a red star", "seed": 2**62, "generator": "torch-cuda"},
        {"prompt": "", "seed": 6},
        {"prompt": "two circles", "seed": 7, "n": 3},
    ]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(pool.map(lambda one: server.draw(**one).json(), asked))
    for one, answer in zip(asked, answers, strict=True):
        given = {name: value for name, value in one.items() if name not in ("n", "priority")}
        expected = alone(session, num_images=one.get("n", 1), **given)  # type: ignore[arg-type]
        for image, pipeline in zip(answer["data"], expected, strict=True):
            np.testing.assert_array_equal(pixels(image["b64_json"]), pipeline)
    assert any(answer["tgate"]["company"] > 1 for answer in answers)


def test_a_seed_that_was_drawn_is_told(server: Server) -> None:
    first, second = (server.draw().json()["data"][0] for _ in range(2))
    assert first["seed"] != second["seed"]
    assert server.draw(seed=first["seed"]).json()["data"][0]["b64_json"] == first["b64_json"]


@pytest.mark.parametrize(("form", "pillow"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_formats(server: Server, session: Session, form: str, pillow: str) -> None:
    answer = server.draw(output_format=form, seed=1).json()
    found = picture(answer["data"][0]["b64_json"])
    assert (found.format, answer["output_format"]) == (pillow, form)
    assert np.abs(np.asarray(found.convert("RGB")).astype(float) - alone(session, seed=1)[0]).mean() < 4
    content = io.BytesIO(base64.b64decode(answer["data"][0]["b64_json"]))
    assert read_stamp(content.getvalue(), "it").seed == 1


@pytest.mark.parametrize("form", ["jpeg", "webp"])
def test_compression_compresses(server: Server, form: str) -> None:
    sizes = [
        len(server.draw(output_format=form, output_compression=percent, seed=1).json()["data"][0]["b64_json"])
        for percent in (5, 50, 95)
    ]
    assert sizes == sorted(set(sizes))


def test_a_prompt_that_is_cut_says_so(server: Server) -> None:
    answer = server.draw(prompt="a green star " * 100).json()
    (cut,) = answer["tgate"]["cut"]
    assert ("a green star " * 100).strip().endswith(cut.strip())


# --- plans --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "plan"),
    [
        ({}, "default"),
        ({"plan": "ungated"}, "ungated"),
        ({"plan": "guidance_stopped", "m": 15}, "guidance_stopped"),
        ({"num_inference_steps": 25}, "default"),
        ({"m": 15, "k": 3, "num_inference_steps": 25}, "default"),
        ({"m": 15}, "default"),
    ],
)
def test_a_plan_is_chosen_by_what_is_said_of_it(server: Server, asked: dict[str, Any], plan: str) -> None:
    assert server.draw(**asked).json()["tgate"]["plan"] == plan


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"plan": "fast"}, "plan 'fast' is not served; there is default (steps=25, m=15, k=3); ungated (steps=25)"),
        ({"plan": "ungated", "m": 15}, "plan 'ungated' is of steps=25, not of m=15; leave one out"),
        ({"m": 10, "k": 5}, "no plan of m=10, k=5 is served; there is default (steps=25, m=15, k=3)"),
        ({"num_inference_steps": 50}, "no plan of steps=50 is served"),
        ({"plan": "../../etc/passwd.json"}, "plan '../../etc/passwd.json' is not served"),
    ],
)
def test_a_plan_that_is_not_there_is_refused(server: Server, asked: dict[str, Any], says: str) -> None:
    status, error = server.refused(**asked)
    assert status == 400
    assert error["message"].startswith(says)
    assert error["type"] == "invalid_request_error"


# --- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "param", "says"),
    [
        ({"quality": "hd"}, "quality", "parameter 'quality' is not known or has no effect; say plan, or m, k"),
        ({"style": "vivid"}, "style", "say it in the prompt"),
        ({"steps": 25}, "steps", "say num_inference_steps"),
        ({"width": 128, "height": 128}, "width", "say size"),
        ({"enable_teacache": True}, "enable_teacache", "leave it out"),
        ({"\u202eevil\n": 1}, "\\u202eevil\\n", "is not known"),
        ({"partial_images": 2}, "partial_images", "partial_images has no effect without stream: true"),
        ({"stream_steps": True}, "stream_steps", "no effect without stream"),
        ({"output_compression": 50}, "output_compression", "no effect on png"),
        ({"response_format": "url"}, "response_format", "response_format: Input should be 'b64_json', got 'url'"),
        ({"output_format": "gif"}, "output_format", "'png', 'jpeg' or 'webp'"),
        ({"n": 0}, "n", "greater than or equal to 1"),
        ({"n": 11}, "n", "at most 10 images are drawn at a time, got 11"),
        ({"n": True}, "n", "valid integer"),
        ({"n": "1"}, "n", "valid integer"),
        ({"seed": -1}, "seed", "greater than or equal to 0"),
        ({"seed": 2**63}, "seed", "less than"),
        ({"seed": 1.5}, "seed", "valid integer"),
        ({"size": "512x512"}, None, "size '512x512' is not loaded; there is 128x128"),
        ({"guidance_scale": 1.0}, None, "takes a scale above 1, got 1.0"),
        ({"guidance_scale": 1e300}, None, "at most 1000000"),
        ({"generator": "torch"}, "generator", "'numpy' or 'torch-cuda'"),
        ({"priority": 10}, "priority", "less than or equal to 9"),
        ({"within_s": 0}, "within_s", "greater than 0"),
        ({"prompt": None}, "prompt", "valid string"),
        ({"prompt": ["a", "b"]}, "prompt", "valid string"),
        ({"prompt": "x" * 40_000}, "prompt", "prompt has 40000 characters"),
        ({"stream": True, "partial_images": 4}, "partial_images", "less than or equal to 3"),
        ({"user": "x" * 300}, "user", "at most 256"),
    ],
)
def test_refusals(server: Server, asked: dict[str, Any], param: str | None, says: str) -> None:
    status, error = server.refused(**asked)
    assert status == 400
    assert says in error["message"]
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]


def test_openais_client_tells_a_refusal(server: Server) -> None:
    with pytest.raises(openai.BadRequestError, match="parameter 'quality' is not known or has no effect"):
        server.openai().images.generate(model="mini", prompt="a", quality="hd")
    with pytest.raises(openai.NotFoundError, match="that model is not served; there is mini"):
        server.openai().images.generate(model="gpt-image-2", prompt="a")


@pytest.mark.parametrize(
    ("body", "kind", "says"),
    [
        (b"{", "application/json", "the body must be JSON"),
        (b"[]", "application/json", "the body must be JSON"),
        (b"", "application/json", "the body must be JSON"),
        (b'{"prompt": "a"}', "text/plain", "the body must be JSON, with Content-Type: application/json"),
        (b"\xff\xfe", "application/json", "the body must be JSON"),
        (b'{"prompt": "a", "guidance_scale": NaN}', "application/json", "guidance_scale"),
        (rb'{"prompt": "\ud800"}', "application/json", "valid Unicode"),
        (b'{"a":' * 10_000, "application/json", "the body must be JSON"),
    ],
)
def test_a_body_that_is_no_request(server: Server, body: bytes, kind: str, says: str) -> None:
    answer = server.http.post(PATH, content=body, headers={"content-type": kind})
    assert answer.status_code == 400
    assert says in answer.json()["error"]["message"]


# --- coming and going ---------------------------------------------------------------------------


def idle(server: Server) -> bool:
    return server.worker.load() == (0, 0) and not server.service._handles


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_place(
    server: Server, session: Session, held: threading.Event, stream: bool
) -> None:
    before = server.worker.counts.cancelled
    body = b'{"prompt": "a", "n": 4, "stream": ' + (b"true}" if stream else b"false}")
    host, port = server.url.removeprefix("http://").split(":")
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(server.draw, seed=11)
        assert until(lambda: sum(server.worker.load()) == 1)
        with socket.create_connection((host, int(port))) as client:
            head = (
                f"POST {PATH} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
            )
            client.sendall(head.encode() + b"\r\n\r\n" + body)
            assert until(lambda: sum(server.worker.load()) == 5)
        assert until(lambda: server.worker.counts.cancelled == before + 4)
        held.set()
        answer = other.result().json()
    np.testing.assert_array_equal(pixels(answer["data"][0]["b64_json"]), alone(session, seed=11)[0])
    assert until(lambda: idle(server))


def test_a_request_is_cancelled_by_its_id(server: Server, held: threading.Event) -> None:
    events = server.events(stream_steps=True, n=2)
    identity = next(events)["id"]
    answer = server.http.delete(f"{PATH}/{identity}")
    assert answer.json() == {"id": identity, "cancelled": True}
    last = list(events)[-1]
    assert last["type"] == "error"
    assert last["error"] | {"param": None} == {
        "message": "the request was cancelled",
        "type": "invalid_request_error",
        "param": None,
        "code": "cancelled",
    }
    held.set()
    assert until(lambda: idle(server))
    again = server.http.delete(f"{PATH}/{identity}")
    assert (again.status_code, again.json()["error"]["code"]) == (404, "not_found")


def test_what_is_through_is_not_cancelled(server: Server, session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is decoded it can be called off no more, and its picture comes."""
    decoding, go = threading.Event(), threading.Event()
    real = Worker.pictures

    def pictures(self: Worker, drawn: Drawn, role: Role) -> Any:
        decoding.set()
        assert go.wait(60)
        return real(self, drawn, role)

    monkeypatch.setattr(Worker, "pictures", pictures)
    events = server.events(stream_steps=True)
    identity = next(event["id"] for event in events)
    with ThreadPoolExecutor(1) as pool:
        rest = pool.submit(list, events)
        assert decoding.wait(60)
        answer = server.http.delete(f"{PATH}/{identity}")
        go.set()
        assert rest.result()[-1]["type"] == "image_generation.completed"
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_slow_decoders_keep_nobody_from_being_drawn(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many requests wait to be decoded."""
    go = threading.Event()
    real = Worker.pictures

    def pictures(self: Worker, drawn: Drawn, role: Role) -> Any:
        assert go.wait(60)
        return real(self, drawn, role)

    monkeypatch.setattr(Worker, "pictures", pictures)
    with running(session, rows=2) as server, ThreadPoolExecutor(5) as pool:
        asked = [pool.submit(server.draw) for _ in range(4)]
        assert until(lambda: server.worker.counts.images == 4)
        asked.append(pool.submit(server.draw))
        try:
            end_s = time.monotonic() + 20
            while server.worker.counts.images < 5 and time.monotonic() < end_s:
                time.sleep(0.01)
            assert server.worker.counts.images == 5
        finally:
            go.set()
        assert [each.result().status_code for each in asked] == [200] * 5


def test_the_time_that_encoding_takes_counts(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """For ``within_s``, and for what an answer says of waiting."""
    real = Encoder.of_texts

    def slow(self: Encoder, *asked: Any) -> Any:
        time.sleep(0.5)
        return real(self, *asked)

    monkeypatch.setattr(Encoder, "of_texts", slow)
    before = server.worker.counts.images
    status, error = server.refused(within_s=0.4)
    assert (status, error["code"]) == (410, "too_late")
    assert server.worker.counts.images == before
    assert server.draw().json()["tgate"]["queue_s"] >= 0.5


def test_who_comes_too_late_is_told(server: Server, held: threading.Event) -> None:
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(server.refused, within_s=0.05)
        assert until(lambda: sum(server.worker.load()) == 1)
        threading.Event().wait(0.1)
        held.set()
        status, error = asked.result()
    assert (status, error["code"]) == (410, "too_late")
    assert error["message"] == "the request was not through within 0.05 s"


def test_a_full_queue_says_when_to_come_again(session: Session, held: threading.Event) -> None:
    with running(session, rows=2, queue=1) as server, ThreadPoolExecutor(3) as pool:
        asked = [pool.submit(server.draw) for _ in range(3)]
        assert until(lambda: server.worker.load() in ((2, 1), (1, 2), (0, 3)))
        answer = server.draw()
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "queue_full"
        assert int(answer.headers["retry-after"]) >= 1
        with pytest.raises(openai.RateLimitError):
            server.openai().images.generate(model="mini", prompt="a")
        status, error = server.refused(n=4)
        assert (status, error["message"]) == (400, "a request may have 3 images here, got 4; ask for fewer at a time")
        held.set()
        assert [each.result().status_code for each in asked] == [200] * 3
        assert 'tgate_requests_rejected_total{model="mini"} 2.0' in server.http.get("/metrics").text


def test_a_server_that_stops_says_so(session: Session) -> None:
    with running(session, rows=2) as server:
        server.worker.drain()
        status, error = server.refused()
        assert (status, error["code"], error["type"]) == (503, "stopped", "api_error")


def test_an_engine_that_fails_is_one_requests_end_and_no_path_is_told(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = State.take

    def take(self: State, rows: range) -> Any:
        raise EngineError("/home/somebody/bundle/full.onnx: no memory")

    monkeypatch.setattr(State, "take", take)
    with caplog.at_level(logging.ERROR, "tgate"):
        status, error = server.refused()
    assert (status, error["message"]) == (500, "the server failed at this request; its log says why")
    assert "/home/somebody/bundle/full.onnx: no memory" in caplog.text
    monkeypatch.setattr(State, "take", real)
    assert server.draw().status_code == 200


def test_who_asks_is_noted(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "tgate"):
        server.draw(user="somebody\n")
    assert re.search(r"img_[0-9a-f]{24}: 1 of plan default by mini for user 'somebody\\n'", caplog.text)


# --- a small decoder ----------------------------------------------------------------------------


def test_a_small_decoder_makes_the_looks_and_the_models_own_the_picture(tmp_path: Path) -> None:
    """The toy's small decoder has half the contrast of its own."""
    looks = {}
    for small in (False, True):
        with Session.open(build(tmp_path / f"toy{small}", Toy(small=small), goldens=False), threads=1) as toy:
            (final,) = alone(toy, "a red circle", seed=3)
            with running(toy, rows=2) as server:
                *partial, last = server.events(prompt="a red circle", seed=3, partial_images=2)
                quick = server.draw(prompt="a red circle", seed=3, decoder="preview")
                (facts,) = server.http.get("/v1/models").json()["data"]
        np.testing.assert_array_equal(pixels(last["b64_json"]), final)
        assert facts["tgate"]["decoders"] == ["full", "preview"][: 1 + small]
        if not small:
            assert quick.status_code == 400
            assert "the bundle has no small decoder (--preview-decoder)" in quick.json()["error"]["message"]
        looks[small] = [pixels(event["b64_json"]).astype(float) - 127.5 for event in partial]
    for own, by_small in zip(looks[False], looks[True], strict=True):
        inside = np.abs(own) < 127  # neither black nor white
        assert np.count_nonzero(inside) > 10
        assert np.abs(by_small - own / 2)[inside].max() <= 1
    by_small, own = (
        pixels(text).astype(float) - 127.5 for text in (quick.json()["data"][0]["b64_json"], last["b64_json"])
    )
    assert np.abs(by_small - own / 2)[np.abs(own) < 127].max() <= 1
    record = read_stamp(base64.b64decode(quick.json()["data"][0]["b64_json"]), "the answer")
    assert record.decoder == "preview"
