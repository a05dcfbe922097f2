"""What conditions the denoiser, for both halves of guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tgate_engine.manifest import Manifest

Text = Mapping[str, NDArray[Any]]
"""The text graph's outputs for one prompt: name to [1, ...]."""


def halves(manifest: Manifest, positive: Text, negative: Text | None) -> dict[str, NDArray[Any]]:
    """``<name>.<half>`` to [1, ...] for one image. ``negative`` None stands for zeros in place of a text.

    A constant is the same in both halves. Without guidance there is a positive half only. Pure.
    """
    rows: dict[str, NDArray[Any]] = {}
    for tensor in manifest.conditioning:
        if tensor.source == "constant":
            here = nowhere = np.array([tensor.value], np.float32)
        else:
            here = positive[tensor.name]
            nowhere = np.zeros_like(here) if negative is None else negative[tensor.name]
        rows[f"{tensor.name}.positive"] = here
        if manifest.guided:
            rows[f"{tensor.name}.negative"] = nowhere
    return rows


def batch_rows(rows: NDArray[Any], batch: int) -> NDArray[Any]:
    """``rows`` [n, ...] as [batch, ...]: the last row repeats where a fixed batch is larger than the request."""
    missing = batch - len(rows)
    return rows if missing == 0 else np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)])
