"""What a request asks for is checked before any step is taken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.toy_bundle import Toy, build
from tgate_engine.bundle import Bundle
from tgate_engine.errors import RequestError
from tgate_engine.graph import DECODE
from tgate_engine.manifest import Manifest
from tgate_runtime import request
from tgate_runtime.generators import SEED_LIMIT, noise
from tgate_runtime.request import check_count, check_latents, check_prompts, check_room, decoder_of, scales_of, seeds_of


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    return Bundle.open(build(tmp_path_factory.mktemp("request") / "toy", Toy())).manifest


def test_one_seed_counts_on_and_a_list_is_taken_as_it_is() -> None:
    assert seeds_of(7, 3) == (7, 8, 9)
    assert seeds_of([5, 5], 2) == (5, 5)
    first, second = seeds_of(None, 2)
    assert second == first + 1
    assert seeds_of(SEED_LIMIT - 2, 2) == (SEED_LIMIT - 2, SEED_LIMIT - 1)


@pytest.mark.parametrize(
    ("seed", "count", "words"),
    [
        ([1], 2, "got 1 seeds for 2 images"),
        (SEED_LIMIT - 1, 2, "s \\+ j, which must be below"),
        (-1, 1, "got -1"),
        ([1, 2.5], 2, "got 2.5"),
        (True, 1, "got True"),
    ],
)
def test_seeds_that_cannot_be(seed: Any, count: int, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        seeds_of(seed, count)


def test_one_guidance_scale_for_all_or_one_for_each(manifest: Manifest) -> None:
    plan = manifest.plan("default")
    assert scales_of(None, 2, plan, manifest) == [plan.guidance_scale] * 2
    assert scales_of(4, 2, plan, manifest) == [4.0, 4.0]
    assert scales_of([3, 7.0], 2, plan, manifest) == [3.0, 7.0]


@pytest.mark.parametrize(
    ("scale", "words"),
    [
        ([3.0], "got 1 guidance scales for 2 images"),
        ("4", "must be a number, got str 4"),
        (float("nan"), "must be finite"),
        (1e39, "must be finite"),
        ([3.0, 0.5], "takes a scale above 1, got 0.5"),
    ],
)
def test_guidance_that_cannot_be(manifest: Manifest, scale: Any, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        scales_of(scale, 2, manifest.plan("default"), manifest)


def test_a_bundle_without_guidance_takes_no_scale_above_1(manifest: Manifest) -> None:
    plain = replace(manifest, guidance="none")
    assert scales_of(1.0, 1, plain.plan("default"), plain) == [1.0]
    with pytest.raises(RequestError, match="exported without guidance"):
        scales_of(3.0, 1, plain.plan("default"), plain)


def test_prompts_and_as_many_negative_prompts() -> None:
    assert check_prompts("a", None) == (["a"], [None])
    assert check_prompts(["a", "b"], "c") == (["a", "b"], ["c", "c"])
    assert check_prompts(("a", "b"), ["c", None]) == (["a", "b"], ["c", None])
    for prompt, negative in (([], None), ([1], None), (None, None), ("a", [1]), (["a", "b"], ["c"])):
        with pytest.raises(RequestError):
            check_prompts(prompt, negative)  # type: ignore[arg-type]


def test_counts_latents_and_embeddings() -> None:
    assert check_count(3) == 3
    for count in (0, -1, True, 1.5, "2"):
        with pytest.raises(RequestError, match="at least 1"):
            check_count(count)  # type: ignore[arg-type]
    latents = np.zeros((2, 4, 8, 8), np.float32)
    assert check_latents(latents, (2, 4, 8, 8)) is latents
    for odd in (latents.astype(np.float64), latents[:1], [0.0], latents + np.nan):
        with pytest.raises(RequestError, match="initial latents must be float32 of shape \\[2, 4, 8, 8\\]"):
            check_latents(odd, (2, 4, 8, 8))  # type: ignore[arg-type]


ABSURD = [
    10**400,
    -(10**400),
    2**63,
    2**64,
    10**5000,
    float("nan"),
    float("inf"),
    -float("inf"),
    True,
    np.True_,
    "x" * 10**6,
]
ABSURD += [None, b"1", [], [[1]], {}, object(), 1j, np.float64("nan"), np.zeros(3), np.array("a"), "\x1b[2J\n"]


@pytest.mark.parametrize("value", ABSURD, ids=range(len(ABSURD)))
def test_whatever_stands_for_a_number_ends_in_one_short_line(manifest: Manifest, value: Any) -> None:
    plan, shape = manifest.plan("default"), manifest.shapes[0]
    calls: list[Any] = [
        lambda: check_room(check_count(value), shape, 1),
        lambda: seeds_of([value], 1),
        lambda: noise(1, (1,), generator=value),
    ]
    if value is not None:  # which stands for what is usual
        calls.append(lambda: scales_of([value], 1, plan, manifest))
    if not isinstance(value, str):
        calls.append(lambda: check_prompts([value], None))
    if value is not None and not isinstance(value, str):
        calls.append(lambda: check_prompts("a", [value]))
    if value is not None and not isinstance(value, list):
        calls.append(lambda: seeds_of(value, 1))
    for call in calls:
        with pytest.raises(RequestError) as caught:
            call()
        line = str(caught.value)
        assert len(line) < 400
        assert line.isprintable()


def test_numbers_of_numpy_are_numbers(manifest: Manifest) -> None:
    plan = manifest.plan("default")
    assert check_count(np.int64(3)) == 3  # type: ignore[arg-type]
    assert seeds_of(np.uint64(7), 2) == (7, 8)  # type: ignore[arg-type]
    assert scales_of(np.float32(4), 1, plan, manifest) == [4.0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("decoder", "says"),
    [
        (
            "preview",
            r"the bundle has no small decoder \(--preview-decoder\); export it again with one, or take decoder",
        ),
        ("full", r"the bundle has no decoder \(--components\); export it with one, or leave decoder out"),
        ("taesd", "a decoder is one of full, preview, got str taesd"),
        (1, "a decoder is one of full, preview, got int 1"),
    ],
)
def test_decoders_that_are_not_there(manifest: Manifest, decoder: Any, says: str) -> None:
    (shape,) = manifest.shapes
    graphs = {name: graph for name, graph in shape.graphs.items() if graph.role != DECODE}
    without = replace(manifest, shapes=(replace(shape, graphs=graphs),))
    assert decoder_of(None, without) == decoder_of(None, manifest) == decoder_of("full", manifest) == DECODE
    with pytest.raises(RequestError, match=says):
        decoder_of(decoder, without)


def test_more_images_than_the_machine_can_hold_are_refused(manifest: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 x 4 pixels: 2 * 128 bytes of noise and latents, 48 of a picture, 1024 around them."""
    shape = manifest.shapes[0]
    monkeypatch.setattr(request, "_memory_bytes", lambda: 10 * 1328 + 1)
    check_room(10, shape, 1)
    for count, frames in ((11, 1), (10, 2), (10**9, 1), (10**400, 1)):
        with pytest.raises(
            RequestError, match=r"images of 4x4 in one request take 13\d\d bytes each.*has room for \d+;"
        ):
            check_room(count, shape, frames)


def test_this_machine_does_not_hold_ten_to_the_tenth(manifest: Manifest) -> None:
    with pytest.raises(RequestError, match="10000000000 images of 4x4"):
        check_room(10**10, manifest.shapes[0], 1)
