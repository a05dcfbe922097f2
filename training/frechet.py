"""The Fréchet distance of two sets of pictures over the judge's features (Heusel et al. 2017, with another network).

``python -m training.frechet`` writes what run time compares with, the moments of true renders' features.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import save_file
from scipy import linalg

from tgate_runtime.tuning.frechet import RENDERS
from training.classifier import PairClassifier, load_classifier, to_input
from training.grammar import draw_scene
from training.render import render

_AT_ONCE = 500


@torch.no_grad()
def features(judge: PairClassifier, pictures: npt.NDArray[np.uint8], batch: int = 50) -> npt.NDArray[np.float64]:
    """The judge's last features, their mean over places: float64 [N, 64] of uint8 pictures [N, H, W, 3]."""
    judge.eval()
    parts = [judge.trunk(to_input(pictures[i : i + batch])).mean(dim=(2, 3)) for i in range(0, len(pictures), batch)]
    return torch.cat(parts).double().numpy()


def frechet(first: npt.NDArray[np.float64], second: npt.NDArray[np.float64]) -> float:
    """The distance of the Gaussians that two sets of features, [N, D] and [M, D], have the moments of.

    |mean - mean|^2 + trace(C + C' - 2 (C C')^(1/2)); 0 of equal sets. It falls as N grows: compare sets of one size.
    """
    apart = first.mean(0) - second.mean(0)
    one, other = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    root = linalg.sqrtm(one @ other)
    return float(apart @ apart + np.trace(one + other - 2 * np.real(root)))


def true_renders(count: int, seed: int = 31) -> npt.NDArray[np.uint8]:
    """``count`` pictures as training draws them, uint8 [N, 128, 128, 3], of scenes that nothing else uses."""
    rng = random.Random(f"frechet-{seed}")
    return np.stack([render(draw_scene(rng)) for _ in range(count)])


def write_moments(path: Path, count: int, seed: int = 32) -> None:
    """Mean and covariance of the features of ``count`` renders, of other scenes than :func:`true_renders` draws."""
    judge, rng = load_classifier(), random.Random(f"frechet-{seed}")
    parts = []
    for first in range(0, count, _AT_ONCE):
        scenes = [draw_scene(rng) for _ in range(min(_AT_ONCE, count - first))]
        parts.append(features(judge, np.stack([render(scene) for scene in scenes])))
    described = np.concatenate(parts)
    moments = {"mean": described.mean(axis=0), "covariance": np.cov(described, rowvar=False)}
    save_file(moments, path, metadata={"renders": str(count)})


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=20_000, help="renders (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=RENDERS, help="default: %(default)s")
    asked = parser.parse_args()
    write_moments(asked.out, asked.count)
