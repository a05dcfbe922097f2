"""From prompts to pictures, on the toy bundle."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests import toy_model
from tests.toy_bundle import Toy, build, edit_manifest
from tests.toy_model import LATENTS, LENGTH, TIME_IDS, WORDS
from tgate_engine.errors import BundleError, EngineError, RequestError
from tgate_engine.schedule import Schedule
from tgate_runtime import pipeline
from tgate_runtime.backends.ort import OrtCpu, OrtExecutable, _OrtCall
from tgate_runtime.binding import Binding
from tgate_runtime.noise import noise
from tgate_runtime.pipeline import Pipeline, Progress
from tgate_runtime.session import Session
from tgate_runtime.text import Encoded, TextEncoder

PROMPT = "a large red circle"
SCHEDULES = {"default": Schedule(steps=8, gate=5, self_interval=2), "fast": Schedule(steps=3, gate=2)}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    path = build(tmp_path_factory.mktemp("pipeline") / "toy", Toy(schedules=SCHEDULES))
    with Pipeline.open(path, threads=1) as opened:
        yield opened


def ids(prompt: str, pad: int) -> list[int]:
    """What the tokenizers must give, without them."""
    words = [WORDS.index(w) if w in WORDS else WORDS.index("<unk>") for w in prompt.lower().split()]
    found = [WORDS.index("<s>"), *words[: LENGTH - 2], WORDS.index("</s>")]
    return found + [pad] * (LENGTH - len(found))


def text(prompt: str) -> dict[str, NDArray[Any]]:
    w = toy_model.weights()
    return {"text": w["embed.0"][ids(prompt, 0)][None], "pooled": w["embed.1"][ids(prompt, 2)].mean(axis=0)[None]}


def reference(
    pipe: Pipeline, prompt: str, negative: str | None, *, seed: int, image: int = 0, guidance: float = 3.0
) -> NDArray[Any]:
    """Final latents [C, h, w] of image ``image``, from the prompt's words to the last step, in float64."""
    positive, plan = text(prompt), pipe.session.manifest.plan("default")
    minus = text(negative or "")
    if negative is None and pipe.session.manifest.zero_negative:
        minus = {name: np.zeros_like(values) for name, values in minus.items()}
    rows: dict[str, NDArray[Any]] = {}
    for half, tensors in (("positive", positive), ("negative", minus)):
        rows |= {f"{name}.{half}": values for name, values in tensors.items()}
        rows[f"time_ids.{half}"] = np.array([TIME_IDS])
    start = noise(seed, image, LATENTS)[None]
    guided = pipe.session.manifest.guided
    return toy_model.trajectory(toy_model.weights(), plan.sampler, start, rows, guidance, guided=guided, m=5, k=2)[-1][
        0
    ]


def close(got: NDArray[Any], want: NDArray[Any]) -> bool:
    return float(np.abs(got - want).max()) < 2e-6 * float(np.abs(want).max())


@pytest.mark.parametrize("negative", [None, "", "a small blue square"])
@pytest.mark.parametrize("seed", [0, 7])
def test_a_picture_from_its_prompt(pipe: Pipeline, seed: int, negative: str | None) -> None:
    result = pipe(PROMPT, seed=seed, negative_prompt=negative, guidance_scale=4.5)
    assert close(result.latents[0], reference(pipe, PROMPT, negative, seed=seed, guidance=4.5))
    assert result.seed == seed
    assert result.latents.dtype == np.float32
    w = toy_model.weights()["image"]
    want = np.clip(result.latents[0].transpose(1, 2, 0).astype(np.float64) @ w * 60 + 127.5, 0, 255)
    (image,) = result.images
    assert (image.mode, image.size) == ("RGB", (LATENTS[2], LATENTS[1]))
    assert np.abs(np.asarray(image) - want).max() <= 1.01


def test_no_negative_prompt_is_the_empty_one_where_the_model_says_so(tmp_path: Path) -> None:
    with Pipeline.open(build(tmp_path / "toy", Toy(zero_negative=False)), threads=1) as pipe:
        none = pipe(PROMPT, seed=1).latents
        np.testing.assert_array_equal(none, pipe(PROMPT, seed=1, negative_prompt="").latents)
        assert close(none[0], reference(pipe, PROMPT, None, seed=1))


