"""Requests with a picture beside the prompt: they get what a pipeline draws from both, or are refused."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.serve.running import Server, pixels, running
from tests.serve.test_edits import PICTURE, PROMPT, asked, png
from tests.toy_bundle import Toy, build
from tgate_runtime.control import Control
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.session import Session
from tgate_runtime.stamps import read_stamp

SEEN = Image.fromarray(np.random.default_rng(1).integers(0, 256, (9, 6, 3), np.uint8))
"""Of another size than the encoder takes."""


@pytest.fixture(scope="module")
def refers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    path = build(tmp_path_factory.mktemp("refers") / "toy", Toy(begins=True, refers=True, controls=("edges",)))
    with Session.open(path, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def server(refers: Session) -> Iterator[Server]:
    with running(refers, rows=4, added=0.1) as found:
        yield found


def within(content: bytes) -> dict[str, str]:
    return {"image_url": f"data:image/png;base64,{base64.b64encode(content).decode()}"}


def test_a_server_draws_what_a_pipeline_draws(server: Server, refers: Session) -> None:
    fields = {"prompt": PROMPT, "seed": 7, "n": 2, "ip_adapter_image": within(png(SEEN)), "ip_adapter_scale": 0.5}
    answer = server.draw(**fields).json()
    drawn = Pipeline(refers)(PROMPT, seed=7, num_images=2, ip_adapter_image=SEEN, ip_adapter_scale=0.5)
    for image, alone in zip(answer["data"], drawn.images, strict=True):
        np.testing.assert_array_equal(pixels(image["b64_json"]), np.asarray(alone))
    record = read_stamp(base64.b64decode(answer["data"][1]["b64_json"]), "the answer")
    assert record == drawn.records[1]
    plain = server.draw(prompt=PROMPT, seed=7).json()["data"][0]["b64_json"]
    np.testing.assert_array_equal(pixels(plain), np.asarray(Pipeline(refers)(PROMPT, seed=7).images[0]))
    assert (pixels(plain) != np.asarray(drawn.images[0])).any()


def test_an_edit_has_one_as_well(server: Server, refers: Session) -> None:
    answer = asked(server, image=png(PICTURE), prompt=PROMPT, seed=2, ip_adapter_image=png(SEEN)).json()
    drawn = Pipeline(refers)(PROMPT, image=PICTURE, seed=2, ip_adapter_image=SEEN)
    np.testing.assert_array_equal(pixels(answer["data"][0]["b64_json"]), np.asarray(drawn.images[0]))


def test_beside_a_control_picture(server: Server, refers: Session) -> None:
    edges = Image.fromarray(np.random.default_rng(2).integers(0, 256, (4, 4, 3), np.uint8))
    fields = {"prompt": PROMPT, "seed": 7, "ip_adapter_image": within(png(SEEN)), "ip_adapter_scale": 0.5}
    answer = server.draw(**fields, controls={"edges": {**within(png(edges)), "scale": 0.7}}).json()
    controls = {"edges": Control(image=edges, scale=0.7)}
    drawn = Pipeline(refers)(PROMPT, seed=7, ip_adapter_image=SEEN, ip_adapter_scale=0.5, controls=controls)
    np.testing.assert_array_equal(pixels(answer["data"][0]["b64_json"]), np.asarray(drawn.images[0]))
    without = server.draw(**fields).json()["data"][0]["b64_json"]
    assert (pixels(without) != np.asarray(drawn.images[0])).any()


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"ip_adapter_scale": 0.5}, None, "ip_adapter_scale would change nothing"),
        ({"ip_adapter_image": within(png(SEEN)), "ip_adapter_scale": 0}, None, "from 0.001 to 10, got 0"),
        ({"ip_adapter_image": within(b"x")}, "ip_adapter_image", "is not a picture that can be read"),
        ({"ip_adapter_image": {"image_url": "http://x"}}, "ip_adapter_image", "URLs are not fetched"),
        ({"ip_adapter_image": "x"}, "ip_adapter_image", "ip_adapter_image"),
    ],
)
def test_refused_by_name(server: Server, fields: dict[str, Any], param: str | None, says: str) -> None:
    answer = server.draw(prompt=PROMPT, **fields)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert says in error["message"]


def test_a_model_without_an_adapter(session: Session, server: Server) -> None:
    with running(session, rows=2) as plain:
        answer = plain.draw(prompt=PROMPT, ip_adapter_image=within(png(SEEN)))
        assert answer.status_code == 400
        assert "the bundle has no IP-Adapter" in answer.json()["error"]["message"]
        assert plain.http.get("/v1/models").json()["data"][0]["tgate"]["ip_adapter"] is False
    assert server.http.get("/v1/models").json()["data"][0]["tgate"]["ip_adapter"] is True
