"""A picture as the tensors that condition the denoiser."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tgate_engine.graph import GraphSpec
from tgate_runtime.finite import check_computed
from tgate_runtime.generators import CONDITIONING, noise
from tgate_runtime.graph_call import GraphCall
from tgate_runtime.picture import decoded
from tgate_runtime.session import Session
from tgate_runtime.signatures import PICTURE, PICTURE_NOISE

log = logging.getLogger("tgate")


def fit_picture(image: Image.Image, graph: GraphSpec) -> Image.Image:
    """``image`` as the image graph takes it: see :func:`fit`."""
    spec = next(tensor for tensor in graph.inputs if tensor.name == PICTURE)
    _, height, width, _ = spec.resolve(1)
    return fit(image, width, height)


def fit(image: Image.Image, width: int, height: int) -> Image.Image:
    """``image`` of that size: RGB as :func:`~tgate_runtime.picture.as_rgb` makes it and, where it has another size,
    resized (Lanczos), with a warning in the log ``tgate``. Raises :class:`RequestError`."""
    picture = decoded(image)
    if picture.size == (width, height):
        return picture
    log.warning(
        "the picture of %d x %d pixels is resized to %d x %d, whatever its proportions; crop it first to keep them",
        *picture.size,
        width,
        height,
    )
    return picture.resize((width, height), Image.Resampling.LANCZOS)


def encode_image(
    session: Session,
    graph: GraphSpec,
    image: Image.Image,
    *,
    seed: int,
    augmentation: NDArray[np.float32] | None = None,
) -> Mapping[str, NDArray[Any]]:
    """Run the image graph once: conditioning name to [1, ...], in the graph's storage dtype. Thread-safe.

    ``image``: see :func:`fit_picture`. ``augmentation``: float32 [1, 3, H, W], the standard normal noise that the graph
    adds a little of; None draws it from ``seed``. Raises :class:`EngineError` where what the graph gives is not finite.
    """
    with GraphCall.borrow(session, graph) as encoder:
        encoder.inputs[PICTURE].write(np.asarray(fit_picture(image, graph), np.uint8)[np.newaxis])
        if (drawn := encoder.inputs.get(PICTURE_NOISE)) is not None:
            drawn.write(noise(seed, drawn.shape, draw=CONDITIONING) if augmentation is None else augmentation)
        encoder()
        encoded = {name: buffer.read() for name, buffer in encoder.outputs.items()}
        for name, buffer in encoder.outputs.items():
            check_computed(encoded[name], f"the image encoder's {name} of this picture", dtype=buffer.dtype)
        return encoded
