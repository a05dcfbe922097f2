"""What conditions the denoiser, from encoders or from tensors that were encoded ahead of time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tgate_engine.conditioning import Tensors, half_names, halves
from tgate_engine.errors import RequestError
from tgate_engine.graph import DENOISE, TensorSpec
from tgate_runtime.session import Session


def conditioning_of(
    session: Session, positive: Tensors, negative: Tensors | None, *, size: str | None = None
) -> dict[str, NDArray[Any]]:
    """``<name>.<half>`` to [1, ...] of one image at a size, from what the text or image graph gave. ``negative`` None
    stands for zeros in place of a text. Pure."""
    manifest, shape = session.manifest, session.shapes(size)[0]
    return halves(manifest.conditioning, shape.constants, positive, negative, guided=manifest.guided)


def from_embeddings(session: Session, tensors: Tensors, *, size: str | None = None) -> dict[str, NDArray[Any]]:
    """``<name>.<half>`` to [N, ...] from tensors that were encoded ahead of time, such as ``tgate embed`` writes.

    Constants are added. Raises :class:`RequestError` for what is missing or has another shape than the graphs take.
    """
    manifest, shape = session.manifest, session.shapes(size)[0]
    specs = conditioning_inputs(session, size=size)
    encoded = {c.name for c in manifest.conditioning if c.source != "constant"}
    needed = {name: spec for name, spec in specs.items() if name.rpartition(".")[0] in encoded}
    if missing := [name for name in needed if name not in tensors]:
        raise RequestError(
            f"the embeddings lack {', '.join(missing)} (they have {', '.join(tensors) or 'nothing'}); make them with "
            "`tgate embed` for this model"
        )
    counts = {len(tensors[name]) for name in needed if tensors[name].ndim}
    if len(counts) != 1:
        raise RequestError(f"the embeddings' tensors must be for as many images each, got {sorted(counts)}")
    for name, spec in needed.items():
        if tensors[name].shape[1:] != spec.shape[1:]:
            raise RequestError(
                f"the embeddings' {name} must have shape [N, {', '.join(map(str, spec.shape[1:]))}], got "
                f"{list(tensors[name].shape)}; make them with `tgate embed` for this model"
            )
    count = counts.pop()
    constants = {
        name: np.tile(np.array([shape.constants[name.rpartition(".")[0]]], np.float32), (count, 1))
        for name in specs
        if name not in needed
    }
    floats = {name: _as_float(tensors[name]) for name in needed}
    return {**floats, **constants}


def conditioning_inputs(session: Session, *, size: str | None = None) -> Mapping[str, TensorSpec]:
    """The conditioning inputs ``<name>.<half>`` of all denoising graphs of a size, by name."""
    names = half_names(session.manifest.conditioning)
    graphs = session.shapes(size)[0].graphs.values()
    tensors = {t.name: t for graph in graphs if graph.role == DENOISE for t in graph.inputs}
    return {name: tensors[name] for name in names if name in tensors}


def _as_float(values: NDArray[Any]) -> NDArray[Any]:
    return values.astype(np.float32) if values.dtype.kind == "f" else values
