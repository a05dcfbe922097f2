"""What may be asked of videos, what is refused by name, and what the OpenAPI document says of both."""

from __future__ import annotations

import struct
import sys
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.serve.videos import FOX, GIF, PROMPT, Models, Running, data_url, frames_of, png, running
from tgate_serve.api import videos
from tgate_serve.api.schemas import VideoAsked


@pytest.mark.parametrize(
    ("asked", "param", "says"),
    [
        ({"model": "latte"}, "prompt", "starts from prompt"),
        ({"model": "latte", "prompt": PROMPT, "n": 2}, "n", "not known or has no effect"),
        ({"model": "latte", "prompt": PROMPT, "fps": 8}, "fps", "a model has its own"),
        ({"model": "latte", "prompt": PROMPT, "seconds": "4"}, "seconds", "are of '0.625', got '4'"),
        ({"model": "latte", "prompt": PROMPT, "seconds": 4}, "seconds", "valid string"),
        ({"model": "latte", "prompt": PROMPT, "output_format": "avi"}, "output_format", "'mp4' or 'gif'"),
        ({"model": "latte", "prompt": PROMPT, "seed": "7"}, "seed", "valid integer"),
        ({"model": "latte", "prompt": PROMPT, "size": "31x64"}, None, "31x64"),
        ({"model": "latte", "prompt": PROMPT, "plan": "x"}, None, "guidance_stopped"),
        ({"model": "latte", "prompt": PROMPT, "input_reference": data_url(b"x")}, "input_reference", "no effect"),
        ({"model": "sora-2", "prompt": PROMPT}, "model", "there is latte, svd"),
        ({"model": "svd"}, "input_reference", "give one"),
        ({"model": "svd", "prompt": PROMPT, "input_reference": data_url(b"x")}, "prompt", "no effect"),
        ({"model": "svd", "prompt": "", "input_reference": data_url(b"x")}, "prompt", "no effect"),
        ({"model": "svd", "negative_prompt": "x", "input_reference": data_url(b"x")}, "negative_prompt", "no prompts"),
        ({"model": "svd", "input_reference": data_url(b"no picture")}, "input_reference", "not a picture"),
        ({"model": "svd", "input_reference": {"image_url": "data:image/png;base64,?"}}, "input_reference", "base64"),
        ({"model": "svd", "input_reference": {"image_url": "data:text/html,x"}}, "input_reference", "not fetched"),
        ({"model": "svd", "input_reference": {"file_id": "file-1"}}, "input_reference.file_id", "no files are kept"),
        ({"model": "svd", "input_reference": "https://x"}, "input_reference", "object"),
    ],
)
def test_refused_by_name(there: Running, asked: dict[str, Any], param: str | None, says: str) -> None:
    form = {} if "output_format" in asked else GIF
    error = there.ask(404 if asked["model"] == "sora-2" else 400, **asked, **form)
    assert error["param"] == param
    assert says in error["message"]


def test_urls_are_not_fetched(there: Running) -> None:
    """Not even one of this server: it hears nothing but the request."""
    before = there.client.get("/metrics").text
    for url in (f"{there.url}/health", "https://example.com/a.png", "file:///etc/passwd"):
        error = there.ask(400, model="svd", input_reference={"image_url": url})
        assert (error["param"], "not fetched" in error["message"]) == ("input_reference", True)
    counted = [line for line in there.client.get("/metrics").text.splitlines() if 'route="/health"' in line]
    assert counted == [line for line in before.splitlines() if 'route="/health"' in line]


def test_a_picture_bomb(there: Running) -> None:
    """Ten thousand million pixels in a few bytes: seen by its header."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(2**20)))
    error = there.ask(400, model="svd", input_reference=data_url(bomb + chunk(b"IEND", b"")))
    assert error["param"] == "input_reference"
    assert "input_reference" in error["message"]


def test_mp4_without_its_library(there: Running, models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is told before anything is drawn."""
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    error = there.ask(400, model="latte", prompt=PROMPT)
    assert error["param"] == "output_format"
    assert "pip install 'tgate-engine[video]'" in error["message"]
    there.content(there.ask(**FOX)["id"])


def post(there: Running, parts: dict[str, Any], **headers: str) -> dict[str, Any]:
    """The error of a form."""
    response = there.client.post("/v1/videos", files=parts, headers=headers)
    assert response.status_code in (400, 403), response.text
    error = response.json()["error"]
    assert isinstance(error, dict)
    return error


def text(value: str) -> tuple[None, str]:
    return None, value


