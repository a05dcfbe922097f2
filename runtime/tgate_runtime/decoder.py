"""Latents to pictures."""

from __future__ import annotations

import logging

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tgate_engine.graph import GraphSpec
from tgate_runtime.finite import ADVICE
from tgate_runtime.graph_call import GraphCall
from tgate_runtime.session import Session
from tgate_runtime.signatures import FINAL_LATENTS, PIXELS

log = logging.getLogger("tgate")


def decode(session: Session, graph: GraphSpec, latents: NDArray[np.float32]) -> list[Image.Image]:
    """The RGB pictures of one result's final latents, float32 [...]: one, or a video's frames. Thread-safe.

    A picture that is black throughout is warned of in the log ``tgate``.
    ``graph``: the session's of role "decode" for the latents' size.
    """
    with GraphCall.borrow(session, graph) as decoder:
        decoder.inputs[FINAL_LATENTS].write(latents[np.newaxis])
        decoder()
        pixels = decoder.outputs[PIXELS].read()
    if not pixels.any():  # bytes have no NaN, of which engines make 0
        log.warning("the decoder's picture is black throughout, as it is where its numbers are not finite; %s", ADVICE)
    return [Image.fromarray(frame) for frame in pixels.reshape(-1, *pixels.shape[-3:])]
