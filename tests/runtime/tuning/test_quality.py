"""Distances between pictures, and the bounds of their mean, against what is worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tgate_cli.tune_arguments import MOST_QUALITY
from tgate_engine.errors import RequestError
from tgate_runtime.tuning.quality import METRICS, consistency, interval, nearness, psnr


def picture(value: int, side: int = 16) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.full((side, side, 3), value, np.uint8)


def test_psnr_by_hand() -> None:
    assert psnr(picture(10), picture(15)) == pytest.approx(20 * math.log10(255 / 5))
    assert psnr(picture(255), picture(0)) == pytest.approx(0)  # and no difference of bytes that wraps


def test_equal_pictures_are_as_near_as_a_budget_may_ask() -> None:
    assert psnr(picture(7), picture(7)) == pytest.approx(10 * math.log10(255**2 * 12))
    assert MOST_QUALITY["psnr"] <= psnr(picture(7), picture(7)) < MOST_QUALITY["psnr"] + 0.1
    assert MOST_QUALITY.keys() == METRICS.keys()


def test_ssim_of_pictures_and_videos() -> None:
    pytest.importorskip("skimage")
    ssim, rng = METRICS["ssim"], np.random.default_rng(0)
    one = rng.integers(0, 256, (16, 16, 3), np.uint8)
    other = np.clip(one.astype(int) + rng.integers(-60, 60, one.shape), 0, 255).astype(np.uint8)
    assert ssim(one, one) == pytest.approx(1.0)
    # Of constants, contrast and structure are 1 and luminance is what Wang et al. define.
    c1 = (0.01 * 255) ** 2
    assert ssim(picture(100), picture(50)) == pytest.approx((2 * 100 * 50 + c1) / (100**2 + 50**2 + c1), abs=1e-6)
    assert 0 < ssim(one, other) < 1
    assert ssim(np.stack([one, one]), np.stack([one, other])) == pytest.approx((1 + ssim(one, other)) / 2)
    with pytest.raises(RequestError, match="windows of 11 pixels, the pictures have 4x4"):
        ssim(picture(1, 4), picture(1, 4))


def test_a_video_is_as_consistent_as_its_frames_are_near_to_each_other() -> None:
    still, jumping = (np.stack([picture(value) for value in values]) for values in ((9, 9, 9), (10, 15, 10)))
    assert consistency(jumping) == pytest.approx(20 * math.log10(255 / 5))
    metric = nearness("psnr", frames=3)
    told = metric.compare([jumping], [still], ["a"])
    assert told["consistency"] == pytest.approx([20 * math.log10(255 / 5) - 10 * math.log10(255**2 * 12)])
    assert set(told) == {metric.name, *metric.beside}
    assert nearness("psnr").beside == ()
    assert list(nearness("psnr").compare([still], [still], ["a"])) == ["psnr"]


def test_bounds_are_those_of_a_mean() -> None:
    values = np.random.default_rng(1).normal(30, 2, 400)
    low, high = interval(values.tolist())
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1 * half)
    assert interval(values.tolist()) == (low, high)  # the same each time
    assert interval([3.0]) == (3.0, 3.0)
