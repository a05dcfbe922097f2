"""Requests that begin from a picture, on the toy bundle: what they begin from, what is put back, what is refused."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.toy_bundle import Toy, build
from tgate_engine.bundle import Bundle
from tgate_engine.errors import EngineError, RequestError
from tgate_engine.graph import ENCODE
from tgate_export.methods.base import Settings
from tgate_runtime.beginning import Beginner, fit_mask
from tgate_runtime.generators import noise
from tgate_runtime.graph_call import GraphCall
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.record import parse_record
from tgate_runtime.session import Session
from tgate_runtime.state import State

PROMPT = "a large red circle"
SETTINGS = {
    "default": Settings(steps=8, gate=5, self_interval=2, warm_up=0),
    "bound": Settings(steps=4, gate=2),
}


def picture(seed: int = 0, size: tuple[int, int] = (4, 4)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def mask(values: Any) -> Image.Image:
    return Image.fromarray(np.asarray(values, np.uint8) * 255)


HALF = [[0, 0, 1, 1]] * 4


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("beginning") / "toy", Toy(begins=True, settings=SETTINGS))


@pytest.fixture(scope="module")
def pipe(path: Path) -> Iterator[Pipeline]:
    with Pipeline.open(path, threads=1) as opened:
        yield opened


def encoded(image: Image.Image, channels: int) -> NDArray[np.float32]:
    """The mean of the toy's encoder, which its graph says in other words."""
    first = np.asarray(image)[..., 0].astype(np.float32) / 255
    return np.stack([first] * channels)


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
def test_latents_are_those_of_the_picture_with_noise(pipe: Pipeline, strength: float) -> None:
    """Draw 0 of a seed samples the picture's latents, draw 1 is the noise that they get."""
    image, first = picture(), list[NDArray[np.float32]]()
    begin = 8 - int(8 * strength)
    beginner = Beginner(pipe.session)
    plan = pipe.session.plan("default")
    beginning = beginner.begin(plan, image, strength)
    shape = pipe.session.shapes()[0].latents
    sample, added = (noise(7, shape, draw=draw) for draw in (0, 1))
    x, mend = beginning.first(sample, added)
    own, much = beginning.start.levels[0]
    mean = encoded(image, shape[0])
    np.testing.assert_allclose(x, own * (mean + 0.1 * mean * sample) + much * added, rtol=0, atol=1e-6)
    assert (mend, beginning.draws, beginning.start.begin) == (None, 1, begin)
    result = pipe(PROMPT, image=image, strength=strength, seed=7, on_step=lambda p: first.append(p.latents()))
    assert len(first) == 8 - begin
    again = pipe(PROMPT, image=image, strength=strength, seed=7, initial_latents=added[np.newaxis])
    np.testing.assert_array_equal(result.latents, again.latents)


