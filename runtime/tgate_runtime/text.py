"""A prompt as the tensors that condition the denoiser."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from tgate_engine.errors import BundleError, RequestError
from tgate_runtime.graph_call import GraphCall
from tgate_runtime.session import Session


@dataclass(frozen=True, kw_only=True)
class Encoded:
    """What a prompt became. Treat as read-only.

    ``tensors``: conditioning name to [1, ...], in the text graph's storage dtype. ``cut``: the part of the
    prompt, as it was written, that did not fit; empty where all of it did.
    """

    tensors: Mapping[str, NDArray[Any]]
    cut: str


@dataclass(frozen=True, kw_only=True)
class _Tokens:
    ids: NDArray[np.int64]  # [1, length]
    cut: str


class TextEncoder:
    """The bundle's tokenizers and its text graph. Immutable and thread-safe."""

    def __init__(self, session: Session) -> None:
        """Load the tokenizers; the bundle has a text graph. Raises :class:`BundleError` for a file that is none."""
        self._session = session
        self._tokenizers: list[tokenizers.Tokenizer] = []
        for spec in session.manifest.tokenizers:
            path = session.bundle.file(spec.file)
            try:
                tokenizer = tokenizers.Tokenizer.from_file(str(path))
            except Exception as error:  # the library raises Exception itself
                raise BundleError(f"{path} is not a tokenizer ({error}); export the bundle again") from None
            tokenizer.no_truncation()
            tokenizer.no_padding()
            self._tokenizers.append(tokenizer)

    def encode(self, prompt: str) -> Encoded:
        """Tokenize ``prompt`` (it may be empty) and run the text graph once.

        Raises :class:`RequestError` for text that is not valid Unicode.
        """
        manifest = self._session.manifest
        tokens = [self._tokenize(index, prompt) for index in range(len(manifest.tokenizers))]
        with GraphCall.lent(self._session, manifest.text) as encoder:
            for tokenizer, found in zip(manifest.tokenizers, tokens, strict=True):
                encoder.inputs[tokenizer.input].write(found.ids)
            encoder()
            tensors = {name: buffer.read() for name, buffer in encoder.outputs.items()}
        return Encoded(tensors=tensors, cut=max((found.cut for found in tokens), key=len, default=""))

    def _tokenize(self, index: int, prompt: str) -> _Tokens:
        """Ids cut to the tokenizer's length, with its end token kept, and filled up with its padding."""
        spec = self._session.manifest.tokenizers[index]
        try:
            encoding = self._tokenizers[index].encode(prompt)
        except (TypeError, UnicodeError):
            raise RequestError(f"the prompt must be text in valid Unicode, got {prompt!r:.80}") from None
        ids, cut = list(encoding.ids), ""
        if len(ids) > spec.length:
            end = 1 if encoding.special_tokens_mask[-1] else 0
            kept = spec.length - end
            lost = encoding.offsets[kept : len(ids) - end]
            cut = prompt[lost[0][0] : lost[-1][1]] if lost else ""
            ids = ids[:kept] + ids[len(ids) - end :]
        ids += [spec.pad_id] * (spec.length - len(ids))
        return _Tokens(ids=np.array([ids], np.int64), cut=cut)
