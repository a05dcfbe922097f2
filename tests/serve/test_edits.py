"""``/v1/images/edits``: what it draws is what a pipeline draws from the same picture; what cannot be is refused."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.serve.running import Server, pixels, running
from tests.toy_bundle import Toy, build
from tgate_runtime.decoder import decode
from tgate_runtime.pipeline import Pipeline, Progress
from tgate_runtime.preview import end_of
from tgate_runtime.session import Session
from tgate_runtime.stamps import read_stamp

EDITS = "/v1/images/edits"
PROMPT = "a large red circle"


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8))
MASK = Image.fromarray(np.asarray([[0, 0, 255, 255]] * 4, np.uint8))
CLEAR = Image.fromarray(np.dstack([np.asarray(PICTURE), 255 - np.asarray(MASK)]), "RGBA")
"""The same as OpenAI has it: the picture, transparent where it is to be drawn anew."""


@pytest.fixture(scope="module")
def begins(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    path = build(tmp_path_factory.mktemp("edits") / "toy", Toy(begins=True))
    with Session.open(path, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def server(begins: Session) -> Iterator[Server]:
    with running(begins, rows=4, added=0.1) as found:
        yield found


def asked(server: Server, **fields: Any) -> Any:
    """A form's answer; bytes are files."""
    parts = {
        name: (f"{name}.png", value) if isinstance(value, bytes) else (None, str(value))
        for name, value in fields.items()
    }
    return server.http.post(EDITS, files=parts)


@pytest.mark.parametrize("mask", [None, MASK, CLEAR], ids=["whole", "white", "transparent"])
def test_openais_client_draws_what_a_pipeline_draws(server: Server, begins: Session, mask: Image.Image | None) -> None:
    own: dict[str, Any] = {} if mask is None else {"mask": ("mask.png", png(mask))}
    answer = server.openai().images.edit(
        model="mini",
        image=("in.png", png(PICTURE)),
        prompt=PROMPT,
        n=2,
        extra_body={"seed": 7, "strength": 0.5},
        **own,
    )
    with_mask: dict[str, Any] = {} if mask is None else {"mask": MASK}
    drawn = Pipeline(begins)(PROMPT, image=PICTURE, strength=0.5, seed=7, num_images=2, **with_mask)
    assert answer.data is not None
    for image, alone in zip(answer.data, drawn.images, strict=True):
        np.testing.assert_array_equal(pixels(str(image.b64_json)), np.asarray(alone))
    assert sum(answer.model_extra["tgate"]["steps"].values()) == 4
    record = read_stamp(base64.b64decode(str(answer.data[1].b64_json)), "the answer")
    assert (record.seed, record.strength) == (8, 0.5)
    assert record.given == drawn.records[1].given


@pytest.mark.parametrize("mask", [None, MASK], ids=["whole", "white"])
def test_openais_client_sees_an_edit_form(server: Server, begins: Session, mask: Image.Image | None) -> None:
    """As it sees a picture of a prompt form; each look is at what the steps that are left would end in."""
    own: dict[str, Any] = {} if mask is None else {"mask": ("mask.png", png(mask))}
    stream = server.openai().images.edit(
        model="mini",
        image=("in.png", png(PICTURE)),
        prompt=PROMPT,
        stream=True,
        partial_images=3,
        extra_body={"seed": 7, "strength": 0.75, "stream_steps": True},
        **own,
    )
    events = list(stream)
    shown = [event for event in events if event.type == "image_edit.partial_image"]
    taken = [event for event in events if str(event.type) == "image_edit.step"]
    assert [event.partial_image_index for event in shown] == [0, 1, 2]
    assert (len(taken), str(events[0].type), events[-1].type) == (6, "image_edit.queued", "image_edit.completed")
    with_mask: dict[str, Any] = {} if mask is None else {"mask": MASK}
    pipe, looks = Pipeline(begins), dict[int, Any]()
    graph = begins.graph("decode")
    assert graph is not None

    def look(progress: Progress) -> None:
        state = progress.look._state
        assert state is not None
        towards = end_of(state, 0, progress.plan.steps[progress.step.index + 1 :])
        looks[progress.step.index] = np.asarray(decode(begins, graph, towards)[0])

    drawn = pipe(PROMPT, image=PICTURE, strength=0.75, seed=7, on_step=look, **with_mask)
    np.testing.assert_array_equal(pixels(events[-1].b64_json), np.asarray(drawn.images[0]))
    for event, index in zip(shown, (0, 2, 3), strict=True):  # of six steps
        np.testing.assert_array_equal(pixels(event.b64_json), looks[index])


