"""Latents to a picture."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tgate_engine.manifest import resolve
from tgate_runtime.session import Session


def decode(session: Session, latents: NDArray[np.float32]) -> Image.Image:
    """The RGB picture of one image's final latents, float32 [C, h, w]. Thread-safe."""
    spec = session.manifest.graphs[session.manifest.decoder]
    inputs = {t.name: session.backend.allocate(resolve(t.shape, 1), t.dtype) for t in spec.inputs}
    outputs = {t.name: session.backend.allocate(resolve(t.shape, 1), t.dtype) for t in spec.outputs}
    inputs["latents"].write(latents[np.newaxis])
    session.graph(session.manifest.decoder).bind(inputs, outputs)()
    return Image.fromarray(outputs["image"].read()[0])
