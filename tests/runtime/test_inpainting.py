"""What an inpainting model is told, on the toy bundle: the mask, what is left of the picture, and whose noise."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from tests.toy_bundle import Toy, build
from tgate_engine.errors import BundleError, RequestError
from tgate_engine.graph import ENCODE
from tgate_engine.step import half
from tgate_export.methods.base import Settings
from tgate_runtime.conditioning import conditioning_of, from_embeddings
from tgate_runtime.generators import noise
from tgate_runtime.inpainting import around, draw_of
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.runner import run
from tgate_runtime.session import Session
from tgate_runtime.signatures import check_forms, check_signatures
from tgate_runtime.state import State

PROMPT = "a large red circle"
SETTINGS = {"default": Settings(steps=8, gate=5, self_interval=2, warm_up=0), "bound": Settings(steps=4, gate=2)}
"""Those of 4 steps take no mask that is mended, which is not how these models go about it."""


def picture(seed: int = 0, size: tuple[int, int] = (4, 4)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


MASK = Image.fromarray(np.asarray([[0, 127, 128, 255]] * 4, np.uint8))
COVERED = np.asarray([[0, 0, 1, 1]] * 4, np.float32)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inpainting") / "toy"
    return build(folder, Toy(begins=True, inpaints=True, settings=SETTINGS))


@pytest.fixture(scope="module")
def pipe(path: Path) -> Iterator[Pipeline]:
    with Pipeline.open(path, threads=1) as opened:
        yield opened


def row(image: Image.Image, sample: Any, channels: int) -> Any:
    """The mask, and a sample of the toy's latents of what it leaves, written out."""
    left = np.asarray(image)[..., 0].astype(np.float32) / 255 * (1 - COVERED)
    mean = np.stack([left] * channels)
    return np.concatenate([COVERED[None], mean + 0.1 * mean * sample])


def test_the_network_is_told_the_mask_and_what_it_leaves(pipe: Pipeline) -> None:
    """Both halves alike; in a picture of another size, what is there once it is resized."""
    shape = pipe.session.shapes()[0]
    sample = noise(7, shape.latents, draw=1)
    told = around(pipe.session, picture(), MASK)
    np.testing.assert_array_equal(told.mask, COVERED)
    for which in ("negative", "positive"):
        own = told.row(sample)[half("masked", which)]
        np.testing.assert_allclose(own, row(picture(), sample, shape.latents[0])[None], rtol=0, atol=1e-6)
    large = around(pipe.session, picture().resize((8, 8), Image.Resampling.NEAREST), MASK.resize((8, 8)))
    np.testing.assert_array_equal(large.mask, COVERED)


def drawn_by_hand(session: Session, seed: int, strength: float, plan: Any) -> Any:
    """The request written out over a state: which draw is what, and what is begun from."""
    pipe, shape = Pipeline(session), session.shapes()[0]
    channels = shape.latents[0]
    beginning = None if strength == 1 else pipe._beginner.begin(plan, picture(), strength)
    draws = [noise(seed, shape.latents, draw=draw) for draw in range(3)]
    start = draws[0] if beginning is None else beginning.first(draws[0], draws[1])[0]
    rows = dict(pipe._encoder.of_texts([(PROMPT, None)])[0][0])
    own = row(picture(), draws[1 if beginning is None else 2], channels)[None]
    rows |= {half("masked", which): own.astype(np.float32) for which in ("negative", "positive")}
    state = State(session, plan, 1)
    for _ in run(
        state,
        latents=start[None],
        conditioning=rows,
        guidance_scale=3.0,
        plan=plan if beginning is None else beginning.plan,
    ):
        pass
    return state.latents()


@pytest.mark.parametrize("plan", ["default", "bound"])
@pytest.mark.parametrize("strength", [None, 0.5])
def test_a_request_is_what_it_is_by_hand(pipe: Pipeline, plan: str, strength: float | None) -> None:
    """All steps from noise alone, if nothing is said; and the picture that it begins from is the whole one."""
    own: dict[str, Any] = {} if strength is None else {"strength": strength}
    result = pipe(PROMPT, image=picture(), mask=MASK, seed=4, plan=plan, **own)
    by_hand = drawn_by_hand(pipe.session, 4, strength or 1.0, pipe.session.plan(plan))
    np.testing.assert_allclose(result.latents, by_hand, rtol=0, atol=1e-6)
    assert result.records[0].strength == (strength or 1.0)
    assert {*result.records[0].given} == {"image", "mask"}
    other = pipe(PROMPT, image=picture(1), mask=MASK, seed=4, plan=plan, **own)
    assert np.abs(other.latents - result.latents).max() > 1e-3


