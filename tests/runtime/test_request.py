"""What a request asks for is checked before any step is taken."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from tests.toy_bundle import Toy, build
from tgate_engine.bundle import Bundle
from tgate_engine.errors import RequestError
from tgate_engine.manifest import Manifest
from tgate_runtime.generators import SEED_LIMIT
from tgate_runtime.request import check_count, check_latents, check_prompts, rows_of, scales_of, seeds_of


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
        ("4", "must be a number, got '4'"),
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
    assert rows_of({"text.positive": np.zeros((3, 5)), "scale": np.array(1.0)}) == 3
