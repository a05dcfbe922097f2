"""How far pictures are from true renders: against SciPy and the judge in PyTorch, on pictures worse by rule."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tgate_runtime.tuning import frechet
from tgate_runtime.tuning.frechet import LEAST, described, distance, told
from training.classifier import load_classifier
from training.frechet import features, true_renders, write_moments
from training.frechet import frechet as by_scipy

Pictures = list[NDArray[np.uint8]]


@pytest.fixture(scope="module")
def renders() -> Pictures:
    return list(true_renders(160))


def noisy(pictures: Pictures, deviation: float) -> Pictures:
    rng = np.random.default_rng(1)
    return [np.clip(p + rng.normal(0, deviation, p.shape), 0, 255).astype(np.uint8) for p in pictures]


def test_it_is_the_distance_of_two_gaussians(
    renders: Pictures, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The moments of 300 renders as training writes them, and the same scenes drawn here, through SciPy's root."""
    write_moments(tmp_path / "moments.safetensors", 300)
    monkeypatch.setattr(frechet, "RENDERS", tmp_path / "moments.safetensors")
    judge = load_classifier()
    others = features(judge, true_renders(300, seed=32))
    for pictures in (renders, noisy(renders, 20)):
        wanted = by_scipy(features(judge, np.stack(pictures)), others)
        assert distance(described(pictures)) == pytest.approx(wanted, rel=1e-3)


def test_true_renders_are_near_and_what_is_worse_is_farther(renders: Pictures) -> None:
    away = [distance(described(noisy(renders, deviation))) for deviation in (0, 8, 16, 32)]
    assert away == sorted(away)
    assert away[0] < 0.6 < 2 * away[0] < away[2]


def test_a_plans_pictures_are_told_beside_the_ungated_ones(renders: Pictures) -> None:
    worse = noisy(renders, 20)
    found = told(worse, renders)
    assert found["frechet"].low > 0
    assert found["frechet"].mean == pytest.approx(distance(described(worse)) - found["ungated_frechet"].mean)
    back = told(renders, worse)["frechet"]
    assert back.mean == pytest.approx(-found["frechet"].mean)
    assert back.high < 0
    same = told(renders, renders)["frechet"]
    assert (same.mean, same.low, same.high) == (0, 0, 0)


def test_bounds_hold_what_all_pictures_of_the_kind_give() -> None:
    """Of eight sets of other scenes, worse by one rule: most sets' bounds hold what all of them give in the mean."""
    sets = [list(true_renders(70, seed=100 + i)) for i in range(8)]
    found = [told(noisy(each, 12), each)["frechet"] for each in sets]
    mean = np.mean([each.mean for each in found])
    assert sum(each.low <= mean <= each.high for each in found) >= 6
    # And not because they are wide: sets differ by no less than half of what they say.
    said = np.mean([each.high - each.low for each in found]) / 3.92
    assert np.std([each.mean for each in found], ddof=1) > said / 2


def test_of_few_pictures_nothing_is_told(renders: Pictures) -> None:
    assert told(renders[: LEAST - 1], renders[: LEAST - 1]) == {}
    assert set(told(renders[:LEAST], renders[:LEAST])) == {"frechet", "ungated_frechet"}
