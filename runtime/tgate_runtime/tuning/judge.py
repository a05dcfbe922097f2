"""The embedded models' judge: a small network of convolutions, trained on renders alone (training/classifier.py).

It is worked out in NumPy, a few milliseconds a picture, so that it judges alike whatever engine draws.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tgate_runtime.mini import MODELS

WEIGHTS = MODELS / "judge.safetensors"
SIDE = 128
"""Pixels of the only pictures that it knows."""

_STRIDES = {0: 2, 3: 2, 6: 1, 9: 2, 12: 1, 15: 1}
"""Of the convolutions that a normalisation follows, by their number in the trunk."""
_EPSILON = 1e-5


def digest() -> str:
    """The SHA-256 of its weights, in hex."""
    return hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()


def features(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """What it makes of each place of the picture before it says what it sees: float32 [N, h, w, 64] of uint8
    [N, 128, 128, 3]."""
    weights = _weights(WEIGHTS)
    x = pictures.astype(np.float32) / np.float32(127.5) - np.float32(1)
    for number, stride in _STRIDES.items():
        x = _convolved(x, weights[f"trunk.{number}.weight"], stride=stride)
        norm = f"trunk.{number + 1}"
        scale = weights[f"{norm}.weight"] / np.sqrt(weights[f"{norm}.running_var"] + np.float32(_EPSILON))
        x = np.maximum((x - weights[f"{norm}.running_mean"]) * scale + weights[f"{norm}.bias"], 0)
    last = _convolved(x, weights["trunk.18.weight"], dilation=2) + weights["trunk.18.bias"]
    seen: NDArray[np.float32] = np.maximum(last, 0)
    return seen


def logits(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Float32 [N, 42] of uint8 [N, 128, 128, 3]: above 0 where a picture is judged to show that coloured shape, of
    :data:`tgate_runtime.tuning.accuracy.PAIRS`."""
    weights = _weights(WEIGHTS)
    x = features(pictures)
    places = x.reshape(len(x), -1, x.shape[-1]) @ weights["places.weight"][:, :, 0, 0].T
    best: NDArray[np.float32] = places.max(axis=1) + weights["places.bias"]
    return best


def _convolved(
    x: NDArray[np.float32], weight: NDArray[np.float32], *, stride: int = 1, dilation: int = 1
) -> NDArray[np.float32]:
    """[N, H, W, C] by a kernel [O, C, 3, 3], padded with zeros as far as it reaches: [N, H, W, O] at stride 1."""
    around = (dilation, dilation)
    padded = np.pad(x, ((0, 0), around, around, (0, 0)))
    windows = sliding_window_view(padded, (2 * dilation + 1,) * 2, axis=(1, 2))
    seen = windows[:, ::stride, ::stride, :, ::dilation, ::dilation]
    rows = seen.reshape(*seen.shape[:3], -1)
    result: NDArray[np.float32] = rows @ weight.reshape(len(weight), -1).T
    return result


@functools.cache
def _weights(path: Path) -> Mapping[str, NDArray[np.float32]]:
    return {name: values.astype(np.float32) for name, values in load_file(path).items()}
