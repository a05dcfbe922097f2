"""A prompt as the tensors that condition the denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from tgate_engine.errors import BundleError, RequestError
from tgate_engine.graph import TEXT, GraphSpec
from tgate_engine.manifest import Tokenizer
from tgate_runtime.graph_call import GraphCall
from tgate_runtime.session import Session


@dataclass(frozen=True, kw_only=True)
class EncodedText:
    """What a prompt became. Treat as read-only.

    ``tensors``: conditioning name to [1, ...], in the text graph's storage dtype. ``cut``: the part of the
    prompt, as it was written, that did not fit; empty where all of it did.
    """

    tensors: Mapping[str, NDArray[Any]]
    cut: str


class TextEncoder:
    """The bundle's tokenizers and its text graph. Immutable and thread-safe."""

    def __init__(self, session: Session) -> None:
        """Load the tokenizers. Raises :class:`BundleError` for a bundle without a text graph, or a file that is no
        tokenizer."""
        graph = session.graph(TEXT)
        if graph is None:
            raise BundleError(f"{session.bundle.path} has no text encoder (--components); export it with one")
        self._graph: GraphSpec = graph
        self._session = session
        self._tokenizers: list[tokenizers.Tokenizer] = []
        for spec in session.manifest.tokenizers:
            path = session.bundle.file(spec.file)
            try:
                tokenizer = tokenizers.Tokenizer.from_file(str(path))
            except Exception as error:  # the library raises Exception itself
                raise BundleError(f"{path} is not a tokenizer ({error}); export the bundle again") from None
            # The library cuts, at export and here: one rule for what is kept of too long a prompt.
            tokenizer.enable_truncation(spec.length)
            tokenizer.no_padding()
            self._tokenizers.append(tokenizer)

    def encode(self, prompt: str) -> EncodedText:
        """Tokenize ``prompt`` (it may be empty) and run the text graph once.

        Raises :class:`RequestError` for text that is not valid Unicode.
        """
        specs = self._session.manifest.tokenizers
        tokens = [
            self._tokenize(tokenizer, spec, prompt) for tokenizer, spec in zip(self._tokenizers, specs, strict=True)
        ]
        with GraphCall.borrow(self._session, self._graph) as encoder:
            for spec, (ids, _) in zip(specs, tokens, strict=True):
                encoder.inputs[spec.input].write(ids)
            encoder()
            tensors = {name: buffer.read() for name, buffer in encoder.outputs.items()}
        return EncodedText(tensors=tensors, cut=max((cut for _, cut in tokens), key=len, default=""))

    @staticmethod
    def _tokenize(tokenizer: tokenizers.Tokenizer, spec: Tokenizer, prompt: str) -> tuple[NDArray[np.int64], str]:
        """Ids [1, length], cut and filled up with padding, and what of the prompt was cut."""
        try:
            encoding = tokenizer.encode(prompt)
        except (TypeError, UnicodeError):
            raise RequestError(f"the prompt must be text in valid Unicode, got {prompt!r:.80}") from None
        lost = [
            span
            for rest in encoding.overflowing
            for span, special in zip(rest.offsets, rest.special_tokens_mask, strict=True)
            if not special
        ]
        cut = prompt[min(begin for begin, _ in lost) : max(end for _, end in lost)] if lost else ""
        ids = [*encoding.ids, *[spec.pad_id] * (spec.length - len(encoding.ids))]
        return np.array([ids], np.int64), cut
