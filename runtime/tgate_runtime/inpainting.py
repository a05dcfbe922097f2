"""What an inpainting model is told of what lies around the mask: the mask, and the latents of what is left."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tgate_engine.conditioning import masked_halves
from tgate_engine.errors import RequestError
from tgate_engine.graph import ENCODE
from tgate_engine.manifest import Manifest
from tgate_runtime.beginning import Beginning, encode, mask_pixels, of_latents
from tgate_runtime.encoder import Row
from tgate_runtime.request import NO_ENCODER
from tgate_runtime.session import Session


@dataclass(frozen=True, kw_only=True)
class Around:
    """What lies around the mask of a request for any number of images.

    ``mask``: float32 [h, w], 1 where it is drawn anew. ``mean``, ``deviation``: of the latents of the picture without
    what the mask covers, float32 [...], which each image has a sample of.
    """

    manifest: Manifest
    mask: NDArray[np.float32]
    mean: NDArray[np.float32]
    deviation: NDArray[np.float32]

    def row(self, sample: NDArray[np.float32]) -> Row:
        """What conditions one image beside its prompt. ``sample``: standard normal [...]. Pure."""
        latents = self.mean + self.deviation * sample
        return masked_halves(self.manifest.conditioning, self.mask, latents, guided=self.manifest.guided)


def draw_of(beginning: Beginning | None) -> int:
    """Which draw of a seed is an image's sample: as in diffusers' pipelines, the one after the noise that it begins
    from. It comes before those of the steps."""
    return 1 if beginning is None else beginning.draws + 1


def around(session: Session, image: Image.Image, mask: Image.Image, size: str | None = None) -> Around:
    """What lies around ``mask`` in ``image``, of an inpainting model. Thread-safe.

    ``image``: as :func:`~tgate_runtime.image.fit_picture` takes it. ``mask``: see
    :func:`~tgate_runtime.picture.as_mask`; it is resized as the image is. Raises :class:`RequestError` for a bundle
    without an encoder, a mask that would change nothing, and as :func:`fit_picture` does;
    :class:`~tgate_engine.errors.EngineError` where the picture's latents are not finite.
    """
    graph, shape = session.graph(ENCODE, size), session.shapes(size)[0]
    if graph is None:
        raise RequestError(NO_ENCODER)
    covered = mask_pixels(mask, shape)
    own = of_latents(covered, shape)
    mean, deviation = encode(session, graph, image, covered)
    return Around(manifest=session.manifest, mask=own, mean=mean, deviation=deviation)
