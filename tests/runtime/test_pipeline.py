"""From prompts to pictures, on the toy bundle."""

from __future__ import annotations

import collections
import json
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests import toy_model
from tests.toy_bundle import Toy, build, edit_manifest, make_plan, sampler
from tests.toy_model import LATENTS, LENGTH, TIME_IDS, WORDS
from tgate_engine import __version__
from tgate_engine.errors import BundleError, EngineError, PlanError, RequestError
from tgate_engine.plan import Plan
from tgate_export.methods.base import Settings
from tgate_runtime import pipeline
from tgate_runtime.engines.ort import OrtCpu, OrtExecutable, _OrtCall
from tgate_runtime.generators import CONDITIONING, in_step, noise
from tgate_runtime.pipeline import Pipeline, Progress
from tgate_runtime.record import plan_for
from tgate_runtime.state import State
from tgate_runtime.text import EncodedText, TextEncoder

PROMPT = "a large red circle"
SETTINGS = {"default": Settings(steps=8, gate=5, self_interval=2), "fast": Settings(steps=3, gate=2)}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    path = build(tmp_path_factory.mktemp("pipeline") / "toy", Toy(settings=SETTINGS))
    with Pipeline.open(path, threads=1, memory="fast") as opened:
        yield opened


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    """Two sizes, and calls of 1, 3 or 4 images."""
    toy = Toy(sizes=((4, 4), (8, 2)), batches=((1, 1), (3, 4)))
    path = build(tmp_path_factory.mktemp("pipeline") / "several", toy)
    with Pipeline.open(path, threads=1, memory="fast") as opened:
        yield opened


def ids(prompt: str, pad: int) -> list[int]:
    """What the tokenizers must give, without them."""
    words = [WORDS.index(w) if w in WORDS else WORDS.index("<unk>") for w in prompt.lower().split()]
    kept = [WORDS.index("<s>"), *words[: LENGTH - 2], WORDS.index("</s>")]
    return kept + [pad] * (LENGTH - len(kept))


def text(prompt: str) -> dict[str, NDArray[Any]]:
    w = toy_model.weights()
    return {"text": w["embed.0"][ids(prompt, 0)][None], "pooled": w["embed.1"][ids(prompt, 2)].mean(axis=0)[None]}


def reference(
    pipe: Pipeline,
    prompt: str,
    negative: str | None,
    *,
    seed: int,
    guidance: float = 3.0,
    size: tuple[int, int] = (4, 4),
) -> NDArray[Any]:
    """Final latents [C, h, w] of the image with that seed, from the prompt's words to the last step, in float64."""
    positive, plan = text(prompt), pipe.session.manifest.plan("default")
    minus = text(negative or "")
    if negative is None and pipe.session.manifest.zero_negative:
        minus = {name: np.zeros_like(values) for name, values in minus.items()}
    rows: dict[str, NDArray[Any]] = {}
    for half, tensors in (("positive", positive), ("negative", minus)):
        rows |= {f"{name}.{half}": values for name, values in tensors.items()}
        rows[f"time_ids.{half}"] = np.array([toy_model.time_ids(*size)])
    start = noise(seed, (LATENTS[0], size[1], size[0]))[None]
    guided = pipe.session.manifest.guided
    return toy_model.trajectory(toy_model.weights(), plan.sampler, start, rows, guidance, guided=guided, m=5, k=2)[-1][
        0
    ]


def close(values: NDArray[Any], expected: NDArray[Any]) -> bool:
    return float(np.abs(values - expected).max()) < 2e-6 * float(np.abs(expected).max())


def same(values: NDArray[Any], expected: NDArray[Any]) -> bool:
    """Bit for bit."""
    return values.dtype == expected.dtype and values.shape == expected.shape and values.tobytes() == expected.tobytes()


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> collections.Counter[str]:
    """How often the engine was called, by graph."""
    calls: collections.Counter[str] = collections.Counter()
    call = _OrtCall.__call__

    def counted(self: Any) -> None:
        calls[self._graph] += 1
        call(self)

    monkeypatch.setattr(_OrtCall, "__call__", counted)
    return calls


# --- one picture --------------------------------------------------------------------------------


@pytest.mark.parametrize("negative", [None, "", "a small blue square"])
@pytest.mark.parametrize("seed", [0, 7])
def test_a_picture_from_its_prompt(pipe: Pipeline, seed: int, negative: str | None) -> None:
    result = pipe(PROMPT, seed=seed, negative_prompt=negative, guidance_scale=4.5)
    assert close(result.latents[0], reference(pipe, PROMPT, negative, seed=seed, guidance=4.5))
    assert result.seeds == (seed,)
    assert result.videos == []
    assert result.latents.dtype == np.float32
    w = toy_model.weights()["image"]
    expected = np.clip(result.latents[0].transpose(1, 2, 0).astype(np.float64) @ w * 60 + 127.5, 0, 255)
    (image,) = result.images
    assert (image.mode, image.size) == ("RGB", (LATENTS[2], LATENTS[1]))
    assert np.abs(np.asarray(image) - expected).max() <= 1.01


