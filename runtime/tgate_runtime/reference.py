"""A picture beside the prompt: what an IP-Adapter makes of it, and how much of that is added."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tgate_engine.errors import RequestError, shown
from tgate_engine.graph import REFERENCE, GraphSpec
from tgate_engine.manifest import Manifest
from tgate_runtime.finite import check_computed
from tgate_runtime.graph_call import GraphCall
from tgate_runtime.picture import MOST_PIXELS, decoded
from tgate_runtime.session import Session
from tgate_runtime.signatures import PICTURE

SCALE = 1.0
"""Of a request that has a picture and names none, as in diffusers."""
LEAST_SCALE, MOST_SCALE = 1e-3, 10.0
"""Less changes nothing that float16 holds; what is usual is 0.3 to 1."""


def reference_scale_of(scale: object, manifest: Manifest, image: object) -> float | None:
    """The scale of a request with such a picture; None for one without.

    Raises :class:`RequestError` for a bundle without an IP-Adapter, for a scale that is none, and for one that would
    change nothing.
    """
    if image is None:
        if scale is not None:
            raise RequestError(
                "ip_adapter_scale would change nothing: it is for requests with an ip_adapter_image; leave it out, or "
                "give one"
            )
        return None
    if manifest.graph(REFERENCE) is None:
        raise RequestError(
            "the bundle has no IP-Adapter, and takes no ip_adapter_image; export it again with --ip-adapter"
        )
    if scale is None:
        return SCALE
    number = isinstance(scale, (int, float, np.integer, np.floating)) and not isinstance(scale, bool)
    if not number or not LEAST_SCALE <= float(scale) <= MOST_SCALE:  # type: ignore[arg-type]
        raise RequestError(
            f"the IP-Adapter's scale is how much of the picture is added to the prompt, from {LEAST_SCALE:g} to "
            f"{MOST_SCALE:g}, got {shown(scale)}; without the picture nothing is"
        )
    return float(scale)  # type: ignore[arg-type]


def fit_reference(image: Image.Image, graph: GraphSpec) -> Image.Image:
    """``image`` as the reference graph takes it: RGB as :func:`~tgate_runtime.picture.as_rgb` makes it, its shorter
    side resized (bicubic) to the graph's and the middle of the longer one taken, as CLIP's pictures are prepared.

    Raises :class:`RequestError` as ``as_rgb`` does, and for a picture so long that it would not fit into memory.
    """
    spec = next(tensor for tensor in graph.inputs if tensor.name == PICTURE)
    side = spec.resolve(1)[1]
    picture = decoded(image)
    short, long = min(picture.size), max(picture.size)
    reached = side * long // short
    if side * reached > MOST_PIXELS:
        raise RequestError(
            f"the picture of {picture.width} x {picture.height} pixels is {long // short} times as long as it is wide; "
            "crop it to what is meant, the middle is all that is seen"
        )
    sizes = (side, reached) if picture.width <= picture.height else (reached, side)
    picture = picture.resize(sizes, Image.Resampling.BICUBIC)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.crop((left, top, left + side, top + side))


def encode_reference(session: Session, graph: GraphSpec, image: Image.Image) -> Mapping[str, NDArray[Any]]:
    """Run the reference graph once: ``<name>.<half>`` to [1, ...], in the graph's storage dtype. Thread-safe.

    Raises as :func:`fit_reference` does, and :class:`~tgate_engine.errors.EngineError` where what the graph gives is
    not finite.
    """
    pixels = np.asarray(fit_reference(image, graph), np.uint8)[np.newaxis]
    with GraphCall.borrow(session, graph) as encoder:
        encoder.inputs[PICTURE].write(pixels)
        encoder()
        encoded = {name: buffer.read() for name, buffer in encoder.outputs.items()}
        for name, buffer in encoder.outputs.items():
            check_computed(encoded[name], f"the IP-Adapter's {name} of this picture", dtype=buffer.dtype)
        return encoded