def test_forms(there: Running) -> None:
    """What is JSON's to refuse is a form's too, and more."""
    fox = {"model": text("latte"), "prompt": text(PROMPT), "output_format": text("gif")}
    file = ("start.png", png(), "image/png")
    assert post(there, {**fox, "n": text("1")})["param"] == "n"
    assert post(there, {**fox, "seed": text("1.5")})["param"] == "seed"
    assert post(there, {**fox, "prompt": ("p.txt", b"x", "text/plain")})["param"] == "prompt"
    twice = post(there, [*fox.items(), ("prompt", text("another"))])  # type: ignore[arg-type]
    assert (twice["param"], "more than once" in twice["message"]) == ("prompt", True)
    both = {"input_reference": file, "input_reference[image_url]": text(data_url()["image_url"])}
    assert "more than once" in post(there, {"model": text("svd"), **both})["message"]
    two = [("model", text("svd")), ("input_reference", file), ("input_reference", file)]
    assert "Too many files" in post(there, two)["message"]  # type: ignore[arg-type]
    assert post(there, {"model": text("svd"), "input_reference": text("https://x")})["param"] == "input_reference"
    assert post(there, fox, **{"Sec-Fetch-Site": "cross-site"})["message"].startswith("forms of other sites' pages")
    nested = {"model": text("svd"), "input_reference[image_url]": text(data_url()["image_url"]), **GIF_FORM}
    response = there.client.post("/v1/videos", files=nested, headers={"Sec-Fetch-Site": "same-origin"})
    assert len(frames_of(there.content(response.json()["id"]))) == 5


GIF_FORM = {"output_format": text("gif")}


@pytest.mark.parametrize(
    ("kind", "body"), [("text/plain", b"{}"), ("application/json", b"{"), ("application/json", b"[]")]
)
def test_bodies_that_are_none(there: Running, kind: str, body: bytes) -> None:
    response = there.client.post("/v1/videos", content=body, headers={"Content-Type": kind})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")


def test_variants(there: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    identity = there.ask(**FOX)["id"]
    content = there.content(identity)
    monkeypatch.setattr(videos, "_PART_BYTES", 100)
    assert len(content) > 200
    assert there.content(identity) == content
    error = there.get(f"/{identity}/content", 400, variant="spritesheet")
    assert error["param"] == "variant"
    assert "'video' or 'thumbnail'" in error["message"]
    assert there.get(f"/{identity}/content", 400, quality=3)["param"] == "quality"


def test_ids_that_are_none(there: Running) -> None:
    calls: list[Callable[[], Any]] = [
        lambda: there.client.get("/v1/videos/video_0"),
        lambda: there.client.get("/v1/videos/video_0/content"),
        lambda: there.client.post("/v1/videos/video_0/cancel"),
        lambda: there.client.delete("/v1/videos/video_0"),
    ]
    assert [call().status_code for call in calls] == [404] * 4


# --- what the document says ---------------------------------------------------------------------


def test_openapi(there: Running, models: Models) -> None:
    document = there.client.get("/openapi.json").json()
    schemas = document["components"]["schemas"]
    body = document["paths"]["/v1/videos"]["post"]["requestBody"]["content"]
    refs = {kind: said["schema"]["$ref"].rpartition("/")[2] for kind, said in body.items()}
    assert refs == {"application/json": "VideoAsked", "multipart/form-data": "VideoForm"}
    asked, form = schemas["VideoAsked"], schemas["VideoForm"]
    assert set(asked["properties"]) == set(VideoAsked.model_fields)
    assert set(form["properties"]) == {*VideoAsked.model_fields, "input_reference[image_url]"}
    assert asked["anyOf"] == [{"required": ["input_reference"]}, {"required": ["prompt"]}]
    assert asked["additionalProperties"] is form["additionalProperties"] is False
    of = {name: next(s for s in said["anyOf"] if s != {"type": "null"}) for name, said in asked["properties"].items()}
    assert of["model"]["enum"] == ["latte", "svd"]
    assert of["size"]["enum"] == ["auto", "32x64", "16x32"]
    assert of["seconds"]["enum"] == ["0.625", "0.714286"]
    assert form["properties"]["seconds"]["enum"] == of["seconds"]["enum"]
    assert form["properties"]["seed"]["type"] == "integer"

    for name, gone in (("latte", {"input_reference"}), ("svd", {"prompt", "negative_prompt"})):
        with running({name: models.models[name]}) as alone:
            schemas_alone = alone.client.get("/openapi.json").json()["components"]["schemas"]
            there_alone = set(schemas_alone["VideoAsked"]["properties"])
            assert there_alone == set(VideoAsked.model_fields) - gone
            assert not gone & set(schemas_alone["VideoForm"]["properties"])

    def references(said: Any) -> Iterator[str]:
        if isinstance(said, dict):
            yield from (value for key, value in said.items() if key == "$ref")
            for value in said.values():
                yield from references(value)
        elif isinstance(said, list):
            for value in said:
                yield from references(value)

    assert {ref.rpartition("/")[2] for ref in references(document)} <= set(schemas)
