"""A training budget in wall-clock seconds: learning-rate schedule, CSV log and atomic checkpoints."""

from __future__ import annotations

import csv
import math
import os
import time
from pathlib import Path
from typing import Any

import torch


class Budget:
    """Counts the seconds of all runs of one training; `spent_s` includes those of earlier, resumed runs.

    `lr` warms up linearly by steps, then follows a cosine of the share of seconds spent, so a slower
    machine takes fewer steps but always ends at a learning rate of about zero.
    """

    def __init__(self, *, seconds: float, peak_lr: float, warmup_steps: int, spent_s: float = 0.0) -> None:
        if seconds <= 0:
            raise ValueError(f"a budget of {seconds} s trains nothing; give a positive number of seconds")
        self.seconds = seconds
        self._peak_lr = peak_lr
        self._warmup_steps = warmup_steps
        self._started = time.monotonic() - spent_s

    @property
    def spent_s(self) -> float:
        return time.monotonic() - self._started

    def lr(self, step: int, spent_s: float) -> float:
        """The rate of `step`; `spent_s` is passed in because all workers must agree on it."""
        warm = min(1.0, (step + 1) / self._warmup_steps)
        share = min(1.0, spent_s / self.seconds)
        return self._peak_lr * warm * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * share)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr


def append_row(path: Path, row: dict[str, float]) -> None:
    """Append one line to a CSV, writing the header first when the file is new."""
    new = not path.exists()
    with path.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, fieldnames=list(row))
        if new:
            writer.writeheader()
        writer.writerow(row)


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write `state` beside `path`, then rename over it, so that an interrupted save keeps the old file."""
    partial = path.with_name(path.name + ".partial")
    torch.save(state, partial)
    os.replace(partial, path)