def test_every_image_has_a_record_with_which_it_is_drawn_again(pipe: Pipeline) -> None:
    asked = ["a red circle", "a blue square"]
    result = pipe(
        asked, seed=7, num_images=2, negative_prompt=[None, "small"], guidance_scale=[2, 3, 4, 5], plan="fast"
    )
    assert [record.prompt for record in result.records] == [text for text in asked for _ in range(2)]
    assert [record.negative_prompt for record in result.records] == [None, None, "small", "small"]
    assert [(record.seed, record.guidance_scale) for record in result.records] == [(7, 2), (8, 3), (9, 4), (10, 5)]
    for record, latents in zip(result.records, result.latents, strict=True):
        assert (record.size, record.model, record.plan.name, record.plan.sampler) == ("4x4", "toy", "fast", "toy")
        assert (record.engine.name, record.version, record.given) == ("ort-cpu", __version__, {})
        again = pipe(**record.request(), plan=plan_for(record, pipe.session.manifest))
        assert same(again.latents[0], latents)
        assert again.records == (record,)
    start = np.stack([noise(seed, LATENTS) for seed in (1, 2)])
    given = pipe("a", seed=0, num_images=2, initial_latents=start)
    alone = pipe("a", seed=1, initial_latents=start[1:])
    assert given.records[1] == alone.records[0]
    assert given.records[0].given != alone.records[0].given


def test_no_negative_prompt_is_the_empty_one_where_the_model_says_so(tmp_path: Path) -> None:
    with Pipeline.open(build(tmp_path / "toy", Toy(zero_negative=False)), threads=1) as pipe:
        none = pipe(PROMPT, seed=1).latents
        assert same(none, pipe(PROMPT, seed=1, negative_prompt="").latents)
        assert close(none[0], reference(pipe, PROMPT, None, seed=1))


