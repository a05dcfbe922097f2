"""Previews: where a trajectory is heading, and in which colours."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests import toy_model
from tests.toy_bundle import Toy, build, edit_manifest, sampler
from tgate_engine.errors import RequestError
from tgate_engine.plan import Plan, Step
from tgate_engine.sampler import Sampler, SamplerStep
from tgate_runtime import decoder, preview
from tgate_runtime.pipeline import Pipeline, Progress
from tgate_runtime.preview import Colours, ahead

PROMPT = "a large red circle"


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    with Pipeline.open(build(tmp_path_factory.mktemp("preview") / "toy", goldens=False), threads=1) as opened:
        yield opened


def alike(a: Any, b: Any) -> float:
    return float(np.corrcoef(np.asarray(a, float).ravel(), np.asarray(b, float).ravel())[0, 1])


# --- colours ------------------------------------------------------------------------------------


def test_the_colours_are_the_decoders_where_that_is_linear(pipe: Pipeline) -> None:
    """The toy's decoder is its image weights, cut off at black and white."""
    latents = (np.random.default_rng(1).standard_normal(toy_model.LATENTS) * 0.7).astype(np.float32)
    expected = np.clip(latents.transpose(1, 2, 0) @ toy_model.weights()["image"] * 60 + 127.5, 0, 255)
    picture = Colours(pipe.session).picture(latents)
    assert (picture.mode, picture.size) == ("RGB", (4, 4))
    assert np.abs(np.asarray(picture, float) - expected).max() < 16
    assert alike(picture, expected) > 0.99