def test_in_json_pictures_are_data_urls(server: Server, begins: Session) -> None:
    objects = {
        name: {"image_url": f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"}
        for name, image in (("image", PICTURE), ("mask", MASK))
    }
    answer = server.http.post(EDITS, json={"prompt": PROMPT, "seed": 3, **objects}).json()
    drawn = Pipeline(begins)(PROMPT, image=PICTURE, mask=MASK, seed=3)
    np.testing.assert_array_equal(pixels(answer["data"][0]["b64_json"]), np.asarray(drawn.images[0]))


def test_they_share_a_server_with_pictures_of_prompts(server: Server, begins: Session) -> None:
    """A request that begins from noise is not changed by one that begins from a picture, in the same buffers."""
    alone = np.asarray(Pipeline(begins)(PROMPT, seed=5).images[0])
    for _ in range(2):
        assert asked(server, image=png(PICTURE), prompt=PROMPT, mask=png(MASK), n=3).status_code == 200
        drawn = server.draw(prompt=PROMPT, seed=5).json()["data"][0]["b64_json"]
        np.testing.assert_array_equal(pixels(drawn), alone)


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"image": None}, "image", "an edit begins from image"),
        ({"image": b"x"}, "image", "is not a picture that can be read"),
        ({"mask": b"x"}, "mask", "is not a picture that can be read"),
        ({"mask": png(Image.new("L", (4, 4)))}, None, "the mask leaves everything as it is"),
        ({"strength": 0}, "strength", "greater than 0"),
        ({"strength": 1.5}, "strength", "less than or equal to 1"),
        ({"strength": 0.01}, None, "strength 0.01 leaves none of 8 steps; take 0.13 or more"),
        ({"prompt": None}, "prompt", "prompt"),
        ({"partial_images": 1}, "partial_images", "partial_images has no effect without stream: true"),
        ({"stream": "true", "partial_images": 3, "strength": 0.3}, None, "has 2 steps, and at most 1 partial images"),
        ({"picture": b"x"}, "picture", "is a file, and image, mask and ip_adapter_image alone may be one"),
        ({"output_compression": 3}, "output_compression", "no effect on png"),
    ],
)
def test_refused_by_name(server: Server, fields: dict[str, Any], param: str | None, says: str) -> None:
    sent = {"image": png(PICTURE), "prompt": PROMPT, **fields}
    answer = asked(server, **{name: value for name, value in sent.items() if value is not None})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert says in error["message"]


def test_a_model_without_an_encoder(session: Session) -> None:
    with running(session, rows=2) as server:
        answer = asked(server, image=png(PICTURE), prompt=PROMPT)
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
        assert "mini has no encoder, and so begins from no picture" in answer.json()["error"]["message"]
        (facts,) = server.http.get("/v1/models").json()["data"]
        assert facts["tgate"]["edits"] is False


def test_what_the_document_says(server: Server) -> None:
    schemas = server.http.get("/openapi.json").json()["components"]["schemas"]
    assert schemas["EditAsked"]["anyOf"] == [{"required": ["image"]}]
    form = schemas["EditForm"]
    assert {"image", "mask", "image[image_url]", "mask[image_url]", "strength"} <= {*form["properties"]}
    assert form["anyOf"] == [{"required": ["image"]}, {"required": ["image[image_url]"]}]
    assert server.http.get("/v1/models").json()["data"][0]["tgate"]["edits"] is True
