"""What conditions the denoiser, for both halves of guidance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tgate_engine.manifest import Conditioning
from tgate_engine.step import HALVES, half

Tensors = Mapping[str, NDArray[Any]]
"""Outputs of the text or the image graph for one request: name to [1, ...]."""

_REFERENCE = ("reference", "scale")
BESIDE = (*_REFERENCE, "masked")
"""Sources of what pictures bring in beside that which conditions a request: zeros until they do."""


def halves(
    conditioning: Sequence[Conditioning],
    constants: Mapping[str, Sequence[float]],
    positive: Tensors,
    negative: Tensors | None,
    *,
    guided: bool,
) -> dict[str, NDArray[Any]]:
    """``<name>.<half>`` to [1, ...] for one image. ``negative`` None stands for zeros in place of a text.

    ``constants``: the rows of a shape. Where an encoder gives ``<name>.negative`` as well, that is what a negative
    prompt becomes. Without guidance there is a positive half only. What a reference picture adds, or a masked one, is
    not among them (:func:`reference_halves`, :func:`masked_halves`). Pure.
    """
    rows: dict[str, NDArray[Any]] = {}
    for tensor in conditioning:
        if tensor.source in BESIDE:
            continue
        is_constant = tensor.source == "constant"
        here = np.array([constants[tensor.name]], np.float32) if is_constant else positive[tensor.name]
        rows[half(tensor.name, "positive")] = here
        if not guided:
            continue
        own = half(tensor.name, "negative")
        if tensor.negative == "same" or is_constant:
            rows[own] = here
        elif tensor.negative == "zeros" or negative is None:
            rows[own] = np.zeros_like(here)
        else:
            rows[own] = negative.get(own, negative[tensor.name])
    return rows


def reference_halves(
    conditioning: Sequence[Conditioning], encoded: Tensors, scale: float, *, guided: bool
) -> dict[str, NDArray[Any]]:
    """``<name>.<half>`` to [1, ...] of what a reference picture adds to :func:`halves`.

    ``encoded``: outputs of the reference graph, ``<name>.<half>``. ``scale``: of both halves. Pure.
    """
    rows: dict[str, NDArray[Any]] = {}
    for tensor in conditioning:
        if tensor.source not in _REFERENCE:
            continue
        for which in HALVES if guided else HALVES[1:]:
            name = half(tensor.name, which)
            rows[name] = np.array([[scale]], np.float32) if tensor.source == "scale" else encoded[name]
    return rows


def masked_halves(
    conditioning: Sequence[Conditioning], mask: NDArray[np.float32], latents: NDArray[np.float32], *, guided: bool
) -> dict[str, NDArray[Any]]:
    """``<name>.<half>`` to [1, 1 + C, h, w] of what lies around an image's mask. ``mask``: [h, w], 1 where it is drawn
    anew. ``latents``: [C, h, w], of the picture without what the mask covers. Pure."""
    row = np.concatenate([mask[np.newaxis], latents])[np.newaxis]
    names = [tensor.name for tensor in conditioning if tensor.source == "masked"]
    return {half(name, which): row for name in names for which in (HALVES if guided else HALVES[1:])}


def half_names(conditioning: Sequence[Conditioning]) -> tuple[str, ...]:
    """Every ``<name>.<half>`` that a denoising graph may take."""
    return tuple(half(c.name, which) for c in conditioning for which in ("negative", "positive"))
