"""What the embedded models' judge says of a picture: whether it shows the coloured shapes that its caption names."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from tgate_engine.errors import RequestError, shown
from tgate_engine.manifest import Manifest
from tgate_runtime.mini import is_embedded
from tgate_runtime.tuning import frechet
from tgate_runtime.tuning.judge import SIDE, digest, logits
from tgate_runtime.tuning.quality import Metric, Pixels, psnr

COLOURS = ("red", "yellow", "green", "blue", "purple", "white", "black")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PAIRS = tuple((colour, shape) for colour in COLOURS for shape in SHAPES)
"""What there is to be seen, in the order in which the judge speaks of them."""

BESIDE = ("first_object", "right", "ungated_right", "psnr")
"""What is told beside "accuracy"."""

_OBJECT = re.compile(rf"\b({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})\b")
_UNSEEN = 0.025
"""How likely it may be that a loss was there and no picture showed it: one end of an interval at 95 %."""


def accuracy(manifest: Manifest, size: str, prompts: Sequence[str]) -> Metric:
    """The metric "accuracy": of each picture 100 where all objects of its prompt are seen and some were not in the
    ungated one, -100 the other way round, and 0 where both are right or both wrong. Its mean is a difference in points.
    Beside it, "first_object" is the same of the object that the prompt names first; "right" and "ungated_right" are the
    shares themselves, in percent; and "psnr" is how near the pictures are. Of all pictures together,
    :mod:`~tgate_runtime.tuning.frechet` tells how far they are from true renders.

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
    return Metric(name="accuracy", compare=_compare, beside=BESIDE, together=frechet.told, judge=digest())


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
