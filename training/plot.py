"""Draws a denoiser's training curve from its CSV log as a small PNG."""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from training.settings import MODELS

_SMOOTHING = 5


def _smooth(values: list[float]) -> list[float]:
    """Trailing mean over `_SMOOTHING` rows of the log."""
    windows = (values[max(0, end - _SMOOTHING) : end] for end in range(1, len(values) + 1))
    return [sum(window) / len(window) for window in windows]


def draw(log: Path, picture: Path) -> None:
    """Plot the mean squared error of the noise against the step; close-ups and whole pictures apart."""
    with log.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    figure, axes = plt.subplots(figsize=(7, 3.2), dpi=100)
    for flag, label in (("1", "close-ups, 8x8 latents"), ("0", "whole pictures, 16x16 latents")):
        part = [row for row in rows if row["close_ups"] == flag]
        if not part:
            continue
        steps, errors = [int(row["step"]) for row in part], [float(row["mse"]) for row in part]
        (line,) = axes.plot(steps, errors, alpha=0.25, linewidth=1)
        axes.plot(steps, _smooth(errors), color=line.get_color(), label=label)
    axes.set(xlabel="step", ylabel="MSE of the predicted noise", yscale="log")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="mini-sdxl")
    parser.add_argument("--work", type=Path, default=Path(".cache/training"), help="folder of the log")
    parser.add_argument("--out", type=Path, required=True, help="PNG to write")
    arguments = parser.parse_args()
    draw(arguments.work / f"{arguments.model}.csv", arguments.out)


if __name__ == "__main__":
    main()
