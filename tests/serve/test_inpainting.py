"""Inpainting models at a server: an edit with a mask gets what a pipeline draws, and nothing else is drawn."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from tests.serve.running import Server, pixels, running
from tests.serve.test_edits import CLEAR, MASK, PICTURE, PROMPT, asked, png
from tests.toy_bundle import Toy, build
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.session import Session
from tgate_runtime.stamps import read_stamp


@pytest.fixture(scope="module")
def inpaints(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    path = build(tmp_path_factory.mktemp("inpaints") / "toy", Toy(begins=True, inpaints=True))
    with Session.open(path, threads=1) as opened:
        yield opened


@pytest.fixture(scope="module")
def server(inpaints: Session) -> Iterator[Server]:
    with running(inpaints, rows=4, added=0.1) as found:
        yield found


@pytest.mark.parametrize("strength", [None, 1.0, 0.5])
def test_a_server_draws_what_a_pipeline_draws(server: Server, inpaints: Session, strength: float | None) -> None:
    own: dict[str, Any] = {} if strength is None else {"strength": strength}
    answer = asked(server, image=png(PICTURE), mask=png(CLEAR), prompt=PROMPT, seed=7, n=2, **own).json()
    drawn = Pipeline(inpaints)(PROMPT, image=PICTURE, mask=MASK, seed=7, num_images=2, **own)
    for image, alone in zip(answer["data"], drawn.images, strict=True):
        np.testing.assert_array_equal(pixels(image["b64_json"]), np.asarray(alone))
    assert sum(answer["tgate"]["steps"].values()) == (4 if strength == 0.5 else 8)
    record = read_stamp(base64.b64decode(answer["data"][1]["b64_json"]), "the answer")
    assert (record.strength, record.given) == (strength or 1.0, drawn.records[1].given)


def test_each_has_its_own_picture_whoever_else_is_there(server: Server, inpaints: Session) -> None:
    turned = [PICTURE.rotate(90 * i) for i in range(4)]
    with ThreadPoolExecutor(len(turned)) as pool:
        answers = list(
            pool.map(lambda one: asked(server, image=png(one), mask=png(MASK), prompt=PROMPT, seed=3).json(), turned)
        )
    for image, answer in zip(turned, answers, strict=True):
        alone = Pipeline(inpaints)(PROMPT, image=image, mask=MASK, seed=3).images[0]
        np.testing.assert_array_equal(pixels(answer["data"][0]["b64_json"]), np.asarray(alone))


def test_what_lacks_a_picture_or_a_mask_is_refused(server: Server) -> None:
    before = server.worker.counts.images
    status, error = server.refused(prompt=PROMPT)
    assert status == 400
    assert "has no image and no mask: give an image and a mask beside the prompt" in error["message"]
    answer = asked(server, image=png(PICTURE), prompt=PROMPT)
    assert answer.status_code == 400
    assert "a request has no mask" in answer.json()["error"]["message"]
    assert server.worker.counts.images == before


def test_models_tell(server: Server) -> None:
    facts = server.http.get("/v1/models").json()["data"][0]["tgate"]
    assert (facts["edits"], facts["inpaints"]) == (True, True)
