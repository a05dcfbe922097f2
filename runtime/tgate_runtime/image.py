"""A picture as the tensors that condition the denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tgate_engine.manifest import resolve
from tgate_runtime.noise import CONDITIONING, noise
from tgate_runtime.session import Session


def encode_image(
    session: Session, image: Image.Image, *, seed: int, augmentation: NDArray[np.float32] | None = None
) -> Mapping[str, NDArray[Any]]:
    """Run the image graph once: conditioning name to [1, ...], in the graph's storage dtype. Thread-safe.

    The picture is made RGB and, where it has another size, resized to the bundle's (Lanczos). ``augmentation``:
    float32 [1, 3, H, W], the standard normal noise that the graph adds a little of; None draws it from ``seed``.
    """
    manifest, engine = session.manifest, session.backend
    spec = manifest.graphs[manifest.image]
    inputs = {t.name: engine.allocate(resolve(t.shape, 1), t.dtype) for t in spec.inputs}
    outputs = {t.name: engine.allocate(resolve(t.shape, 1), t.dtype) for t in spec.outputs}
    size = (manifest.width, manifest.height)
    picture = image.convert("RGB")
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    inputs["picture"].write(np.asarray(picture, np.uint8)[np.newaxis])
    if "noise" in inputs:
        shape = inputs["noise"].shape
        inputs["noise"].write(noise(seed, 0, shape, draw=CONDITIONING) if augmentation is None else augmentation)
    session.graph(manifest.image).bind(inputs, outputs)()
    return {name: buffer.read() for name, buffer in outputs.items()}
