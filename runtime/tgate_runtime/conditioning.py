"""What conditions the denoiser, for both halves of guidance."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tgate_engine.errors import RequestError
from tgate_engine.manifest import Manifest, TensorSpec
from tgate_engine.plan import DENOISING_GRAPHS

Encoded = Mapping[str, NDArray[Any]]
"""Outputs of the text or the image graph for one request: name to [1, ...]."""


def halves(manifest: Manifest, positive: Encoded, negative: Encoded | None) -> dict[str, NDArray[Any]]:
    """``<name>.<half>`` to [1, ...] for one image. ``negative`` None stands for zeros in place of a text.

    Where an encoder gives ``<name>.negative`` as well, that is what a negative prompt becomes. Without guidance
    there is a positive half only. Pure.
    """
    rows: dict[str, NDArray[Any]] = {}
    for tensor in manifest.conditioning:
        here = np.array([tensor.value], np.float32) if tensor.source == "constant" else positive[tensor.name]
        rows[f"{tensor.name}.positive"] = here
        if not manifest.guided:
            continue
        if tensor.negative == "same" or tensor.source == "constant":
            rows[f"{tensor.name}.negative"] = here
        elif tensor.negative == "zeros" or negative is None:
            rows[f"{tensor.name}.negative"] = np.zeros_like(here)
        else:
            own = f"{tensor.name}.negative"
            rows[own] = negative.get(own, negative[tensor.name])
    return rows


def given(manifest: Manifest, tensors: Encoded) -> dict[str, NDArray[Any]]:
    """``<name>.<half>`` to [N, ...] from tensors that were encoded ahead of time, such as ``tgate embed`` writes.

    Constants are added. Raises :class:`RequestError` for what is missing or has another shape than the graphs take.
    """
    specs = inputs_of(manifest)
    wanted = {
        name: spec
        for c in manifest.conditioning
        if c.source != "constant"
        for half in ("negative", "positive")
        if (spec := specs.get(name := f"{c.name}.{half}")) is not None
    }
    if missing := [name for name in wanted if name not in tensors]:
        raise RequestError(
            f"the embeddings lack {', '.join(missing)} (they have {', '.join(tensors) or 'nothing'}); make them with "
            "`tgate embed` for this model"
        )
    counts = {len(tensors[name]) for name in wanted if tensors[name].ndim}
    if len(counts) != 1:
        raise RequestError(f"the embeddings' tensors must be for as many images each, got {sorted(counts)}")
    for name, spec in wanted.items():
        if tensors[name].shape[1:] != spec.shape[1:]:
            raise RequestError(
                f"the embeddings' {name} must have shape [N, {', '.join(map(str, spec.shape[1:]))}], got "
                f"{list(tensors[name].shape)}; make them with `tgate embed` for this model"
            )
    count = counts.pop()
    constants = {
        f"{c.name}.{half}": np.tile(np.array([c.value], np.float32), (count, 1))
        for c in manifest.conditioning
        if c.source == "constant"
        for half in ("negative", "positive")
    }
    values = {name: tensors[name] for name in wanted}
    floats = {name: v.astype(np.float32) if v.dtype.kind == "f" else v for name, v in values.items()}
    return {**floats, **constants}


def inputs_of(manifest: Manifest) -> dict[str, TensorSpec]:
    """The conditioning inputs ``<name>.<half>`` of all denoising graphs."""
    names = {f"{c.name}.{half}" for c in manifest.conditioning for half in ("negative", "positive")}
    return {
        tensor.name: tensor
        for graph in DENOISING_GRAPHS
        if graph in manifest.graphs
        for tensor in manifest.graphs[graph].inputs
        if tensor.name in names
    }


def batch_rows(rows: NDArray[Any], batch: int) -> NDArray[Any]:
    """``rows`` [n, ...] as [batch, ...]: the last row repeats where a fixed batch is larger than the request."""
    missing = batch - len(rows)
    return rows if missing == 0 else np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)])