def test_without_guidance(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Pipeline.open(build(tmp_path / "toy", Toy(guided=False)), threads=1) as pipe:
        assert close(pipe(PROMPT, seed=1).latents[0], reference(pipe, PROMPT, None, seed=1))
        pipe(PROMPT, seed=1, guidance_scale=1.0)
        with pytest.raises(RequestError, match=r"without guidance and takes no scale above 1, got 3\.0"):
            pipe(PROMPT, guidance_scale=3.0)
        (record,) = pipe(PROMPT, seed=1, negative_prompt="blue").records
        assert "the negative prompt is not used" in caplog.text
        assert (record.negative_prompt, record.guidance_scale) == (None, 1.0)


def test_the_same_seed_is_the_same_picture(pipe: Pipeline) -> None:
    a, b, c = (pipe(PROMPT, seed=s).latents for s in (0, 0, 1))
    assert same(a, b)
    assert not np.array_equal(a, c)


def test_no_seed_draws_one_and_reports_it(pipe: Pipeline) -> None:
    first = pipe(PROMPT, num_images=2)
    assert first.seeds[1] == first.seeds[0] + 1
    assert pipe(PROMPT).seeds[0] != first.seeds[0]
    assert same(pipe(PROMPT, seed=first.seeds[1]).latents[0], first.latents[1])


def test_a_bundle_without_a_decoder_gives_latents(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    graph = type(pipe.session).graph
    monkeypatch.setattr(
        type(pipe.session), "graph", lambda self, role, size=None: None if role == "decode" else graph(self, role, size)
    )
    result = pipe(PROMPT, seed=1)
    assert (result.images, result.videos) == ([], [])
    assert result.latents.shape == (1, *LATENTS)


def test_pictures_by_the_small_decoder_say_so_in_their_records(tmp_path: Path) -> None:
    """The toy's has half the contrast; the latents are those of any request."""
    with Pipeline.open(build(tmp_path / "toy", Toy(small=True), goldens=False), threads=1) as own:
        full, small = own(PROMPT, seed=3, num_images=2), own(PROMPT, seed=3, num_images=2, decoder="preview")
        again = own(**small.records[1].request())
        named = own(**{**small.records[1].request(), "decoder": "full"})
    np.testing.assert_array_equal(small.latents, full.latents)
    for picture, latents in zip(small.images, small.latents, strict=True):
        expected = np.clip(latents.transpose(1, 2, 0) @ toy_model.weights()["image"] * 30 + 127.5, 0, 255)
        assert np.abs(np.asarray(picture, float) - expected).max() <= 1
    assert [record.decoder for record in (*full.records, *small.records)] == [None, None, "preview", "preview"]
    assert again.images[0].tobytes() == small.images[1].tobytes() != full.images[1].tobytes()
    assert named.images[0].tobytes() == full.images[1].tobytes()
    assert named.records[0].decoder is None


# --- several pictures ---------------------------------------------------------------------------


def test_two_prompts_with_all_of_their_own_are_as_if_asked_for_alone(pipe: Pipeline) -> None:
    """Bit for bit: seeds, guidance scales and negative prompts belong to an image."""
    both = pipe(["red", "a blue square"], seed=[1, 2], guidance_scale=[3.0, 7.0], negative_prompt=["small", None])
    first = pipe("red", seed=1, guidance_scale=3.0, negative_prompt="small")
    second = pipe("a blue square", seed=2, guidance_scale=7.0)
    assert same(both.latents, np.concatenate([first.latents, second.latents]))
    assert both.seeds == (1, 2)
    assert [np.asarray(image).tolist() for image in both.images] == [
        np.asarray(image).tolist() for image in (*first.images, *second.images)
    ]
    assert not same(both.latents[:1], pipe("red", seed=1, guidance_scale=7.0, negative_prompt="small").latents)


def test_the_shipped_model_draws_in_a_batch_what_it_draws_alone(shipped_bundle: Path) -> None:
    """A real network; bit for bit, as ONNX Runtime computes every row alike with its own copies of the weights."""
    prompts, seeds, scales = ["a red circle", "a large blue square above a small red circle"], [1, 2], [3.0, 7.0]
    with Pipeline.open(shipped_bundle, threads=1, memory="fast", plans=["default"]) as pipe:
        both = pipe(prompts, seed=seeds, guidance_scale=scales)
        for j in range(2):
            alone = pipe(prompts[j], seed=seeds[j], guidance_scale=scales[j])
            assert same(both.latents[j : j + 1], alone.latents)
            assert both.images[j].tobytes() == alone.images[0].tobytes()


def test_image_j_of_seed_s_is_that_of_seed_s_plus_j(pipe: Pipeline) -> None:
    result = pipe(PROMPT, seed=40, num_images=6)
    assert result.seeds == (40, 41, 42, 43, 44, 45)
    for j in range(6):
        assert same(result.latents[j : j + 1], pipe(PROMPT, seed=40 + j).latents)
        assert close(result.latents[j], reference(pipe, PROMPT, None, seed=40 + j))


def test_seeds_may_be_any_and_alike(pipe: Pipeline) -> None:
    result = pipe(PROMPT, seed=[9, 3, 9], num_images=3)
    assert result.seeds == (9, 3, 9)
    assert same(result.latents[0], result.latents[2])
    assert same(result.latents[1:2], pipe(PROMPT, seed=3).latents)


def test_four_images_are_one_batch(pipe: Pipeline, called: collections.Counter[str]) -> None:
    pipe(PROMPT, seed=1, num_images=4)
    steps = pipe.session.manifest.plan("default").steps
    assert called == {
        "text.onnx": 1,
        "decoder.onnx": 4,
        **collections.Counter(f"{step.graph}.onnx" for step in steps),
    }
    called.clear()
    pipe(["red", "blue"], seed=1, num_images=3)
    assert called["text.onnx"] == 2
    assert called["full.onnx"] == 2 * sum(step.graph == "full" for step in steps), "four and two"


@pytest.mark.parametrize(
    ("batches", "calls"),
    [
        (((1, 1),), [1] * 7),
        (((1, 4),), [4, 3]),
        (((2, 3),), [3, 3, 2]),
        (((4, 4),), [4, 4]),
        (((1, 1), (3, 4)), [4, 3]),
        (((1, 2), (5, 6)), [6, 1]),
    ],
)
def test_a_request_is_cut_into_what_calls_may_have(
    pipe: Pipeline, tmp_path: Path, batches: tuple[tuple[int, int], ...], calls: list[int]
) -> None:
    """Seven images; where a call may have no fewer, the last one is filled up."""
    seen: list[int] = []
    with Pipeline.open(build(tmp_path / "toy", Toy(batches=batches)), threads=1) as other:
        result = other(PROMPT, seed=3, num_images=7, on_step=lambda progress: seen.append(len(progress.step.rows)))
    assert seen == [rows for rows in calls for _ in range(8)]
    assert len(result.images) == 7
    for j in range(7):
        assert close(result.latents[j], reference(pipe, PROMPT, None, seed=3 + j))


def test_six_images_in_calls_of_one_and_three_to_four(several: Pipeline) -> None:
    seen: list[Progress] = []
    result = several(PROMPT, seed=5, num_images=6, on_step=seen.append)
    assert [len(p.step.rows) for p in seen] == [4] * 8 + [1] * 16
    assert [p.done for p in seen] == list(range(1, 25))
    assert {p.total for p in seen} == {24}
    for j in range(6):
        assert same(result.latents[j : j + 1], several(PROMPT, seed=5 + j).latents)


def test_several_prompts_with_negatives_of_their_own(pipe: Pipeline) -> None:
    prompts, negatives = ["red", "blue square"], ["small", None]
    result = pipe(prompts, seed=2, negative_prompt=negatives, num_images=3, guidance_scale=[2, 3, 4, 5, 6, 7])
    for j in range(6):
        expected = reference(pipe, prompts[j // 3], negatives[j // 3], seed=2 + j, guidance=2 + j)
        assert close(result.latents[j], expected)


def test_each_text_is_encoded_once(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    encode = TextEncoder.encode

    def watched(self: TextEncoder, prompt: str) -> EncodedText:
        seen.append(prompt)
        return encode(self, prompt)

    monkeypatch.setattr(TextEncoder, "encode", watched)
    pipe(["red", "blue", "red"], seed=1, negative_prompt="blue", num_images=5)
    assert seen == ["red", "blue"]


# --- sizes --------------------------------------------------------------------------------------


def test_a_size_picks_its_graphs(several: Pipeline, called: collections.Counter[str]) -> None:
    wide = several(PROMPT, seed=3, size="8x2")
    assert all("-8x2" in name for name in called if name != "text.onnx")
    assert wide.latents.shape == (1, 2, 2, 8)
    assert wide.images[0].size == (8, 2)
    assert close(wide.latents[0], reference(several, PROMPT, None, seed=3, size=(8, 2)))
    called.clear()
    default = several(PROMPT, seed=3)
    assert not any("-8x2" in name for name in called)
    assert default.images[0].size == (4, 4)
    assert same(default.latents, several(PROMPT, seed=3, size="4x4").latents)


def test_a_size_that_is_not_there_is_answered_with_those_that_are(several: Pipeline) -> None:
    for size in ("2x8", "8X2", ""):
        with pytest.raises(RequestError, match="is not loaded; there is 4x4, 8x2 "):
            several(PROMPT, size=size)


# --- noise --------------------------------------------------------------------------------------


def test_initial_latents_are_noise_of_unit_variance(pipe: Pipeline) -> None:
    start = np.stack([noise(9, LATENTS)])
    assert same(pipe(PROMPT, seed=1, initial_latents=start).latents, pipe(PROMPT, seed=9).latents)


def test_a_generator_draws_the_initial_latents(pipe: Pipeline) -> None:
    drawn = np.stack([noise(seed, LATENTS, generator="torch-cuda") for seed in (4, 5)])
    result = pipe(PROMPT, seed=4, num_images=2, generator="torch-cuda")
    assert same(result.latents, pipe(PROMPT, seed=4, num_images=2, initial_latents=drawn).latents)
    assert not same(result.latents, pipe(PROMPT, seed=4, num_images=2).latents)
    with pytest.raises(RequestError, match="there is no generator 'torch'; use one of numpy, torch-cuda"):
        pipe(PROMPT, generator="torch")


@pytest.mark.parametrize("generator", ["numpy", "torch-cuda"])
def test_steps_draw_from_each_images_seed(tmp_path: Path, generator: str) -> None:
    """Two images in a batch of a stochastic sampler, each against the reference with its own noise."""
    toy = Toy()
    with Pipeline.open(build(tmp_path / "toy", toy), threads=1) as pipe:
        graphs = pipe.session.shapes()[0].graphs
        plan = make_plan("noisy", Settings(steps=6, gate=4, warm_up=0), toy, graphs, own_sampler=sampler(6, noise=0.3))
        result = pipe(PROMPT, seed=[8, 3], num_images=2, plan=plan, generator=generator)
        for j, seed in enumerate((8, 3)):
            rows = {f"{name}.positive": values for name, values in text(PROMPT).items()}
            rows |= {f"{name}.negative": np.zeros_like(values) for name, values in text(PROMPT).items()}
            rows |= {f"time_ids.{half}": np.array([TIME_IDS]) for half in ("positive", "negative")}

            def drawn(step: int, seed: int = seed) -> NDArray[Any]:
                return noise(seed, LATENTS, draw=in_step(step), generator=generator)[None]

            start = noise(seed, LATENTS, generator=generator)[None]
            states = toy_model.trajectory(
                toy_model.weights(), plan.sampler, start, rows, 3.0, m=4, warm_up=0, step_noise=drawn
            )
            assert close(result.latents[j], states[-1][0])
            assert same(result.latents[j : j + 1], pipe(PROMPT, seed=seed, plan=plan, generator=generator).latents)


# --- plans --------------------------------------------------------------------------------------


def test_a_plan_by_its_name(pipe: Pipeline) -> None:
    seen: list[Progress] = []
    pipe(PROMPT, seed=1, plan="fast", on_step=seen.append)
    assert len(seen) == 3
    with pytest.raises(BundleError, match="has no plan 'slow'; it has default, fast"):
        pipe(PROMPT, plan="slow")
    with Pipeline.open(pipe.session.bundle, plans=["fast"], threads=1) as one:
        one(PROMPT, seed=1, plan="fast")
        with pytest.raises(EngineError, match=r"reuse_self\.onnx is not loaded"):
            one(PROMPT, seed=1)


def test_a_plan_itself_and_a_plan_file(pipe: Pipeline, tmp_path: Path) -> None:
    """One that the bundle does not list."""
    plan = make_plan("own", Settings(steps=4, gate=3), Toy(), pipe.session.shapes()[0].graphs)
    file = tmp_path / "own.json"
    file.write_text(json.dumps(plan.to_json()))
    seen: list[Progress] = []
    latents = pipe(PROMPT, seed=1, plan=plan, on_step=seen.append).latents
    assert len(seen) == 4
    assert same(latents, pipe(PROMPT, seed=1, plan=file).latents)
    assert same(latents, pipe(PROMPT, seed=1, plan=str(file)).latents)
    by_name = pipe.session.manifest.plan("fast")
    assert same(pipe(PROMPT, seed=1, plan=by_name).latents, pipe(PROMPT, seed=1, plan="fast").latents)
    with pytest.raises(PlanError, match="there is no such plan file"):
        pipe(PROMPT, plan=tmp_path / "other.json")


def test_a_plan_that_does_not_fit_the_bundle(pipe: Pipeline) -> None:
    plan = pipe.session.manifest.plan("default")
    broken = replace(plan, steps=tuple(replace(step, writes=()) for step in plan.steps))
    seen: list[Progress] = []
    with pytest.raises(PlanError, match="which no earlier step writes"):
        pipe(PROMPT, plan=broken, on_step=seen.append)
    assert seen == []


def test_no_guidance_scale_is_the_plans(pipe: Pipeline) -> None:
    plan = replace(pipe.session.manifest.plan("default"), guidance_scale=6.0)
    assert same(pipe(PROMPT, seed=1, plan=plan).latents, pipe(PROMPT, seed=1, guidance_scale=6.0).latents)


# --- many at once, and stopping -----------------------------------------------------------------


def test_progress_and_stopping(pipe: Pipeline) -> None:
    seen: list[Progress] = []
    pipe(PROMPT, seed=1, num_images=6, on_step=seen.append)
    assert [p.done for p in seen] == list(range(1, 17))
    assert {p.total for p in seen} == {16}

    def stop(progress: Progress) -> None:
        seen.append(progress)
        raise KeyboardInterrupt

    seen.clear()
    with pytest.raises(KeyboardInterrupt):
        pipe(PROMPT, seed=1, on_step=stop)
    assert len(seen) == 1


def test_eight_requests_at_once_equal_one_by_one(pipe: Pipeline) -> None:
    def request(seed: int) -> NDArray[np.float32]:
        return pipe(f"{PROMPT} {WORDS[4 + seed % 4]}", seed=seed, num_images=2, negative_prompt="small").latents

    alone = [request(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for latents, expected in zip(pool.map(request, range(8)), alone, strict=True):
            assert same(latents, expected)


class Counted:
    """An engine, and how often it was asked for a buffer or a call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = 0
        for owner, name in ((OrtCpu, "allocate"), (OrtExecutable, "bind")):
            monkeypatch.setattr(owner, name, self._counting(getattr(owner, name)))

    def _counting(self, method: Any) -> Any:
        def counted(*arguments: Any) -> Any:
            self.made += 1
            return method(*arguments)

        return counted

    def during(self, work: Callable[[], object]) -> int:
        before = self.made
        work()
        return self.made - before


@pytest.fixture
def own(pipe: Pipeline) -> Iterator[Pipeline]:
    """A pipeline that nothing was asked of."""
    with Pipeline.open(pipe.session.bundle, threads=1, memory="fast") as opened:
        yield opened


def test_the_second_request_allocates_and_binds_nothing(own: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU every call that is bound is a graph to be captured, three runs of the network each."""
    counted = Counted(monkeypatch)
    plan = own.session.manifest.plan("default")
    assert counted.during(lambda: own(PROMPT, seed=1)) > 0
    for again in (
        {},
        {"seed": 2, "negative_prompt": "red", "guidance_scale": 5.0},
        {"size": "4x4"},
        {"plan": plan},
        {"plan": replace(plan)},
        {"generator": "torch-cuda"},
    ):
        request = {"prompt": "blue", "seed": 1, **again}
        assert counted.during(lambda request=request: own(**request)) == 0, again  # type: ignore[misc]
    assert counted.during(lambda: own(PROMPT, seed=1, plan="fast")) > 0
    assert counted.during(lambda: own(PROMPT, seed=1, num_images=3)) > 0, "another batch"
    own.session.trim()
    assert counted.during(lambda: own(PROMPT, seed=1)) > 0


def test_a_request_that_was_stopped_gives_its_state_back(own: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = own(PROMPT, seed=1).latents
    counted = Counted(monkeypatch)

    def stop(progress: Progress) -> None:
        if progress.done == 3:
            raise KeyboardInterrupt

    def stopped() -> None:
        with pytest.raises(KeyboardInterrupt):
            own(PROMPT, seed=2, on_step=stop)

    assert counted.during(stopped) == 0
    assert counted.during(lambda: same(own(PROMPT, seed=1).latents, expected) or pytest.fail("another picture")) == 0


def test_as_many_states_as_requests_at_once(own: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[State] = []

    def making(*arguments: Any, **more: Any) -> State:
        made.append(State(*arguments, **more))
        return made[-1]

    monkeypatch.setattr(pipeline, "State", making)
    for count in (2, 2, 3, 3, 1):
        everyone = threading.Barrier(count)

        def wait(progress: Progress, everyone: threading.Barrier = everyone) -> None:
            if progress.done == 2:
                everyone.wait()

        with ThreadPoolExecutor(count) as pool:
            list(pool.map(lambda seed: own(PROMPT, seed=seed, on_step=wait), range(count)))
    assert len(made) == 3


def test_a_state_whose_engine_failed_is_not_used_again(own: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = own(PROMPT, seed=1).latents
    counted, broken = Counted(monkeypatch), [False, True]
    working = _OrtCall.__call__

    def call(self: Any) -> None:
        if self._graph == "full.onnx" and broken and broken.pop():
            raise EngineError("out of memory")
        working(self)

    monkeypatch.setattr(_OrtCall, "__call__", call)
    with pytest.raises(EngineError, match="out of memory"):
        own(PROMPT, seed=1)
    assert counted.during(lambda: same(own(PROMPT, seed=1).latents, expected) or pytest.fail("another picture")) > 0


# --- prompts ------------------------------------------------------------------------------------


def test_an_empty_prompt_is_a_prompt(pipe: Pipeline) -> None:
    assert close(pipe("", seed=0).latents[0], reference(pipe, "", None, seed=0))


def test_a_long_prompt_is_cut_and_the_warning_quotes_it(pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    long = "A large red circle above a  small Blue, square"
    with caplog.at_level(logging.WARNING, "tgate"):
        cut = pipe([long, long], seed=[1, 2]).latents
    (record,) = caplog.records
    assert record.getMessage() == 'the prompt is longer than the model takes; left out: "small Blue, square"'
    assert same(cut, pipe(["a large red circle above a"] * 2, seed=[1, 2]).latents)
    caplog.clear()
    pipe("a large red circle above a", seed=1)
    assert not caplog.records


@pytest.mark.parametrize("prompt", ["🟥🔵", "\x00", "a\nb\tc", "x" * 10_000, "<s> </s> <pad>", "  "])
def test_any_text_is_a_prompt(pipe: Pipeline, prompt: str) -> None:
    assert np.isfinite(pipe(prompt, seed=1).latents).all()


def embeddings(prompt: str) -> dict[str, NDArray[Any]]:
    """What the prompt conditions, as the command line writes it."""
    positive = text(prompt)
    return {f"{name}.positive": values for name, values in positive.items()} | {
        f"{name}.negative": np.zeros_like(values) for name, values in positive.items()
    }


def test_embeddings_stand_for_prompts(pipe: Pipeline, called: collections.Counter[str]) -> None:
    both = {name: np.concatenate([embeddings("red")[name], embeddings("blue")[name]]) for name in embeddings("red")}
    result = pipe(prompt_embeds=both, seed=1, num_images=2)
    assert "text.onnx" not in called
    assert result.seeds == (1, 2, 3, 4)
    expected = pipe(["red", "blue"], seed=1, num_images=2).latents
    np.testing.assert_allclose(result.latents, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"prompt": "\ud800"}, "must be text in valid Unicode"),
        ({"prompt": 3}, "must be a text or a list of texts"),
        ({"prompt": [3]}, r"must be a text or a list of texts, got \[3\]"),
        ({"prompt": []}, r"must be a text or a list of texts, got \[\]"),
        ({"prompt": None}, "is conditioned by a prompt: give prompt, or prompt_embeds, and nothing else; got neither"),
        ({"prompt_embeds": {}}, "and nothing else; got prompt and prompt_embeds"),
        ({"prompt": None, "prompt_embeds": {}}, r"the embeddings lack text\.negative"),
        ({"prompt": None, "prompt_embeds": {}, "negative_prompt": "a"}, "hold the negative half already"),
        ({"negative_prompt": 3}, "the negative prompt must be a text"),
        ({"negative_prompt": ["a", "b"]}, "got 1 prompts and 2 negative prompts"),
        ({"seed": -1}, "got -1"),
        ({"seed": 2**63}, "a seed is a whole number"),
        ({"seed": 2**63 - 1, "num_images": 2}, "image j of a request has the seed s \\+ j, which must be below"),
        ({"seed": [1, 2]}, "got 2 seeds for 1 images; give one for each, or one to count on from"),
        ({"seed": [0.5]}, r"got 0\.5"),
        ({"num_images": 0}, "at least 1, got 0"),
        ({"num_images": 1.5}, r"at least 1, got 1\.5"),
        ({"guidance_scale": 1.0}, r"takes a scale above 1, got 1\.0; export with --guidance-scale 1"),
        ({"guidance_scale": [3.0, 4.0]}, "got 2 guidance scales for 1 images; give one for each, or one"),
        ({"guidance_scale": [1.0]}, "takes a scale above 1"),
        ({"guidance_scale": float("nan")}, "must be finite, got nan"),
        ({"initial_latents": np.zeros((2, *LATENTS), np.float32)}, r"shape \[1, 2, 4, 4\].*of shape \[2, 2, 4, 4\]"),
        ({"initial_latents": np.full((1, *LATENTS), np.nan, np.float32)}, "32 of 32 values are not finite"),
        ({"num_images": 10**10}, r"10000000000 images of 4x4 in one request take \d+ bytes each"),
        ({"num_images": 10**400}, r"a whole number of 1329 bits images of 4x4 in one request"),
        ({"num_images": True}, "at least 1, got True"),
        ({"seed": 10**400}, "a seed is a whole number .* got a whole number of 1329 bits"),
        ({"guidance_scale": 10**400}, "must be finite, got a whole number of 1329 bits"),
        ({"guidance_scale": 1e30}, r"must be finite, got 1e\+30; at most 1000000 is taken"),
        ({"guidance_scale": "\x1b[2J"}, r"must be a number, got str \\x1b\[2J"),
        ({"prompt": "a" * 10**5}, "the prompt has 100000 characters, at most 32768 are read"),
        ({"negative_prompt": "a" * 10**5}, "the prompt has 100000 characters, at most 32768 are read"),
        ({"prompt": "\ud800"}, r"valid Unicode, got '\\ud800'"),
    ],
)
def test_requests_that_cannot_be_served(pipe: Pipeline, arguments: dict[str, Any], says: str) -> None:
    steps: list[Progress] = []
    with pytest.raises(RequestError, match=says):
        pipe(**{"prompt": PROMPT, "on_step": steps.append, **arguments})
    assert steps == []


def embeds(rows: int = 1, **changes: NDArray[Any]) -> dict[str, NDArray[Any]]:
    shapes = {"text": (rows, LENGTH, 4), "pooled": (rows, 4)}
    halves = {f"{n}.{half}": np.ones(s, np.float32) for n, s in shapes.items() for half in ("negative", "positive")}
    return halves | {name.replace("_", "."): values for name, values in changes.items()}


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({}, "the embeddings lack text.negative"),
        (embeds(0), r"for as many images each, got \[0\]"),
        (embeds(2, pooled_positive=np.ones((3, 4), np.float32)), r"for as many images each, got \[2, 3\]"),
        (
            embeds(text_positive=np.full((1, LENGTH, 4), np.inf, np.float32)),
            r"text\.positive must be finite .*32",
        ),
        (embeds(text_positive=np.ones((1, LENGTH, 4), np.int32)), r"text\.positive must be float32, got int32"),
    ],
    ids=range(5),
)
def test_embeddings_that_cannot_be_served(pipe: Pipeline, tensors: Any, says: str) -> None:
    steps: list[Progress] = []
    with pytest.raises(RequestError, match=says):
        pipe(prompt_embeds=tensors, on_step=steps.append)
    assert steps == []


def test_a_foreign_tensor_among_embeddings_asks_for_no_more_images(pipe: Pipeline) -> None:
    result = pipe(prompt_embeds=embeds(2, foreign=np.ones((50, 3), np.float32)), seed=1)
    assert len(result.images) == 2


def test_latents_that_are_not_finite_are_no_picture(pipe: Pipeline) -> None:
    """What comes in is finite, and not what it becomes: told with its image and its plan; the next request is drawn as
    ever."""
    start = np.ones((3, *LATENTS), np.float32)
    start[1] = 2.5e38
    says = r"^the latents of image 1 after step 7, the last of plan 'default': \d+ of 32 values are not finite; "
    with pytest.raises(EngineError, match=says):
        pipe(PROMPT, seed=1, num_images=3, initial_latents=start)
    assert close(pipe(PROMPT, seed=1).latents[0], reference(pipe, PROMPT, None, seed=1))


def test_latents_that_overflow_where_they_begin_are_refused(pipe: Pipeline) -> None:
    steps: list[Progress] = []
    with pytest.raises(RequestError, match="the initial latents must be finite numbers in float32; 32 of 32"):
        pipe(PROMPT, initial_latents=np.full((1, *LATENTS), 3e38, np.float32), on_step=steps.append)
    assert steps == []


# --- models that a picture conditions, and videos ------------------------------------------------


def test_a_picture_conditions_each_image_with_noise_of_its_seed(tmp_path: Path) -> None:
    """The reference's, from the picture's numbers to the last step; and an image of a batch is what it is alone."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    with Pipeline.open(build(tmp_path / "toy", Toy(pictured=True)), threads=1, memory="fast") as pipe:
        result = pipe(image=Image.fromarray(pixels), seed=[5, 8], num_images=2)
        assert result.seeds == (5, 8)
        plan = pipe.session.manifest.plan("default")
        for j, seed in enumerate((5, 8)):
            added = noise(seed, (1, 3, 4, 4), draw=CONDITIONING)[0]
            numbers = (pixels.transpose(2, 0, 1) / 255 + 0.1 * added).ravel()
            own = {"text": numbers[:32].reshape(1, 8, 4), "pooled": numbers[-4:][np.newaxis]}
            rows = {f"{name}.positive": values for name, values in own.items()}
            rows |= {f"{name}.negative": np.zeros_like(values) for name, values in own.items()}
            rows |= {f"time_ids.{half}": np.array([TIME_IDS]) for half in ("positive", "negative")}
            start = noise(seed, LATENTS)[np.newaxis]
            states = toy_model.trajectory(toy_model.weights(), plan.sampler, start, rows, 3.0, m=5, k=2)
            assert close(result.latents[j], states[-1][0])
            assert same(result.latents[j : j + 1], pipe(image=Image.fromarray(pixels), seed=seed).latents)
        wrong: list[dict[str, Any]] = [{"prompt": PROMPT}, {}, {"image": Image.fromarray(pixels), "prompt": PROMPT}]
        for arguments in wrong:
            with pytest.raises(RequestError, match="is conditioned by an image: give image, or prompt_embeds, and"):
                pipe(**arguments)
        with pytest.raises(RequestError, match="conditioned by an image and takes no negative prompt"):
            pipe(image=Image.fromarray(pixels), negative_prompt="blue")


def test_a_prompt_and_a_picture_together(tmp_path: Path) -> None:
    """The reference's: the text is the prompt's, what is pooled the picture's in both halves. Embeddings may bring the
    text, and without an image encoder both."""
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), np.uint8)
    image, path = Image.fromarray(pixels), build(tmp_path / "toy", Toy(sees=True), goldens=False)
    pooled = (pixels.transpose(2, 0, 1).ravel()[-4:] / 255)[np.newaxis].astype(np.float32)
    with Pipeline.open(path, threads=1) as pipe:
        given: dict[str, Any] = {"image": image, "seed": 5}
        result = pipe([PROMPT, "green"], num_images=2, **given)
        texts = {text: TextEncoder(pipe.session).encode(text).tensors["text"] for text in (PROMPT, "green", "blue")}
        plan = pipe.session.manifest.plan("default")
        for j, prompt in enumerate((PROMPT, PROMPT, "green", "green")):
            rows = {"text.positive": texts[prompt], "text.negative": np.zeros_like(texts[prompt])}
            rows |= {f"pooled.{half}": pooled for half in ("positive", "negative")}
            rows |= {f"time_ids.{half}": np.array([TIME_IDS]) for half in ("positive", "negative")}
            start = noise(5 + j, LATENTS)[np.newaxis]
            states = toy_model.trajectory(toy_model.weights(), plan.sampler, start, rows, 3.0, m=5, k=2)
            assert close(result.latents[j], states[-1][0])
            assert set(result.records[j].given) == {"image"}
        embeds = {"text.positive": texts[PROMPT], "text.negative": texts["blue"]}
        wanted = pipe(PROMPT, negative_prompt="blue", **given).latents
        assert same(pipe(prompt_embeds=embeds, **given).latents, wanted)
        assert not close(pipe(PROMPT, image=Image.new("RGB", (4, 4)), seed=5).latents[0], result.latents[0])
        wrong: list[tuple[dict[str, Any], str]] = [
            ({"prompt": PROMPT}, "give image, and prompt or prompt_embeds beside it; got prompt"),
            ({"image": image}, "give image, and prompt or prompt_embeds beside it; got image"),
            ({}, "got neither"),
            ({"prompt": PROMPT, "prompt_embeds": embeds, "image": image}, "got prompt and prompt_embeds and image"),
            ({"prompt_embeds": embeds}, "is conditioned by a prompt and an image: give image"),
            ({"prompt_embeds": embeds, "negative_prompt": "x", "image": image}, "hold the negative half already"),
            ({"prompt": PROMPT, "image": image, "strength": 0.5}, "strength would change nothing"),
            ({"prompt": PROMPT, "image": image, "mask": image}, "mask would change nothing"),
        ]
        for arguments, said in wrong:
            with pytest.raises(RequestError, match=said):
                pipe(**arguments)
    edit_manifest(path, lambda d: [shape["graphs"].pop("image") for shape in d["shapes"]])
    with Pipeline.open(path, threads=1) as pipe:
        whole = {**embeds, **{f"pooled.{half}": pooled for half in ("positive", "negative")}}
        assert same(pipe(prompt_embeds=whole, seed=5).latents, wanted)
        with pytest.raises(RequestError, match=r"the embeddings lack pooled\.negative, pooled\.positive"):
            pipe(prompt_embeds=embeds)
        for arguments in ({"prompt": PROMPT}, {"prompt_embeds": whole, "image": image}, {"image": image}):
            with pytest.raises(RequestError, match=r"no image encoder .* give prompt_embeds that hold what both"):
                pipe(**arguments)


def test_videos_are_lists_of_frames(tmp_path: Path) -> None:
    path = build(tmp_path / "toy")
    edit_manifest(path, lambda d: d.update(frames=2, fps=8))
    with Pipeline.open(path, threads=1) as pipe:
        result = pipe(PROMPT, seed=1, num_images=2)
    assert result.images == []
    assert [[frame.size for frame in video] for video in result.videos] == [[(4, 4)], [(4, 4)]]


def test_a_picture_is_for_models_that_take_one(pipe: Pipeline) -> None:
    with pytest.raises(RequestError, match="give prompt, or prompt_embeds, and nothing else; got image"):
        pipe(image=Image.new("RGB", (4, 4)))


def test_plans_are_hashed_by_what_they_do(pipe: Pipeline) -> None:
    """A plan of a file is the same kind of request as that of the bundle, and waits in the same place."""
    plan = pipe.session.manifest.plan("default")
    assert hash(Plan.from_json(plan.to_json())) == hash(plan)
