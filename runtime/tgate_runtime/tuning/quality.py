"""How near a picture is to another, and how surely that is known of many."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tgate_engine.errors import RequestError
from tgate_engine.plan_report import Estimate

Pixels = NDArray[np.uint8]
"""A picture [H, W, 3], or a video [F, H, W, 3]."""

ROUNDING = 1 / 12
"""The mean squared error of rounding to whole numbers: no two pictures of 8 bits are known to be nearer."""
_SSIM_WINDOW = 11
_RESAMPLES = 4000


def psnr(picture: Pixels, reference: Pixels) -> float:
    """The peak signal-to-noise ratio in dB, at most 58.9: that of :data:`ROUNDING`, which equal pictures have too."""
    error = float(np.mean((picture.astype(np.float64) - reference) ** 2))
    return 10 * float(np.log10(255**2 / max(error, ROUNDING)))


def ssim(picture: Pixels, reference: Pixels) -> float:
    """The structural similarity of Wang et al. (2004), with their Gaussian window; of a video, its frames' mean.

    At most 1, of equal pictures. Needs scikit-image. Raises :class:`RequestError` for pictures that are smaller than
    the window.
    """
    from skimage.metrics import structural_similarity

    height, width = picture.shape[-3:-1]
    if min(height, width) < _SSIM_WINDOW:
        raise RequestError(
            f"ssim looks at windows of {_SSIM_WINDOW} pixels, the pictures have {width}x{height}; take --budget psnr=…"
        )
    wang: dict[str, Any] = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    frames = zip(picture.reshape(-1, height, width, 3), reference.reshape(-1, height, width, 3), strict=True)
    return float(np.mean([structural_similarity(a, b, channel_axis=-1, data_range=255, **wang) for a, b in frames]))


def consistency(video: Pixels) -> float:
    """How near each frame of a video [F, H, W, 3] is to the next, the mean of their :func:`psnr`: less where it
    flickers, and where more moves."""
    return float(np.mean([psnr(*pair) for pair in itertools.pairwise(video)]))


METRICS: Mapping[str, Callable[[Pixels, Pixels], float]] = {"psnr": psnr, "ssim": ssim}
"""How near a picture is to another, by the name that a budget has; more is nearer."""

Compare = Callable[[Sequence[Pixels], Sequence[Pixels], Sequence[str]], Mapping[str, Sequence[float]]]
"""Pictures, the ungated ones of the same seeds and their prompts to a value for each picture, by the value's name."""


Together = Callable[[Sequence[Pixels], Sequence[Pixels]], Mapping[str, Estimate]]
"""Pictures and the ungated ones of the same seeds to what is told of them as a whole, by its name."""


@dataclass(frozen=True, kw_only=True)
class Metric:
    """What a plan's pictures are worth beside the ungated ones of the same seeds; more is better.

    ``compare`` gives the values of that ``name``, and of what is told ``beside`` it; ``together``, if there is one,
    what can be told of no picture alone, once, of the plan that is chosen. ``judge``: the SHA-256 of the
    model that looks at the pictures; empty where none does, and values say how near a picture is to the ungated one.
    Values of a judge are differences, its verdict on a picture less that on the ungated one: most of them are small or
    nothing, so that a few tell little, and plans are looked for by "psnr", which ``compare`` then gives as well.
    """

    name: str
    compare: Compare
    beside: tuple[str, ...] = ()
    together: Together | None = None
    judge: str = ""


def nearness(name: str, *, frames: int = 1) -> Metric:
    """The metric of that name in :data:`METRICS`; of videos, of several ``frames``, "consistency" is told beside it, in
    dB that a video has more of it than the ungated one."""
    video = frames > 1

    def compare(pictures: Sequence[Pixels], references: Sequence[Pixels], _: Sequence[str]) -> dict[str, list[float]]:
        pairs = list(zip(pictures, references, strict=True))
        values = {name: [METRICS[name](*pair) for pair in pairs]}
        if video:
            values["consistency"] = [consistency(own) - consistency(other) for own, other in pairs]
        return values

    return Metric(name=name, compare=compare, beside=("consistency",) if video else ())


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Bounds of the mean at 95 %, by the bootstrap over ``values``, whose resamples are the same each time.

    Of a single value, the value itself twice: nothing is known about others.
    """
    numbers = np.asarray(values, np.float64)
    picks = np.random.default_rng(0).integers(0, len(numbers), (_RESAMPLES, len(numbers)))
    low, high = np.percentile(numbers[picks].mean(axis=1), (2.5, 97.5))
    return float(low), float(high)
