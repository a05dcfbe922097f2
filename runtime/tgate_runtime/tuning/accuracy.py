"""What the embedded models' judge says of a picture: whether it shows the coloured shapes that its caption names.

The judge is a small network of convolutions, trained on renders alone (training/classifier.py). It is worked out in
NumPy, a few milliseconds a picture, so that it judges alike whatever engine draws.
"""

from __future__ import annotations

import functools
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from safetensors.numpy import load_file

from tgate_engine.errors import RequestError, shown
from tgate_engine.manifest import Manifest
from tgate_runtime.mini import MODELS, is_embedded
from tgate_runtime.tuning.quality import Metric, Pixels, psnr

WEIGHTS = MODELS / "judge.safetensors"
COLOURS = ("red", "yellow", "green", "blue", "purple", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
"""What there is to be seen, in the order in which the judge speaks of them."""
SIDE = 128
"""Pixels of the only pictures that it knows."""

BESIDE = ("first_object", "right", "ungated_right", "psnr")
"""What is told beside "accuracy"."""

_OBJECT = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")
_STRIDES = {0: 2, 3: 2, 6: 1, 9: 2, 12: 1, 15: 1}
"""Of the convolutions that a normalisation follows, by their number in the trunk."""
_EPSILON = 1e-5
_UNSEEN = 0.025
"""How likely it may be that a loss was there and no picture showed it: one end of an interval at 95 %."""


def accuracy(manifest: Manifest, size: str, prompts: Sequence[str]) -> Metric:
    """The metric "accuracy": of each picture 100 where all objects of its prompt are seen and some were not in the
    ungated one, -100 the other way round, and 0 where both are right or both wrong. Its mean is a difference in points.
    Beside it, "first_object" is the same of the object that the prompt names first; "right" and "ungated_right" are the
    shares themselves, in percent; and "psnr" is how near the pictures are.

    Raises :class:`RequestError` for a bundle that is of no embedded model, for another ``size`` than the judge knows,
    and for a prompt that names no coloured shape.
    """
    if not is_embedded(manifest.model):
        raise RequestError(
            f"accuracy is judged by what knows the embedded models' pictures, and the bundle is of "
            f"{shown(manifest.model, 40)}; take psnr, ssim or clip"
        )
    if size != f"{SIDE}x{SIDE}":
        raise RequestError(f"the judge of accuracy knows pictures of {SIDE}x{SIDE}, not of {size}; name that --size")
    for prompt in prompts:
        named(prompt)
    judge = hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    return Metric(name="accuracy", compare=_compare, beside=BESIDE, judge=judge)


def named(prompt: str) -> list[int]:
    """The places in :data:`PAIRS` of what a prompt names, in its order. Raises :class:`RequestError` for nothing."""
    found = [PAIRS.index((match[1], match[2])) for match in _OBJECT.finditer(prompt)]
    if not found:
        raise RequestError(
            f'the judge of accuracy looks for coloured shapes, and a prompt names none: "{shown(prompt, 80)}"; write '
            f'"a red circle", of {", ".join(COLOURS)} and {", ".join(SHAPES)}'
        )
    return found


def least_images(points: float) -> int:
    """Of how many pictures none may be worse before it is known, at 95 %, that fewer than ``points`` in 100 are."""
    return math.ceil(math.log(_UNSEEN) / math.log1p(-min(abs(points), 99.0) / 100))


def logits(pictures: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Float32 [N, 42] of uint8 [N, 128, 128, 3]: above 0 where a picture is judged to show that of :data:`PAIRS`."""
    weights = _weights(WEIGHTS)
    x = pictures.astype(np.float32) / np.float32(127.5) - np.float32(1)
    for number, stride in _STRIDES.items():
        x = _convolved(x, weights[f"trunk.{number}.weight"], stride=stride)
        norm = f"trunk.{number + 1}"
        scale = weights[f"{norm}.weight"] / np.sqrt(weights[f"{norm}.running_var"] + np.float32(_EPSILON))
        x = np.maximum((x - weights[f"{norm}.running_mean"]) * scale + weights[f"{norm}.bias"], 0)
    x = np.maximum(_convolved(x, weights["trunk.18.weight"], dilation=2) + weights["trunk.18.bias"], 0)
    places = x.reshape(len(x), -1, x.shape[-1]) @ weights["places.weight"][:, :, 0, 0].T
    best: NDArray[np.float32] = places.max(axis=1) + weights["places.bias"]
    return best


def _compare(
    pictures: Sequence[Pixels], references: Sequence[Pixels], prompts: Sequence[str]
) -> dict[str, list[float]]:
    ours, theirs = (logits(np.stack(each)) > 0 for each in (pictures, references))
    objects = [named(prompt) for prompt in prompts]
    first = [
        100.0 * (float(own[i[0]]) - float(other[i[0]])) for own, other, i in zip(ours, theirs, objects, strict=True)
    ]
    right, before = (
        [100.0 * float(each[i].all()) for each, i in zip(seen, objects, strict=True)] for seen in (ours, theirs)
    )
    return {
        "accuracy": [own - other for own, other in zip(right, before, strict=True)],
        "first_object": first,
        "right": right,
        "ungated_right": before,
        "psnr": [psnr(*pair) for pair in zip(pictures, references, strict=True)],
    }


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
