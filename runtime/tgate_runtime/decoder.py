"""Latents to pictures."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tgate_runtime.graph_call import GraphCall
from tgate_runtime.session import Session


def decode(session: Session, latents: NDArray[np.float32]) -> list[Image.Image]:
    """The RGB pictures of one result's final latents, float32 [...]: one, or a video's frames. Thread-safe."""
    with GraphCall.lent(session, session.manifest.decoder) as decoder:
        decoder.inputs["latents"].write(latents[np.newaxis])
        decoder()
        pixels = decoder.outputs["image"].read()
    return [Image.fromarray(frame) for frame in pixels.reshape(-1, *pixels.shape[-3:])]
