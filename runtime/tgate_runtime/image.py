"""A picture as the tensors that condition the denoiser."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tgate_runtime.graph_call import GraphCall
from tgate_runtime.noise import CONDITIONING, noise
from tgate_runtime.session import Session

log = logging.getLogger("tgate")


def encode_image(
    session: Session, image: Image.Image, *, seed: int, augmentation: NDArray[np.float32] | None = None
) -> Mapping[str, NDArray[Any]]:
    """Run the image graph once: conditioning name to [1, ...], in the graph's storage dtype. Thread-safe.

    The picture is made RGB and, where it has another size, resized to the bundle's (Lanczos), with a warning in the
    log ``tgate``. ``augmentation``: float32 [1, 3, H, W], the standard normal noise that the graph adds a little of;
    None draws it from ``seed``.
    """
    manifest = session.manifest
    size = (manifest.width, manifest.height)
    picture = image.convert("RGB")
    if picture.size != size:
        log.warning(
            "the picture of %d x %d pixels is resized to %d x %d, whatever its proportions; crop it first to keep them",
            *picture.size,
            *size,
        )
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    with GraphCall.lent(session, manifest.image) as encoder:
        encoder.inputs["picture"].write(np.asarray(picture, np.uint8)[np.newaxis])
        if (drawn := encoder.inputs.get("noise")) is not None:
            own = noise(seed, 0, drawn.shape, draw=CONDITIONING) if augmentation is None else augmentation
            drawn.write(own)
        encoder()
        return {name: buffer.read() for name, buffer in encoder.outputs.items()}
