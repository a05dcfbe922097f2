"""Videos as jobs: what comes of them, how far they are, and how many are kept for how long."""

from __future__ import annotations

import io
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

from tests.serve.videos import FOX, GIF, PROMPT, Models, Running, data_url, frames_of, png, running, start, until
from tests.toy_bundle import Toy, build
from tgate_engine.errors import RequestError
from tgate_runtime.files import video_bytes
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.session import Session
from tgate_runtime.stamps import read_stamp
from tgate_serve.api import videos
from tgate_serve.api.limits import Limits
from tgate_serve.model import Model
from tgate_serve.worker import Worker

# The client says so at each call: what it calls its own service's end is not this server's.
pytestmark = pytest.mark.filterwarnings("ignore:The Sora API is scheduled:DeprecationWarning")


@pytest.fixture
def client(there: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{there.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


def wanted(models: Models, name: str, **asked: Any) -> bytes:
    """The GIF of what the pipeline draws, with its record."""
    session = models.models[name].session
    result = Pipeline(session)(**asked)
    return video_bytes(result.videos[0], ".gif", fps=session.manifest.fps, record=result.records[0])


# --- what comes of them -------------------------------------------------------------------------


def test_a_video_of_a_prompt(there: Running, models: Models) -> None:
    """To the last byte what the pipeline draws; and the answer says what was done for it."""
    asked = there.ask(**FOX, seed=7, seconds="0.625", size="32x64", guidance_scale=4, negative_prompt="dogs")
    assert (asked["object"], asked["model"], asked["size"], asked["seconds"], asked["seed"], asked["prompt"]) == (
        ("video", "latte", "32x64", "0.625", 7, PROMPT)
    )
    content = there.content(asked["id"])
    assert content == wanted(models, "latte", prompt=PROMPT, negative_prompt="dogs", seed=7, guidance_scale=4)
    assert len(frames_of(content)) == models.models["latte"].session.manifest.frames
    done = there.get(f"/{asked['id']}")
    assert (done["status"], done["progress"], done["error"], done["queue_position"]) == ("completed", 100, None, None)
    told = done["tgate"]
    counts = {"full": 3, "reuse_delta": 3}
    assert (told["plan"], told["steps"], told["guidance_scale"]) == ("default", counts, 4)
    assert done["completed_at"] + 3600 == done["expires_at"]
    assert read_stamp(content, "it").seed == 7


def test_a_seed_is_told(there: Running) -> None:
    """What a random one draws can be drawn again."""
    first = there.ask(**FOX)
    again = there.ask(**FOX, seed=first["seed"])
    assert there.content(first["id"]) == there.content(again["id"])


def test_a_plan_by_what_it_was_made_from(there: Running) -> None:
    identity = there.ask(**FOX, seed=7, plan="ungated")["id"]
    there.content(identity)
    told = there.get(f"/{identity}")["tgate"]
    assert (told["plan"], told["steps"]) == ("ungated", {"full": 6})


def test_a_video_of_a_picture(there: Running, models: Models, client: openai.OpenAI) -> None:
    """As a form's file and in JSON: the same video."""
    from_form = client.videos.create(
        prompt=openai.omit,  # type: ignore[arg-type]  # their model has to have one
        model="svd",
        input_reference=("start.png", png(), "image/png"),
        extra_body={**GIF, "seed": 5, "guidance_scale": 2.5},
    )
    in_json = there.ask(model="svd", input_reference=data_url(), seed=5, guidance_scale=2.5, **GIF)
    content = client.videos.download_content(client.videos.poll(from_form.id, poll_interval_ms=20).id).read()
    assert content == wanted(models, "svd", image=start(), seed=5, guidance_scale=2.5)
    assert there.content(in_json["id"]) == content
    assert in_json["prompt"] is None


def test_openai_client(client: openai.OpenAI, models: Models) -> None:
    """A prompt comes as a form as well."""
    video = client.videos.create_and_poll(prompt=PROMPT, model="latte", extra_body={**GIF, "seed": 3})
    assert (video.status, video.progress, video.size, video.error) == ("completed", 100, "32x64", None)
    assert video.completed_at is not None
    response = client.videos.download_content(video.id)
    assert response.response.headers["content-type"] == "image/gif"
    assert response.read() == wanted(models, "latte", prompt=PROMPT, seed=3)
    thumbnail = client.videos.download_content(video.id, variant="thumbnail")
    assert thumbnail.response.headers["content-type"] == "image/webp"
    with Image.open(io.BytesIO(thumbnail.read())) as image:
        first = Pipeline(models.models["latte"].session)(PROMPT, seed=3).videos[0][0]
        assert (image.format, image.size) == ("WEBP", first.size)
        assert np.abs(np.asarray(image.convert("RGB"), np.int16) - np.asarray(first, np.int16)).mean() < 24
    deleted = client.videos.delete(video.id)
    assert (deleted.id, deleted.deleted, deleted.object) == (video.id, True, "video.deleted")
    with pytest.raises(openai.NotFoundError, match="no video of that id"):
        client.videos.retrieve(video.id)


def test_mp4(there: Running, models: Models, tmp_path: Path) -> None:
    """What is made where nothing is said; its frames are near to those that are drawn."""
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    identity = there.ask(model="latte", prompt=PROMPT, seed=7)["id"]
    there.content(identity)
    response = there.client.get(f"/v1/videos/{identity}/content")
    assert response.headers["content-type"] == "video/mp4"
    assert f'filename="{identity}.mp4"' in response.headers["content-disposition"]
    assert read_stamp(response.content, "it").seed == 7
    (tmp_path / "it.mp4").write_bytes(response.content)
    facts, *decoded = ffmpeg.read_frames(str(tmp_path / "it.mp4"))
    assert (facts["fps"], facts["source_size"]) == (8, (32, 64))
    drawn = Pipeline(models.models["latte"].session)(PROMPT, seed=7).videos[0]
    assert len(decoded) == len(drawn)

    def light(pixels: Any) -> Any:
        return np.asarray(pixels, np.float32).reshape(64, 32, 3).mean(-1).ravel()

    for content, frame in zip(decoded, drawn, strict=True):
        assert np.corrcoef(light(np.frombuffer(content, np.uint8)), light(frame))[0, 1] > 0.9


# --- how far they are ---------------------------------------------------------------------------


def test_queue_progress_and_cancel(there: Running, models: Models) -> None:
    """Who waits sees how many are before it; whoever is called off frees its place for the next."""
    with models.gate.shut():
        first, second, third = (there.ask(**FOX, seed=i)["id"] for i in range(3))
        until(models.models["latte"].worker.load, lambda load: load == (1, 2))
        assert [there.get(f"/{i}")["queue_position"] for i in (first, second, third)] == [0, 0, 1]
        assert [there.get(f"/{i}")["status"] for i in (first, second, third)] == ["queued"] * 3
        models.gate.let_pass(2)
        seen = until(lambda: there.get(f"/{first}"), lambda video: video["progress"] == 33)
        assert (seen["status"], seen["queue_position"]) == ("in_progress", None)
        for name, status in ((first, "in_progress"), (second, "queued")):
            error = there.get(f"/{name}/content", 409)
            assert (error["code"], status in error["message"]) == ("not_ready", True)
        for identity in (first, second):
            assert there.client.post(f"/v1/videos/{identity}/cancel").json()["status"] == "cancelled"
        assert there.get(f"/{first}")["progress"] == 33
        models.gate.let_pass(1)
        until(models.models["latte"].worker.load, lambda load: load == (1, 0))
        assert there.get(f"/{third}")["queue_position"] == 0
    there.content(third)
    for identity in (first, second):
        video = there.get(f"/{identity}")
        assert (video["status"], video["error"]["code"], video["tgate"]) == ("cancelled", "cancelled", None)
        assert "cancelled" in there.get(f"/{identity}/content", 404)["message"]
    assert there.client.post(f"/v1/videos/{first}/cancel").status_code == 200  # as it is already
    error = there.client.post(f"/v1/videos/{third}/cancel").json()["error"]
    assert (error["code"], "completed" in error["message"]) == ("not_under_way", True)


def test_whoever_deletes_calls_off(there: Running, models: Models) -> None:
    load = models.models["latte"].worker.load
    with models.gate.shut():
        identity = there.ask(**FOX)["id"]
        until(load, lambda seen: seen == (1, 0))
        assert there.client.delete(f"/v1/videos/{identity}").json() == {
            "id": identity,
            "object": "video.deleted",
            "deleted": True,
        }
        assert load() == (0, 0)
    assert there.client.delete(f"/v1/videos/{identity}").status_code == 404


def test_openai_client_hears_of_a_cancelled_one(there: Running, models: Models, client: openai.OpenAI) -> None:
    """It knows no such status and would ask for ever."""
    with models.gate.shut():
        identity = there.ask(**FOX)["id"]
        there.client.post(f"/v1/videos/{identity}/cancel")
    video = client.videos.poll(identity)
    assert video.status == "failed"
    assert video.error is not None
    assert video.error.code == "cancelled"


def test_late(there: Running, models: Models) -> None:
    """Nobody wants it any more: it has failed."""
    with models.gate.shut():
        there.ask(**FOX)
        identity = there.ask(**FOX, within_s=0.001)["id"]
    video = there.until(identity, "failed")
    assert (video["error"]["code"], video["progress"]) == ("too_late", 0)
    assert "0.001 s" in there.get(f"/{identity}/content", 404)["message"]


def test_what_cannot_be_encoded_has_failed(there: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> bytes:
        raise RequestError("no room; write a .gif instead")

    monkeypatch.setattr(videos, "video_bytes", fails)
    video = there.until(there.ask(**FOX)["id"], "failed", "completed")
    assert video["error"] == {"code": "invalid_request", "message": "no room; write a .gif instead"}


def test_cancelled_while_it_is_encoded(there: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    """All steps are taken, and nothing is kept of what comes of them."""
    encode, wait = video_bytes, threading.Event()
    began = threading.Event()

    def slow(*frames: Any, **more: Any) -> bytes:
        began.set()
        wait.wait(30)
        return encode(*frames, **more)

    monkeypatch.setattr(videos, "video_bytes", slow)
    identity = there.ask(**FOX)["id"]
    assert began.wait(30)
    assert (there.get(f"/{identity}")["status"], there.get(f"/{identity}")["progress"]) == ("in_progress", 99)
    there.client.post(f"/v1/videos/{identity}/cancel")
    wait.set()
    monkeypatch.undo()
    there.content(there.ask(**FOX)["id"])
    assert there.get(f"/{identity}")["status"] == "cancelled"


# --- how many are kept, and for how long --------------------------------------------------------


def test_a_full_store(models: Models) -> None:
    """Nothing that is under way goes for another; of those that have ended, the first that did."""
    with running(models.models, Limits(jobs=2)) as there:
        with models.gate.shut():
            first, second = (there.ask(**FOX, seed=i)["id"] for i in range(2))
            response = there.client.post("/v1/videos", json=FOX)
            error = response.json()["error"]
            assert (response.status_code, error["code"], error["type"]) == (429, "jobs_full", "rate_limit_error")
            assert int(response.headers["retry-after"]) >= 1
            there.client.post(f"/v1/videos/{second}/cancel")
            third = there.ask(**FOX)["id"]
            assert [video["id"] for video in there.get("")["data"]] == [third, first]
            models.gate.let_pass(6)
            there.content(first)
        there.content(third)
        fourth = there.ask(**FOX)["id"]
        assert [video["id"] for video in there.get("")["data"]] == [fourth, third]
        there.get(f"/{first}", 404)


def test_a_full_queue_leaves_no_job(models: Models) -> None:
    """It had one row and three places."""
    with running(models.models) as there, models.gate.shut():
        there.ask(**FOX)
        until(models.models["latte"].worker.load, lambda load: load == (1, 0))
        for _ in range(3):
            there.ask(**FOX)
        assert there.ask(429, **FOX)["code"] == "queue_full"
        assert len(there.get("")["data"]) == 4
        for video in there.get("")["data"]:
            there.client.delete(f"/v1/videos/{video['id']}")


def test_expiry(models: Models) -> None:
    now = [1000.0]
    with running(models.models, Limits(job_s=60), lambda: now[0]) as there:
        with models.gate.shut():
            identity = there.ask(**FOX)["id"]
            now[0] += 1000  # which a job under way does not mind
            assert there.get(f"/{identity}")["created_at"] == 1000
        video = there.until(identity, "completed")
        assert (video["completed_at"], video["expires_at"]) == (2000, 2060)
        now[0] += 59.9
        there.content(identity)
        now[0] += 0.1
        assert "60 s" in there.get(f"/{identity}", 404)["message"]
        there.get(f"/{identity}/content", 404)
        assert there.get("")["data"] == []


def test_list(models: Models) -> None:
    with running(models.models) as there, models.gate.shut():
        made = []
        for name in ("latte", "svd", "latte"):
            given = {"input_reference": data_url()} if name == "svd" else {"prompt": PROMPT}
            made.append(there.ask(model=name, **given, **GIF)["id"])
        newest = there.get("", limit=2)
        assert [video["id"] for video in newest["data"]] == made[:0:-1]
        assert (newest["object"], newest["first_id"], newest["last_id"]) == ("list", made[2], made[1])
        assert newest["has_more"] is True
        rest = there.get("", limit=2, after=newest["last_id"])
        assert ([video["id"] for video in rest["data"]], rest["has_more"]) == ([made[0]], False)
        with openai.OpenAI(base_url=f"{there.url}/v1", api_key="none", max_retries=0) as client:
            assert [video.id for video in client.videos.list(limit=1, order="asc")] == made
        assert there.get("", 404, after="video_none")["code"] == "not_found"
        for query in ({"limit": 0}, {"limit": 101}, {"order": "up"}, {"page": 2}):
            assert there.get("", 400, **query)["param"] == next(iter(query))
        text = there.client.get("/metrics").text
        assert 'tgate_jobs{status="completed"} 0.0' in text
        until(
            lambda: there.client.get("/metrics").text,
            lambda text: 'tgate_jobs{status="queued"} 3.0' in text,
        )


def test_a_model_of_a_prompt_and_a_picture_at_once_is_not_served(tmp_path: Path) -> None:
    with Session.open(build(tmp_path / "both", Toy(sees=True), goldens=False), threads=1) as session:
        worker = Worker(session, rows=1)
        try:
            with pytest.raises(
                RequestError, match="both is conditioned by a prompt and an image at once, which a server"
            ):
                Model("both", session, worker)
        finally:
            worker.close()


def test_a_server_that_is_to_stop(video_bundles: Path) -> None:
    """It takes nothing more, and goes once what was under way is through and fetched."""
    models = Models(video_bundles)
    try:
        with running(models.models) as there:
            with models.gate.shut():
                identity = there.ask(**FOX)["id"]
                there.server.should_exit = True
                until(lambda: there.service.ready, lambda ready: not ready)
                assert there.ask(503, **FOX)["code"] == "stopped"
                assert there.get(f"/{identity}")["status"] == "queued"
            there.until(identity, "completed")
            assert there.thread.is_alive()
            assert len(there.content(identity)) > 0
            there.thread.join(10)
            assert not there.thread.is_alive()
    finally:
        models.close()