def test_which_draw_is_the_sample(pipe: Pipeline) -> None:
    """After the noise that is begun from, which itself comes after the sample of the picture."""
    assert draw_of(None) == 1
    assert draw_of(pipe._beginner.begin(pipe.session.plan("default"), picture(), 0.5)) == 2


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({}, "no image and no mask: give an image and a mask beside the prompt"),
        ({"mask": MASK}, "a request has no image"),
        ({"image": picture()}, "a request has no mask"),
        ({"image": picture(), "strength": 0.5}, "a request has no mask"),
        ({"image": picture(), "mask": Image.new("L", (4, 4))}, "the mask leaves everything as it is"),
        ({"image": picture(), "mask": MASK, "strength": 0}, "above 0 and at most 1, got 0"),
        ({"image": picture(), "mask": MASK, "strength": 0.01}, "leaves none of 8 steps"),
        ({"image": "x.png", "mask": MASK}, "an image must be a PIL.Image.Image, got str"),
        ({"image": picture(), "mask": "x.png"}, "an image must be a PIL.Image.Image, got str"),
    ],
)
def test_what_is_refused(pipe: Pipeline, asked: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        pipe(PROMPT, seed=1, **asked)


def test_without_an_encoder_there_is_nothing_to_tell_it(tmp_path: Path) -> None:
    with Session.open(build(tmp_path / "toy", Toy(inpaints=True)), threads=1) as session:
        with pytest.raises(RequestError, match="the bundle has no encoder"):
            Pipeline(session)(PROMPT, image=picture(), mask=MASK)
        with pytest.raises(RequestError, match="the bundle has no encoder"):
            around(session, picture(), MASK)


def test_embeddings_stand_for_the_prompt_alone(pipe: Pipeline) -> None:
    text = pipe._encoder.of_texts([(PROMPT, None)])[0][0]
    embeds = {name: value for name, value in text.items() if not name.startswith(("masked", "time_ids"))}
    assert not from_embeddings(pipe.session, embeds)["masked.positive"].any()  # until a request brings its picture
    drawn = pipe(prompt_embeds=embeds, image=picture(), mask=MASK, seed=4)
    np.testing.assert_array_equal(drawn.latents, pipe(PROMPT, image=picture(), mask=MASK, seed=4).latents)
    encoded = {"text": np.zeros((1, 4, 4), np.float32), "pooled": np.zeros((1, 4), np.float32)}
    assert not conditioning_of(pipe.session, encoded, None)["masked.negative"].any()


def test_few_steps_are_told(pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tgate"):
        pipe(PROMPT, image=picture(), mask=MASK, seed=1, strength=0.3)
    assert "strength 0.3 leaves 2 of the 8 steps of plan 'default'" in caplog.text
    caplog.clear()
    pipe(PROMPT, image=picture(), mask=MASK, seed=1)
    assert not caplog.text


def test_an_encoder_without_a_mask_is_no_such_models(pipe: Pipeline) -> None:
    manifest = pipe.session.manifest
    shape = manifest.shapes[0]
    spec = shape.graph(ENCODE)
    assert spec is not None
    lacking = replace(spec, inputs=spec.inputs[:1])
    with pytest.raises(BundleError, match="has no input mask; export the bundle again"):
        check_signatures(manifest, {"encoder": lacking})
    odd = replace(spec, inputs=(spec.inputs[0], replace(spec.inputs[1], shape=(1, 4, 5))))
    with pytest.raises(BundleError, match=r"has mask as uint8 \[1, 4, 5\], where mask as uint8 \[1, 4, 4\] is wanted"):
        check_forms(shape, {"encoder": odd})
    plain = replace(manifest, conditioning=tuple(c for c in manifest.conditioning if c.source != "masked"))
    with pytest.raises(BundleError, match="takes mask, which nothing feeds"):
        check_signatures(plain, {"encoder": spec})
