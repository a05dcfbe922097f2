"""Latents to pictures."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tgate_engine.manifest import resolve
from tgate_runtime.session import Session


def decode(session: Session, latents: NDArray[np.float32]) -> list[Image.Image]:
    """The RGB pictures of one result's final latents, float32 [...]: one, or a video's frames. Thread-safe."""
    spec = session.manifest.graphs[session.manifest.decoder]
    inputs = {t.name: session.backend.allocate(resolve(t.shape, 1), t.dtype) for t in spec.inputs}
    outputs = {t.name: session.backend.allocate(resolve(t.shape, 1), t.dtype) for t in spec.outputs}
    inputs["latents"].write(latents[np.newaxis])
    session.graph(session.manifest.decoder).bind(inputs, outputs)()
    pixels = outputs["image"].read()
    return [Image.fromarray(frame) for frame in pixels.reshape(-1, *pixels.shape[-3:])]
