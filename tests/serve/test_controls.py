"""Requests with control pictures, at a server: each is what it is alone, whoever else is there."""

from __future__ import annotations

import base64
import io
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.serve.running import Server, alone, pixels, running
from tests.toy_bundle import Toy, build
from tgate_runtime.control import Control
from tgate_runtime.session import Session
from tgate_runtime.stamps import read_stamp
from tgate_runtime.state import State
from tgate_serve.model import Model, Wish
from tgate_serve.worker import Worker

WAIT_S = 120.0
PROMPT = "a large red circle"


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8))


def url(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


EDGES, DEPTH = {"image_url": url(picture(0))}, {"image_url": url(picture(1)), "scale": -0.5, "start": 0.25, "end": 0.9}
ASKED: list[dict[str, Any] | None] = [None, {"edges": EDGES}, {"edges": {**EDGES, "until_gate": True}, "depth": DEPTH}]
WANTED: list[dict[str, Control] | None] = [
    None,
    {"edges": Control(image=picture(0))},
    {
        "edges": Control(image=picture(0), until_gate=True),
        "depth": Control(image=picture(1), scale=-0.5, start=0.25, end=0.9),
    },
]


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    path: Path = build(tmp_path_factory.mktemp("controls") / "toy", Toy(controls=("edges", "depth"), begins=True))
    with Session.open(path, threads=1) as session:
        yield session


@pytest.fixture(scope="module")
def server(steered: Session) -> Iterator[Server]:
    with running(steered, rows=6, added=0.1) as found:
        yield found


def test_everybody_gets_what_a_pipeline_draws_of_it(server: Server, steered: Session) -> None:
    """Bit for bit, however they come."""
    asked = [(seed, which) for seed in (1, 2, 3) for which in range(len(ASKED))]
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = list(
            pool.map(lambda one: server.draw(prompt=PROMPT, seed=one[0], controls=ASKED[one[1]]).json(), asked)
        )
    drawn = [pixels(answer["data"][0]["b64_json"]) for answer in answers]
    for (seed, which), found in zip(asked, drawn, strict=True):
        np.testing.assert_array_equal(found, alone(steered, PROMPT, seed=seed, controls=WANTED[which])[0])
    assert len({array.tobytes() for array in drawn}) == len(asked)
    record = read_stamp(base64.b64decode(answers[-1]["data"][0]["b64_json"]), "the answer")
    assert (record.controls["depth"].scale, record.controls["edges"].until_gate) == (-0.5, True)


def test_those_with_and_without_share_calls(steered: Session) -> None:
    held, real = threading.Event(), State.take
    with pytest.MonkeyPatch.context() as patch, Worker(steered, added=0.1, rows=6) as worker:
        patch.setattr(State, "take", lambda self, rows: held.wait(WAIT_S) and real(self, rows))
        model = Model("mini", steered, worker)
        drawings = [model.submit(Wish(prompt=PROMPT, seed=1, controls=controls)) for controls in WANTED]
        held.set()
        found = [np.asarray(worker.pictures(drawing.handle.result(WAIT_S))[0][0]) for drawing in drawings]
        calls = worker.counts.calls
    assert max(images for _, _, images in calls) >= 2
    for one, controls in zip(found, WANTED, strict=True):
        np.testing.assert_array_equal(one, alone(steered, PROMPT, seed=1, controls=controls)[0])


def test_edits_take_them_in_json(server: Server, steered: Session) -> None:
    answer = server.http.post(
        "/v1/images/edits",
        json={"prompt": PROMPT, "seed": 3, "image": {"image_url": url(picture(2))}, "controls": ASKED[1]},
    ).json()
    wanted = alone(steered, PROMPT, seed=3, image=picture(2), controls=WANTED[1])[0]
    np.testing.assert_array_equal(pixels(answer["data"][0]["b64_json"]), wanted)


def test_models_tell_them(server: Server) -> None:
    (model,) = server.http.get("/v1/models").json()["data"]
    assert model["tgate"]["controls"] == ["edges", "depth"]
    document = server.http.get("/openapi.json").json()["components"]["schemas"]
    assert "controls" in document["ImageAsked"]["properties"]
    assert "controls" in document["EditAsked"]["properties"]
    assert "controls" not in document["EditForm"]["properties"], "a form has no way to write them"
    assert "controls" not in document["VideoAsked"]["properties"]


@pytest.mark.parametrize(
    ("controls", "told", "param"),
    [
        ({"canny": EDGES}, "the bundle has no ControlNet 'canny'; it has edges, depth", None),
        ({"edges": {**EDGES, "scale": 0.0}}, "the scale of ControlNet 'edges' is 0.0", None),
        ({"edges": {**EDGES, "start": 0.5, "end": 0.5}}, "runs from 0.5 to 0.5 of the way", None),
        ({"edges": {**EDGES, "start": 0.51, "end": 0.55}}, "runs at none of the 8 network calls", None),
        ({"edges": {"image_url": "https://a.example/x.png"}}, "URLs are not fetched", "controls.edges.image_url"),
        ({"edges": {"image_url": "data:image/png;base64,AAAA"}}, "controls.edges", "controls.edges"),
        ({"edges": {**EDGES, "guess_mode": True}}, "guess_mode", "controls.edges.guess_mode"),
        ({"edges": {**EDGES, "end": 1.5}}, "less than or equal to 1", "controls.edges.end"),
        ({"edges": url(picture(0))}, "controls.edges", "controls.edges"),
    ],
)
def test_what_is_refused(server: Server, controls: dict[str, Any], told: str, param: str | None) -> None:
    before = server.worker.counts.images
    status, error = server.refused(controls=controls)
    assert status == 400
    assert told in error["message"]
    assert error["param"] == param or param is None
    assert server.worker.counts.images == before


def test_a_form_cannot_say_them(server: Server) -> None:
    file = io.BytesIO()
    picture(2).save(file, "PNG")
    parts: dict[str, Any] = {
        "prompt": (None, PROMPT),
        "image": ("in.png", file.getvalue()),
        "controls[edges]": (None, url(picture(0))),
    }
    answer = server.http.post("/v1/images/edits", files=parts)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "controls.edges"