def test_without_guidance(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Pipeline.open(build(tmp_path / "toy", Toy(guided=False)), threads=1) as pipe:
        assert close(pipe(PROMPT, seed=1).latents[0], reference(pipe, PROMPT, None, seed=1))
        pipe(PROMPT, seed=1, guidance_scale=1.0)
        with pytest.raises(RequestError, match=r"without guidance and takes no scale above 1, got 3\.0"):
            pipe(PROMPT, guidance_scale=3.0)
        pipe(PROMPT, seed=1, negative_prompt="blue")
        assert "the negative prompt is not used" in caplog.text


def test_the_same_seed_is_the_same_picture(pipe: Pipeline) -> None:
    a, b, c = (pipe(PROMPT, seed=s).latents for s in (0, 0, 1))
    np.testing.assert_array_equal(a, b)
    assert not np.array_equal(a, c)


def test_no_seed_draws_one_and_reports_it(pipe: Pipeline) -> None:
    first = pipe(PROMPT)
    assert pipe(PROMPT).seed != first.seed
    np.testing.assert_array_equal(pipe(PROMPT, seed=first.seed).latents, first.latents)


@pytest.mark.parametrize("batch", [(1, 1), (1, 4), (2, 3), (4, 4)])
def test_an_image_is_the_same_in_every_batch(pipe: Pipeline, tmp_path: Path, batch: tuple[int, int]) -> None:
    """Seven images in chunks of the bundle's size, the last one padded where it must be."""
    with Pipeline.open(build(tmp_path / "toy", Toy(batch=batch)), threads=1) as other:
        result = other(PROMPT, seed=3, num_images=7)
    assert len(result.images) == 7
    for j in range(7):
        assert close(result.latents[j], reference(pipe, PROMPT, None, seed=3, image=j))


def test_several_prompts_with_negatives_of_their_own(pipe: Pipeline) -> None:
    prompts, negatives = ["red", "blue square"], ["small", None]
    result = pipe(prompts, seed=2, negative_prompt=negatives, num_images=3)
    for j in range(6):
        want = reference(pipe, prompts[j // 3], negatives[j // 3], seed=2, image=j)
        assert close(result.latents[j], want)


def test_each_text_is_encoded_once(pipe: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    encode = TextEncoder.encode

    def watched(self: TextEncoder, prompt: str) -> Encoded:
        seen.append(prompt)
        return encode(self, prompt)

    monkeypatch.setattr(TextEncoder, "encode", watched)
    pipe(["red", "blue", "red"], seed=1, negative_prompt="blue", num_images=5)
    assert seen == ["red", "blue"]


def test_given_latents_are_noise_of_unit_variance(pipe: Pipeline) -> None:
    start = np.stack([noise(9, 0, LATENTS)])
    np.testing.assert_array_equal(pipe(PROMPT, seed=1, initial_latents=start).latents, pipe(PROMPT, seed=9).latents)


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
        for got, want in zip(pool.map(request, range(8)), alone, strict=True):
            np.testing.assert_array_equal(got, want)


class Counted:
    """An engine, and how often it was asked for a buffer or a binding."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = 0
        for owner, name in ((OrtCpu, "allocate"), (OrtExecutable, "bind")):
            monkeypatch.setattr(owner, name, self._counting(getattr(owner, name)))

    def _counting(self, method: Any) -> Any:
        def counted(*arguments: Any) -> Any:
            self.made += 1
            return method(*arguments)

        return counted

    def during(self, work: Any) -> int:
        before = self.made
        work()
        return self.made - before


def test_the_second_request_allocates_and_binds_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU every binding is a graph to be captured, three runs of the network each."""
    with Pipeline.open(build(tmp_path / "toy", Toy(schedules=SCHEDULES, batch=(1, 4))), threads=1) as own:
        counted = Counted(monkeypatch)

        def stopped() -> None:
            def stop(progress: Progress) -> None:
                raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                own(PROMPT, seed=1, on_step=stop)

        def several(count: int) -> None:
            with ThreadPoolExecutor(count) as pool:
                everyone = threading.Barrier(count)
                waits = [lambda p: everyone.wait() if p.done == 2 else None] * count
                list(pool.map(lambda wait: own(PROMPT, seed=1, on_step=wait), waits))

        assert counted.during(lambda: own(PROMPT, seed=1)) > 0
        assert counted.during(lambda: own("blue", seed=2, negative_prompt="red", num_images=1)) == 0
        assert counted.during(stopped) == 0
        assert counted.during(lambda: own(PROMPT, seed=1)) == 0, "a request that was stopped gives its binding back"
        assert counted.during(lambda: own(PROMPT, seed=1, plan="fast")) > 0
        assert counted.during(lambda: own(PROMPT, seed=1, num_images=3)) > 0, "another batch"
        made: list[Binding] = []

        def making(*arguments: Any) -> Binding:
            made.append(Binding(*arguments))
            return made[-1]

        monkeypatch.setattr(pipeline, "Binding", making)
        for _ in range(3):
            several(3)
            assert len(made) == 2, "two more than were there, once and for all"
        own.session.trim()
        assert counted.during(lambda: own(PROMPT, seed=1)) > 0


def test_a_binding_whose_engine_failed_is_not_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Pipeline.open(build(tmp_path / "toy", Toy(schedules=SCHEDULES)), threads=1) as own:
        want = own(PROMPT, seed=1).latents
        counted, broken = Counted(monkeypatch), [True]

        def call(self: Any) -> None:
            if broken:
                broken.pop()
                raise EngineError("out of memory")
            working(self)

        working = _OrtCall.__call__
        monkeypatch.setattr(_OrtCall, "__call__", call)
        with pytest.raises(EngineError, match="out of memory"):
            own(PROMPT, seed=1)
        assert counted.during(lambda: np.testing.assert_array_equal(own(PROMPT, seed=1).latents, want)) > 0


def test_other_plans(pipe: Pipeline) -> None:
    seen: list[Progress] = []
    pipe(PROMPT, seed=1, plan="fast", on_step=seen.append)
    assert len(seen) == 3
    with pytest.raises(BundleError, match="has no plan 'slow'; it has default, fast"):
        pipe(PROMPT, plan="slow")
    with Pipeline.open(pipe.session.bundle, plans=["fast"], threads=1) as one:
        one(PROMPT, seed=1, plan="fast")
        with pytest.raises(EngineError, match=r"'reuse_self' is not loaded"):
            one(PROMPT, seed=1)


# --- prompts ------------------------------------------------------------------------------------


def test_an_empty_prompt_is_a_prompt(pipe: Pipeline) -> None:
    assert close(pipe("", seed=0).latents[0], reference(pipe, "", None, seed=0))


def test_a_long_prompt_is_cut_and_the_warning_quotes_it(pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    long = "A large red circle above a  small Blue, square"
    with caplog.at_level(logging.WARNING, "tgate"):
        cut = pipe(long, seed=1).latents
    (record,) = caplog.records
    assert record.getMessage().endswith('left out: "small Blue, square"')
    np.testing.assert_array_equal(cut, pipe("a large red circle above a", seed=1).latents)
    caplog.clear()
    pipe("a large red circle above a", seed=1)
    assert not caplog.records


def test_a_cut_counts_letters_not_bytes(pipe: Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    pipe("ä ö ü ß é 円 红 blau", seed=1)
    assert 'left out: "红 blau"' in caplog.text


@pytest.mark.parametrize("prompt", ["🟥🔵", "\x00", "a\nb\tc", "x" * 10_000, "<s> </s> <pad>", "  "])
def test_any_text_is_a_prompt(pipe: Pipeline, prompt: str) -> None:
    assert np.isfinite(pipe(prompt, seed=1).latents).all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"prompt": "\ud800"}, "must be text in valid Unicode"),
        ({"prompt": 3}, "must be a text or a list of texts"),
        ({"prompt": [3]}, r"must be a text or a list of texts, got \[3\]"),
        ({"prompt": []}, r"must be a text or a list of texts, got \[\]"),
        ({"negative_prompt": 3}, "the negative prompt must be a text"),
        ({"negative_prompt": ["a", "b"]}, "got 1 prompts and 2 negative prompts"),
        ({"seed": -1}, "got -1"),
        ({"seed": 2**63}, "a seed is a whole number"),
        ({"seed": 0.5}, r"got 0\.5"),
        ({"num_images": 0}, "at least 1, got 0"),
        ({"num_images": 1.5}, r"at least 1, got 1\.5"),
        ({"num_images": True}, "at least 1, got True"),
        ({"guidance_scale": 1.0}, r"takes a scale above 1, got 1\.0; export with --guidance-scale 1"),
        ({"guidance_scale": -3}, "takes a scale above 1, got -3"),
        ({"guidance_scale": float("nan")}, "must be finite, got nan"),
        ({"guidance_scale": float("inf")}, "must be finite, got inf"),
        ({"guidance_scale": 1e39}, r"must be finite, got 1e\+39"),
        ({"guidance_scale": "5"}, "must be a number, got '5'"),
        ({"initial_latents": np.zeros((2, *LATENTS), np.float32)}, r"shape \[1, 2, 4, 4\].*of shape \[2, 2, 4, 4\]"),
        ({"initial_latents": np.zeros((1, *LATENTS))}, "must be float32 .*; got float64"),
        ({"initial_latents": np.full((1, *LATENTS), np.nan, np.float32)}, "not finite"),
        ({"initial_latents": [1.0]}, "got list"),
    ],
)
def test_requests_that_cannot_be_served(pipe: Pipeline, arguments: dict[str, Any], says: str) -> None:
    steps: list[Progress] = []
    with pytest.raises(RequestError, match=says):
        pipe(**{"prompt": PROMPT, "on_step": steps.append, **arguments})
    assert steps == []


# --- bundles that are not what they say ---------------------------------------------------------


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (lambda d: d["tokenizers"][0].update(input="words"), r"'text' takes ids\.0, which nothing feeds"),
        (lambda d: d["conditioning"][0].update(name="words"), "does not give words"),
        (lambda d: d.update(text="decoder", decoder="text"), "which nothing feeds"),
        (lambda d: d["tokenizers"][0].update(file="full.onnx"), "is not a tokenizer"),
    ],
)
def test_a_bundle_that_is_not_what_it_says_fails_when_opened(tmp_path: Path, edit: Any, says: str) -> None:
    path = build(tmp_path / "toy")
    edit_manifest(path, edit)
    with pytest.raises(BundleError, match=says) as error:
        Pipeline.open(path)
    assert "\n" not in str(error.value)


def test_a_damaged_graph_fails_when_opened(tmp_path: Path) -> None:
    path = build(tmp_path / "toy")
    (path / "full.onnx").write_bytes(b"x" * (path / "full.onnx").stat().st_size)
    with pytest.raises(BundleError, match=r"full\.onnx has SHA-256"):
        Session.open(path)
    with pytest.raises(EngineError, match=r"cannot load full\.onnx"):
        Session.open(path, check_digests=False)
