"""How far pictures, taken together, are from true renders: the Fréchet distance (Heusel et al. 2017) over the features
of the embedded models' judge, in the place of the network that knows photographs.

A set of pictures has a mean and a covariance of features, and so have the renders that the embedded models learn from
(`python -m training.frechet` works those out). Few pictures look farther away than many: what tells is the difference
of two sets of one size, here a plan's and the ungated one's of the same seeds. The renders are of scenes that training
draws: for prompts of another kind, pictures are far from them for that alone, gated or not.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tgate_engine.plan_report import Estimate
from tgate_runtime.mini import MODELS
from tgate_runtime.tuning.judge import features
from tgate_runtime.tuning.quality import Pixels

RENDERS = MODELS / "renders.safetensors"
"""The moments of true renders: ``mean`` float64 [64] and ``covariance`` float64 [64, 64]."""
LEAST = 65
"""Pictures that it takes: of fewer, the covariance of 64 features is not of full rank."""

_BATCH = 50
_RESAMPLES = 300
_BOUND = 1.96
"""Standard deviations on either side of the mean that hold 95 % of a normal distribution."""

Values = NDArray[np.float64]


def told(pictures: Sequence[Pixels], references: Sequence[Pixels]) -> Mapping[str, Estimate]:
    """By how much ``pictures`` are farther from true renders than ``references``, the ungated ones of the same seeds,
    as "frechet", and how far those are, as "ungated_frechet". Nothing where there are fewer than :data:`LEAST`.

    The bounds are those of a normal distribution whose deviation is that of resampled pictures, the same of both sets;
    of "ungated_frechet" alone they are about twice as wide as they need be, since what is resampled repeats itself.
    """
    if len(pictures) < LEAST:
        return {}
    own, other = described(pictures), described(references)
    rng = np.random.default_rng(0)
    picks = [rng.integers(0, len(own), len(own)) for _ in range(_RESAMPLES)]
    ungated = np.array([distance(other[pick]) for pick in picks])
    more = np.array([distance(own[pick]) for pick in picks]) - ungated
    return {
        "frechet": _estimate(distance(own) - distance(other), more),
        "ungated_frechet": _estimate(distance(other), ungated),
    }


def described(pictures: Sequence[Pixels]) -> Values:
    """The judge's features of pictures [128, 128, 3], their mean over places: [N, 64]."""
    parts = [
        features(np.stack(pictures[i : i + _BATCH])).mean(axis=(1, 2), dtype=np.float64)
        for i in range(0, len(pictures), _BATCH)
    ]
    return np.concatenate(parts)


def distance(described: Values) -> float:
    """From features [N, 64] to the renders': |m - m'|^2 + trace(C + C' - 2 (C C')^(1/2)), at least 0."""
    mean, covariance, root = _renders(RENDERS)
    apart = described.mean(axis=0) - mean
    own = np.cov(described, rowvar=False)
    # (C C')^(1/2) has the eigenvalues of (C'^(1/2) C C'^(1/2))^(1/2), which is symmetric.
    shared = np.sqrt(np.clip(np.linalg.eigvalsh(root @ own @ root), 0, None)).sum()
    return max(0.0, float(apart @ apart + np.trace(own) + np.trace(covariance) - 2 * shared))


def _estimate(value: float, resampled: Values) -> Estimate:
    reach = _BOUND * float(resampled.std(ddof=1))
    return Estimate(mean=value, low=value - reach, high=value + reach)


@functools.cache
def _renders(path: Path) -> tuple[Values, Values, Values]:
    """Their features' mean and covariance, and its square root."""
    moments = load_file(path)
    values, vectors = np.linalg.eigh(moments["covariance"])
    return moments["mean"], moments["covariance"], (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