def test_every_strength_draws_in_the_same_buffers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And in those of requests that begin from noise: what is kept for the next one does not grow."""
    made, init = list[object](), State.__init__

    def counted(self: State, *args: Any, **options: Any) -> None:
        made.append(self)
        init(self, *args, **options)

    monkeypatch.setattr(State, "__init__", counted)
    with Pipeline.open(path, threads=1) as pipe:
        plain = pipe(PROMPT, seed=1).latents
        for strength in (0.25, 0.5, 0.75, 1.0):
            pipe(PROMPT, image=picture(), strength=strength, seed=1, mask=mask(HALF))
        np.testing.assert_array_equal(pipe(PROMPT, seed=1).latents, plain)
    assert len(made) == 1


def test_each_image_of_a_request_is_the_one_that_its_seed_draws_alone(pipe: Pipeline) -> None:
    several = pipe([PROMPT, "a blue square"], image=picture(), strength=0.5, seed=3, num_images=2).latents
    assert len(np.unique(several.reshape(4, -1), axis=0)) == 4
    for j in range(4):
        alone = pipe([PROMPT, "a blue square"][j // 2], image=picture(), strength=0.5, seed=3 + j).latents[0]
        np.testing.assert_array_equal(several[j], alone)


def test_the_picture_the_strength_and_the_prompt_matter(pipe: Pipeline) -> None:
    base = pipe(PROMPT, image=picture(), strength=0.5, seed=1).latents
    for changed in (
        pipe(PROMPT, image=picture(1), strength=0.5, seed=1),
        pipe(PROMPT, image=picture(), strength=0.75, seed=1),
        pipe("a blue square", image=picture(), strength=0.5, seed=1),
        pipe(PROMPT, image=picture(), strength=0.5, seed=2),
    ):
        assert np.abs(changed.latents - base).max() > 1e-3
    np.testing.assert_array_equal(pipe(PROMPT, image=picture(), seed=1).latents, pipe_of(pipe, 0.6).latents)


def pipe_of(pipe: Pipeline, strength: float) -> Any:
    return pipe(PROMPT, image=picture(), strength=strength, seed=1)


def test_a_record_draws_it_again(pipe: Pipeline) -> None:
    drawn = pipe(PROMPT, image=picture(), strength=0.5, seed=1, mask=mask(HALF))
    record = parse_record(json.dumps(drawn.records[0].to_json()), "x")
    assert (record.strength, {*record.given}) == (0.5, {"image", "mask"})
    assert record.plan.name == "default"
    again = pipe(**record.request(), plan=record.plan.name, image=picture(), mask=mask(HALF))
    np.testing.assert_array_equal(again.latents, drawn.latents)
    assert "strength" not in pipe(PROMPT, seed=1).records[0].to_json()


# --- masks --------------------------------------------------------------------------------------


def test_what_a_mask_leaves_is_put_back_after_each_step(pipe: Pipeline) -> None:
    """As noisy as the level of the next step, and at the end as it was."""
    image, seen = picture(), list[NDArray[np.float32]]()
    pipe(PROMPT, image=image, strength=0.5, mask=mask(HALF), seed=7, on_step=lambda p: seen.append(p.latents()[0]))
    shape = pipe.session.shapes()[0].latents
    sample, added = (noise(7, shape, draw=draw) for draw in (0, 1))
    mean = encoded(image, shape[0])
    own = mean + 0.1 * mean * sample
    start = Beginner(pipe.session).begin(pipe.session.plan("default"), image, 0.5).start
    for index, latents in enumerate(seen):
        kept = own if index == len(seen) - 1 else start.noised(own, added, index + 1)
        np.testing.assert_allclose(latents[..., :2], kept[..., :2], rtol=0, atol=1e-6)
        assert np.abs(latents[..., 2:] - kept[..., 2:]).max() > 1e-2


def test_at_full_strength_a_mask_begins_from_noise_alone(pipe: Pipeline) -> None:
    """As diffusers does; the picture matters all the same."""
    plan, (a, b) = pipe.session.plan("default"), (picture(0), picture(1))
    beginner, drawn = Beginner(pipe.session), np.ones(pipe.session.shapes()[0].latents, np.float32)
    firsts = [beginner.begin(plan, image, 1.0, mask=mask(HALF)).first(drawn, drawn)[0] for image in (a, b)]
    np.testing.assert_array_equal(firsts[0], firsts[1])
    np.testing.assert_array_equal(firsts[0], np.float32(plan.sampler.initial_scale) * drawn)
    ends = [pipe(PROMPT, image=image, strength=1.0, mask=mask(HALF), seed=1).latents for image in (a, b)]
    assert np.abs(ends[0] - ends[1])[..., :2].max() > 1e-3


def test_a_mask_is_fitted(pipe: Pipeline) -> None:
    shape = pipe.session.shapes()[0]
    np.testing.assert_array_equal(fit_mask(mask(HALF), shape), HALF)
    np.testing.assert_array_equal(fit_mask(mask(np.kron(HALF, np.ones((2, 2)))), shape), HALF)
    coarse = replace(shape, width=8, height=8)
    values = np.zeros((8, 8))
    values[2, 4] = values[5, 7] = 1  # the first pixel of a latent's four, and its last
    wanted = np.zeros((4, 4))
    wanted[1, 2] = 1
    np.testing.assert_array_equal(fit_mask(mask(values), coarse), wanted)


# --- what is left of the plan -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strength", "says"),
    [
        (1.0, None),
        (0.75, None),
        (0.5, "leaves 4 of the 8 steps of plan 'default', which end before its fidelity-improving phase; take"),
        (0.2, "leaves 1 of the 8 steps of plan 'default', which end before its fidelity-improving phase: nothing is r"),
    ],
)
def test_where_less_is_reused_a_warning_says_so(
    pipe: Pipeline, caplog: pytest.LogCaptureFixture, strength: float, says: str | None
) -> None:
    with caplog.at_level(logging.WARNING, "tgate"):
        pipe(PROMPT, image=picture(), strength=strength, seed=1)
    assert [says is not None and says in message for message in caplog.messages] == ([True] if says else [])


def test_a_plan_that_reuses_nothing_is_not_told_of(pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "tgate"):
        pipe(PROMPT, image=picture(), strength=0.25, seed=1, plan="ungated")
    assert caplog.messages == []


# --- refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        ({"strength": 0}, r"the strength is .* above 0 and at most 1, got 0"),
        ({"strength": 1.5}, r"above 0 and at most 1, got 1\.5"),
        ({"strength": float("nan")}, "above 0 and at most 1, got nan"),
        ({"strength": "0.5"}, r"above 0 and at most 1, got 0\.5"),
        ({"strength": True}, "above 0 and at most 1, got True"),
        ({"strength": 0.1}, r"strength 0\.1 leaves none of 8 steps; take 0\.13 or more"),
        (
            {"image": None, "strength": 0.5},
            "strength would change nothing: it is for requests that begin from",
        ),
        ({"image": None, "mask": mask(HALF)}, "mask would change nothing"),
        ({"image": "in.png"}, r"an image must be a PIL\.Image\.Image, got str"),
        ({"mask": "m.png"}, r"an image must be a PIL\.Image\.Image, got str"),
        ({"mask": mask(np.zeros((4, 4)))}, "the mask leaves everything as it is"),
        ({"plan": "bound", "mask": mask(HALF)}, r"sampler toy of plan 'bound' goes by latents as it left them"),
        ({"prompt": None}, "is conditioned by a prompt: give prompt, or prompt_embeds, and nothing else; got neither"),
    ],
)
def test_refused_before_any_step(pipe: Pipeline, asked: dict[str, Any], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        pipe(**{"prompt": PROMPT, "image": picture(), "seed": 1, "on_step": lambda _: pytest.fail("a step"), **asked})


def test_a_bundle_without_an_encoder(tmp_path: Path) -> None:
    with (
        Pipeline.open(build(tmp_path / "toy"), threads=1) as pipe,
        pytest.raises(RequestError, match=r"has no encoder, .* export it again, with an encoder among"),
    ):
        pipe(PROMPT, image=picture())


def test_a_sampler_without_starts(pipe: Pipeline) -> None:
    plan = pipe.session.plan("default")
    other = replace(plan, sampler=replace(plan.sampler, name="other"))
    with pytest.raises(RequestError, match="for which the bundle has no start from a picture"):
        pipe(PROMPT, image=picture(), plan=other)


# --- the encoder --------------------------------------------------------------------------------


def test_the_encoder_is_loaded_by_the_first_who_asks(path: Path) -> None:
    with Pipeline.open(path, threads=1) as pipe:
        graph = pipe.session.graph(ENCODE)
        assert graph is not None
        pipe(PROMPT, seed=1)
        assert graph.file not in pipe.session._executables  # type: ignore[operator]
        pipe(PROMPT, image=picture(), seed=1)
        assert graph.file in pipe.session._executables  # type: ignore[operator]
        assert pipe.session.executable(graph) is pipe.session.executable(graph)
    with pytest.raises(EngineError, match="is closed"):
        pipe.session.executable(graph)


def test_an_encoder_that_gives_no_numbers_is_told(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def read(self) -> NDArray[np.float32]:
            return np.full((1, 2, 4, 4), np.nan, np.float32)

    with Session.open(Bundle.open(path), threads=1) as session:
        borrow = GraphCall.borrow

        def broken(*args: Any) -> Any:
            call = borrow(*args)
            found = call.__enter__()
            found.outputs = dict.fromkeys(found.outputs, Broken())  # type: ignore[arg-type]
            return contextlib.nullcontext(found)

        monkeypatch.setattr(GraphCall, "borrow", staticmethod(broken))
        with pytest.raises(EngineError, match="the latents of this picture"):
            Beginner(session).begin(session.plan("default"), picture(), 0.5)