def test_the_map_is_fitted_once_at_the_first_preview(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[int] = []
    decode = decoder.decode

    def counted(*arguments: Any) -> Any:
        decoded.append(1)
        return decode(*arguments)

    monkeypatch.setattr(preview, "decode", counted)
    colours, latents = Colours(pipe.session), np.ones(toy_model.LATENTS, np.float32)
    assert decoded == []
    first = colours.picture(latents)
    assert len(decoded) == 64  # 16 places each, of 1024
    assert colours.picture(latents).tobytes() == first.tobytes() == Colours(pipe.session).picture(latents).tobytes()
    assert len(decoded) == 128


# --- a small decoder ----------------------------------------------------------------------------


def test_a_small_decoder_shows_pictures_of_their_own_size(tmp_path: Path) -> None:
    """The toy's has half the contrast of its own decoder, which is called for the result alone."""
    shown: list[list[Image.Image]] = []
    with Pipeline.open(build(tmp_path / "toy", Toy(small=True, sizes=((4, 4), (8, 2))), goldens=False)) as own:
        for size, shape in (("4x4", (4, 4)), ("8x2", (2, 8))):
            shown.clear()
            result = own(PROMPT, seed=2, num_images=3, size=size, on_step=lambda p: shown.append(p.preview()))
            assert [len(pictures) for pictures in shown] == [3] * 8
            for picture, latents in zip(shown[-1], result.latents, strict=True):
                expected = np.clip(latents.transpose(1, 2, 0) @ toy_model.weights()["image"] * 30 + 127.5, 0, 255)
                assert expected.shape[:2] == shape
                assert np.abs(np.asarray(picture, float) - expected).max() <= 1
    assert own._previews._colours._map is None  # nothing was fitted


def test_a_small_decoder_alone_is_enough_for_previews(tmp_path: Path) -> None:
    path = build(tmp_path / "toy", Toy(small=True), goldens=False)
    edit_manifest(path, lambda d: d["shapes"][0]["graphs"].pop("decoder"))
    shown: list[Image.Image] = []
    with Pipeline.open(path, threads=1, check_digests=False) as own:
        assert own(PROMPT, on_step=lambda progress: shown.append(progress.preview()[0])).images == []
    assert [picture.size for picture in shown] == [(4, 4)] * 8


# --- where it is heading ------------------------------------------------------------------------


def ddim(alphas: NDArray[np.float64]) -> Sampler:
    """Deterministic DDIM of a network that predicts noise, from the paper: x' = a' (x - s e) / a + s' e."""
    sigmas = np.sqrt(1 - alphas**2)
    calls = [
        SamplerStep(
            timestep=float(i),
            input_scale=1.0,
            latents=(float(alphas[i + 1] / alphas[i]), 0, 0, 0),
            outputs=(float(sigmas[i + 1] - alphas[i + 1] * sigmas[i] / alphas[i]), 0, 0, 0),
        )
        for i in range(len(alphas) - 1)
    ]
    return Sampler(
        name="ddim",
        steps=len(calls),
        initial_scale=1.0,
        calls=tuple(calls),
        lead_in=0,
        prediction_type="epsilon",
    )


def steps_of(of: Sampler) -> list[Step]:
    return [Step(index=i, phase="", graph="full", call=call, reads=(), writes=()) for i, call in enumerate(of.calls)]


def test_of_a_network_that_predicts_noise_it_is_the_clean_latents() -> None:
    alphas = np.cos(np.linspace(1.5, 0, 9))
    steps = steps_of(ddim(alphas))
    x, e = np.random.default_rng(0).standard_normal((2, 5))
    for i in range(len(steps)):
        towards, given = ahead(steps[i:])
        np.testing.assert_allclose(towards[0] * x + given[0] * e, (x - np.sqrt(1 - alphas[i] ** 2) * e) / alphas[i])
        assert not towards[1:].any()
        assert not given[1:].any()


def test_a_sampler_that_looks_back_is_followed() -> None:
    """Against the recurrence itself, in the order of time."""
    steps = steps_of(sampler(9))
    rng = np.random.default_rng(2)
    x, e = list(rng.standard_normal((4, 3))), list(rng.standard_normal((3, 3)))  # the newest last
    towards, given = ahead(steps[4:])
    expected = [sum(c * v for c, v in zip(towards, reversed(x), strict=True))]
    expected[0] = expected[0] + sum(c * v for c, v in zip(given, reversed(e), strict=True))
    for step in steps[4:]:
        e.append(e[-1])
        terms = [step.call.latents[j] * x[-1 - j] + step.call.outputs[j] * e[-1 - j] for j in range(4)]
        x.append(np.sum(terms, axis=0))
    np.testing.assert_allclose(expected[0], x[-1])


def test_nothing_is_ahead_of_the_end() -> None:
    towards, given = ahead([])
    assert towards.tolist() == [1, 0, 0, 0]
    assert given.tolist() == [0, 0, 0]


def test_it_goes_on_as_the_steps_themselves_would(pipe: Pipeline) -> None:
    """With a sampler whose last steps ask nothing of the network, what is ahead is exactly what comes."""
    plan = pipe.session.manifest.plan("default")
    deaf = [replace(step.call, outputs=(0.0, *step.call.outputs[1:])) for step in plan.steps]
    calls = [call if i < 5 else deaf[i] for i, call in enumerate(step.call for step in plan.steps)]
    ending = with_calls(plan, calls)
    seen: list[NDArray[Any]] = []

    def look(progress: Progress) -> None:
        if progress.step.index == 4:
            state = progress.look._state
            assert state is not None
            latents, outputs = state.history(0)
            towards, given = ahead(ending.steps[5:6])
            seen.append(np.tensordot(towards, latents, 1) + np.tensordot(given, outputs, 1))
        if progress.step.index == 5:
            seen.append(progress.latents()[0])

    pipe(PROMPT, seed=3, plan=ending, on_step=look)
    np.testing.assert_allclose(seen[0], seen[1], rtol=0, atol=1e-5)


def with_calls(plan: Plan, calls: list[SamplerStep]) -> Plan:
    steps = tuple(replace(step, call=call) for step, call in zip(plan.steps, calls, strict=True))
    return replace(plan, sampler=replace(plan.sampler, calls=tuple(calls)), steps=steps)


# --- in a request -------------------------------------------------------------------------------


def test_the_images_of_a_call_are_looked_at_until_on_step_returns(pipe: Pipeline) -> None:
    seen: list[Progress] = []
    kept: list[NDArray[Any]] = []

    def look(progress: Progress) -> None:
        seen.append(progress)
        kept.append(progress.latents())
        assert len(progress.preview()) == len(progress.images)

    result = pipe(PROMPT, seed=5, num_images=6, on_step=look)  # calls of 1 to 4 images
    assert [progress.images for progress in seen] == [range(4)] * 8 + [range(4, 6)] * 8
    np.testing.assert_array_equal(np.concatenate([kept[7], kept[15]]), result.latents)
    assert not np.array_equal(kept[6], kept[7])
    for ask in (seen[0].latents, seen[0].preview):
        with pytest.raises(RequestError, match="until on_step returns; copy them there"):
            ask()


def test_a_call_that_is_filled_up_shows_its_images_alone(tmp_path: Path) -> None:
    seen: list[tuple[range, int]] = []
    with Pipeline.open(build(tmp_path / "toy", Toy(batches=((4, 4),)), goldens=False), threads=1) as own:
        own(PROMPT, num_images=2, on_step=lambda p: seen.append((p.images, len(p.latents()))))
    assert set(seen) == {(range(2), 2)}


def test_the_last_preview_is_of_the_final_latents(pipe: Pipeline) -> None:
    shown: list[Image.Image] = []
    result = pipe(PROMPT, seed=1, on_step=lambda progress: shown.append(progress.preview()[0]))
    assert shown[-1].tobytes() == Colours(pipe.session).picture(result.latents[0]).tobytes()


def test_what_has_no_decoder_or_makes_videos_says_so(tmp_path: Path) -> None:
    looked: list[Any] = []
    path = build(tmp_path / "toy", goldens=False)
    edit_manifest(path, lambda d: d["shapes"][0]["graphs"].pop("decoder"))
    with Pipeline.open(path, threads=1, check_digests=False) as own:
        with pytest.raises(RequestError, match=r"no decoder \(--components\), which previews are fitted to"):
            own(PROMPT, on_step=lambda progress: looked.append(progress.preview()))
        assert own(PROMPT, on_step=lambda progress: looked.append(progress.latents())).images == []
    assert len(looked) == 8
    manifest = own.session.manifest
    with pytest.raises(RequestError, match="toy makes videos, and previews are of pictures"):
        preview.check_previews(replace(manifest, frames=2, shapes=(with_decoder(tmp_path),)))


def with_decoder(tmp_path: Path) -> Any:
    with Pipeline.open(build(tmp_path / "other", goldens=False), threads=1) as other:
        return other.session.manifest.shapes[0]


# --- of a model that draws ----------------------------------------------------------------------


def test_previews_of_mini_look_like_what_comes(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The final latents' at least as 0.95, in the mean 0.98; a half-way one above 0.8, where the noise says little."""
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path_factory.mktemp("cache")))
    finals, halfway, noisy = [], [], []
    with Pipeline.open("mini", plans=["default"], threads=1) as mini:
        colours = Colours(mini.session)
        prompts = ["a large red circle above a small blue square", "a green star", "a small yellow triangle"]
        shown: dict[int, Image.Image] = {}
        raw: dict[int, Image.Image] = {}

        def look(progress: Progress) -> None:
            if progress.step.index == 6:
                for image, picture, latents in zip(
                    progress.images, progress.preview(), progress.latents(), strict=True
                ):
                    shown[image], raw[image] = picture, colours.picture(latents)

        result = mini(prompts, seed=[1, 22, 333], on_step=look)
        for j, image in enumerate(result.images):
            small = image.resize((16, 16), Image.Resampling.BOX)
            finals.append(alike(colours.picture(result.latents[j]), small))
            halfway.append(alike(shown[j], small))
            noisy.append(alike(raw[j], small))
    assert min(finals) > 0.95
    assert statistics.mean(halfway) > 0.8 > 0.6 > statistics.mean(noisy)
