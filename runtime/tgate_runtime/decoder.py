"""Latents to pictures."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tgate_engine.graph import GraphSpec
from tgate_runtime.graph_call import GraphCall
from tgate_runtime.session import Session
from tgate_runtime.signatures import FINAL_LATENTS, PIXELS


def decode(session: Session, graph: GraphSpec, latents: NDArray[np.float32]) -> list[Image.Image]:
    """The RGB pictures of one result's final latents, float32 [...]: one, or a video's frames. Thread-safe.

    ``graph``: the session's of role "decode" for the latents' size.
    """
    with GraphCall.borrow(session, graph) as decoder:
        decoder.inputs[FINAL_LATENTS].write(latents[np.newaxis])
        decoder()
        pixels = decoder.outputs[PIXELS].read()
    return [Image.fromarray(frame) for frame in pixels.reshape(-1, *pixels.shape[-3:])]
