"""What conditions the denoiser, from encoders or from tensors that were encoded ahead of time."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tgate_engine.conditioning import BESIDE, Tensors, half_names, halves
from tgate_engine.dtypes import encode, storage
from tgate_engine.errors import RequestError
from tgate_engine.graph import DENOISE, TensorSpec
from tgate_engine.manifest import Manifest, Shape
from tgate_runtime.finite import check_given
from tgate_runtime.request import check_mapping, shown_names
from tgate_runtime.session import Session


def conditioning_of(
    session: Session, positive: Tensors, negative: Tensors | None, *, size: str | None = None
) -> dict[str, NDArray[Any]]:
    """``<name>.<half>`` to [1, ...] of one image at a size, from what the text or image graph gave; what the other one
    gives is not among them. ``negative`` None stands for zeros in place of a text; a reference picture's are zeros.
    Pure."""
    manifest, shape = session.manifest, session.shapes(size)[0]
    made = [c for c in manifest.conditioning if c.source not in ("text", "image") or c.name in positive]
    rows = halves(made, shape.constants, positive, negative, guided=manifest.guided)
    return {**rows, **_without_reference(manifest, shape, 1)}


def from_embeddings(
    session: Session, tensors: Tensors, *, size: str | None = None, pictured: bool = False
) -> dict[str, NDArray[Any]]:
    """``<name>.<half>`` to [N, ...] from tensors that were encoded ahead of time, such as ``tgate embed`` writes.

    ``pictured``, and what is raised: as in :func:`check_embeddings`.
    """
    return check_embeddings(tensors, session.manifest, session.shapes(size)[0], pictured=pictured)


def check_embeddings(
    tensors: Tensors, manifest: Manifest, shape: Shape, *, pictured: bool = False
) -> dict[str, NDArray[Any]]:
    """``<name>.<half>`` to [N, ...] from tensors that were encoded ahead of time, for the graphs of a shape.

    ``pictured``: a request's image brings what the image graph gives, which is then neither wanted nor among them.
    Constants are added, and zeros for what a reference picture would add. Raises :class:`RequestError` for what is
    missing, has another shape or dtype than the graphs take, or is not finite.
    """
    check_mapping(tensors, "embeddings")
    specs = _inputs(manifest, shape)
    brought = {c.name for c in manifest.conditioning if pictured and c.source == "image"}
    encoded = {c.name for c in manifest.conditioning if c.source not in ("constant", *BESIDE)} - brought
    beside = _without_reference(manifest, shape, 1)
    needed = {name: spec for name, spec in specs.items() if name.rpartition(".")[0] in encoded}
    if missing := [name for name in needed if name not in tensors]:
        raise RequestError(
            f"the embeddings lack {', '.join(missing)} (they have {shown_names(tensors)}); make them with "
            "`tgate embed` for this model"
        )
    if odd := [name for name in needed if not isinstance(tensors[name], (np.ndarray, np.generic))]:
        raise RequestError(f"the embeddings' {odd[0]} must be a NumPy array, got {type(tensors[odd[0]]).__name__}")
    counts = {len(tensors[name]) for name in needed if tensors[name].ndim}
    if len(counts) != 1 or 0 in counts:
        raise RequestError(
            f"the embeddings' tensors must be for as many images each, got {sorted(counts)}, wanted is one number "
            "of at least 1"
        )
    for name, spec in needed.items():
        if tensors[name].shape[1:] != spec.shape[1:]:
            raise RequestError(
                f"the embeddings' {name} must have shape [N, {', '.join(map(str, spec.shape[1:]))}], got "
                f"{list(tensors[name].shape)}; make them with `tgate embed` for this model"
            )
    numbers = {name: _numbers(tensors[name], spec, f"the embeddings' {name}") for name, spec in needed.items()}
    count = counts.pop()
    constants = {
        name: np.tile(np.array([shape.constants[name.rpartition(".")[0]]], np.float32), (count, 1))
        for name in specs
        if name not in needed and name not in beside and name.rpartition(".")[0] not in brought
    }
    return {**numbers, **constants, **_without_reference(manifest, shape, count)}


def rows_of(embeds: Tensors, manifest: Manifest) -> int:
    """The prompts that embeddings are for, by the tensors that the bundle takes; whether these agree is checked later.
    Others in the file do not count."""
    if not isinstance(embeds, Mapping):  # which is told later as well
        return 0
    taken = {name for name in half_names(manifest.conditioning) if name in embeds and np.ndim(embeds[name])}
    return max((len(embeds[name]) for name in taken), default=0)


def conditioning_inputs(session: Session, *, size: str | None = None) -> Mapping[str, TensorSpec]:
    """The conditioning inputs ``<name>.<half>`` of all denoising graphs of a size, by name."""
    return _inputs(session.manifest, session.shapes(size)[0])


def _inputs(manifest: Manifest, shape: Shape) -> dict[str, TensorSpec]:
    names = half_names(manifest.conditioning)
    tensors = {t.name: t for graph in shape.graphs.values() if graph.role == DENOISE for t in graph.inputs}
    return {name: tensors[name] for name in names if name in tensors}


def _without_reference(manifest: Manifest, shape: Shape, count: int) -> dict[str, NDArray[Any]]:
    """Zeros [count, ...] for what a reference picture would add, in the dtype that the graphs of a shape take."""
    beside = {c.name for c in manifest.conditioning if c.source in BESIDE}
    specs = {name: spec for name, spec in _inputs(manifest, shape).items() if name.rpartition(".")[0] in beside}
    return {name: np.zeros(spec.resolve(count), storage(spec.dtype)) for name, spec in specs.items()}


def _numbers(values: NDArray[Any], spec: TensorSpec, what: str) -> NDArray[Any]:
    """Numbers as float32, or the bits of ``spec``'s own dtype as they are; finite, also as that dtype holds them."""
    if values.dtype.kind == "f":
        with np.errstate(over="ignore"):
            values = values.astype(np.float32)
            stored = encode(values, spec.dtype)
    elif values.dtype == storage(spec.dtype):
        stored = values
    else:
        raise RequestError(f"{what} must be float32, got {values.dtype}; make them with `tgate embed` for this model")
    check_given(stored, what, dtype=spec.dtype)
    return values
