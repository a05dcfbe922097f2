"""Noise means the same thing everywhere."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tgate_engine.errors import RequestError
from tgate_runtime.noise import CONDITIONING, INITIAL, check_seed, in_step, noise, random_seed

PINNED = {
    (0, 0): [0.059911035, 0.015559634, -1.1644385, -0.13264713],
    (0, 1): [-1.431463, 1.6707169, -0.40272397, -1.295642],
    (7, 0): [-0.293339, 1.7038306, 1.5391918, 0.63675386],
    (2**63 - 1, 3): [0.29250956, 1.9130098, -0.7764484, -0.18627855],
}


@pytest.mark.parametrize(("seed", "image"), PINNED)
def test_pinned_values(seed: int, image: int) -> None:
    got = noise(seed, image, (4,))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.array(PINNED[seed, image], np.float32))


def test_seeds_and_images_have_streams_of_their_own() -> None:
    drawn = {noise(seed, image, (8,)).tobytes() for seed in range(20) for image in range(20)}
    assert len(drawn) == 400


def test_steps_draw_noise_of_their_own() -> None:
    """Philox counters far apart: no draw is a piece of another one."""
    draws = [INITIAL, CONDITIONING, *map(in_step, range(50))]
    drawn = {noise(1, 0, (8,), draw=draw).tobytes() for draw in draws}
    assert len(drawn) == len(draws)
    np.testing.assert_array_equal(noise(1, 0, (8,)), noise(1, 0, (8,), draw=INITIAL))
    key = np.array([1, 0], np.uint64)
    other = np.random.Generator(np.random.Philox(key=key).advance((3 + 1) << 192))
    np.testing.assert_array_equal(noise(1, 0, (8,), draw=in_step(3)), other.standard_normal(8, dtype=np.float32))


def test_it_is_standard_normal() -> None:
    values = np.concatenate([noise(3, j, (4, 16, 16)).ravel() for j in range(50)])
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, 1.5, "7", None, True, np.float64(3)])
def test_what_is_no_seed(seed: Any) -> None:
    with pytest.raises(RequestError, match="a seed is a whole number from 0 to 9223372036854775807, got"):
        check_seed(seed)


@pytest.mark.parametrize("seed", [0, 2**63 - 1, np.int64(5), np.uint8(5)])
def test_what_is_a_seed(seed: Any) -> None:
    assert check_seed(seed) == int(seed)
    assert type(check_seed(seed)) is int


def test_drawn_seeds_are_seeds() -> None:
    drawn = {random_seed() for _ in range(10)}
    assert len(drawn) > 5
    assert all(check_seed(seed) == seed for seed in drawn)
