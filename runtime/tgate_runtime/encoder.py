"""What conditions an image, from texts or from a picture, as the denoising graphs of a size take it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import NDArray
from PIL import Image

from tgate_engine.conditioning import reference_halves
from tgate_engine.errors import RequestError
from tgate_engine.graph import IMAGE, REFERENCE, TEXT
from tgate_runtime.conditioning import conditioning_of
from tgate_runtime.image import encode_image, fit_picture
from tgate_runtime.reference import encode_reference
from tgate_runtime.session import Session
from tgate_runtime.signatures import PICTURE_NOISE
from tgate_runtime.text import TextEncoder

Row = Mapping[str, NDArray[Any]]
"""What conditions one image: ``<name>.<half>`` to [1, ...]."""
Text = tuple[str, str | None]
"""A prompt and its negative prompt, None being the model's convention for none."""


class Encoder:
    """The text and image graphs of a session, those that it has. Thread-safe."""

    def __init__(self, session: Session) -> None:
        """Load the tokenizers. Raises :class:`~tgate_engine.errors.BundleError` for a file that is none."""
        self._session = session
        self._text = TextEncoder(session) if session.graph(TEXT) else None

    def of_texts(self, texts: Sequence[Text], size: str | None = None) -> tuple[list[Row], tuple[str, ...]]:
        """What conditions one image of each text, every distinct text encoded once; and what was cut off any of them,
        as it was written.

        Raises :class:`RequestError` for a bundle without a text encoder, and as :meth:`TextEncoder.encode` does.
        """
        if self._text is None:
            raise RequestError("the bundle has no text encoder (--components); export it with one")
        manifest = self._session.manifest
        if not manifest.guided:
            texts = [(prompt, None) for prompt, _ in texts]
        elif not manifest.zero_negative:
            texts = [(prompt, negative or "") for prompt, negative in texts]
        distinct = dict.fromkeys(text for pair in texts for text in pair if text is not None)
        encoded = {text: self._text.encode(text) for text in distinct}
        rows: list[Row] = [
            conditioning_of(
                self._session,
                encoded[prompt].tensors,
                None if negative is None else encoded[negative].tensors,
                size=size,
            )
            for prompt, negative in texts
        ]
        return rows, tuple(dict.fromkeys(text.cut for text in encoded.values() if text.cut))

    def of_picture(self, image: Image.Image, seeds: Sequence[int], size: str | None = None) -> list[Row]:
        """What conditions an image of each seed, which the encoder's own noise is drawn from; beside a prompt, what the
        picture brings to that. Raises :class:`RequestError` for a bundle without an image encoder."""
        graph = self._session.graph(IMAGE, size)
        if graph is None:
            raise RequestError("the bundle has no image encoder (--components); export it with one")
        picture = fit_picture(image, graph)
        different = seeds if PICTURE_NOISE in graph.input_names() else seeds[:1]
        encoded = [encode_image(self._session, graph, picture, seed=seed) for seed in different]
        rows: list[Row] = [conditioning_of(self._session, tensors, None, size=size) for tensors in encoded]
        return rows if len(rows) == len(seeds) else rows * len(seeds)

    def of_reference(self, image: Image.Image, scale: float, size: str | None = None) -> Row:
        """What a picture beside the prompt puts in the place of zeros in any of those rows. Raises
        :class:`RequestError` for a bundle without an IP-Adapter, and as
        :func:`~tgate_runtime.reference.encode_reference` does."""
        graph, manifest = self._session.graph(REFERENCE, size), self._session.manifest
        if graph is None:
            raise RequestError("the bundle has no IP-Adapter; export it again with --ip-adapter")
        encoded = encode_reference(self._session, graph, image)
        return reference_halves(manifest.conditioning, encoded, scale, guided=manifest.guided)
