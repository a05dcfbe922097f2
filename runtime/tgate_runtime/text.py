"""A prompt as the tensors that condition the denoiser."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import NDArray

from tgate_engine.bundle import Bundle
from tgate_engine.errors import BundleError, RequestError, shown
from tgate_engine.graph import TEXT, GraphSpec
from tgate_engine.manifest import Tokenizer
from tgate_engine.tokenizer_check import MOST_BYTES, check_tokenizer
from tgate_runtime.finite import check_computed
from tgate_runtime.graph_call import GraphCall
from tgate_runtime.request import check_prompt
from tgate_runtime.session import Session

log = logging.getLogger("tgate")

_LORA = re.compile(r"<(?:lora|lyco|hypernet):[^<>]+>")
_WEIGHT = re.compile(
    r"\([^()]*[^()\d\s]\s*:\s*\d?\.\d+\s*\)"  # (green:1.5), and no ratio (of 16:9)
    r"|\(\([^()]+\)\)"
    r"|\([^()]+\)(?:\+\+|--|[01]\.\d)"  # (a green star)++, (a green star)1.3
    r"|(?<![^\W\d_])[^\W\d_]{3,}\+\+"  # star++, and not C++
    r"|(?:^|[,\n])[ \t]*BREAK[ \t]*(?:[,\n]|$)"
)
_SYNTAX = {
    _WEIGHT: 'the prompt says "%s", which other programs read as a weight; here it is plain text like the rest',
    _LORA: 'the prompt says "%s", which is plain text here; a LoRA is fused at export: tgate-export --lora FILE:SCALE',
}
"""What other programs read as more than words, and nobody writes who does not mean that. Linear in the prompt."""


@dataclass(frozen=True, kw_only=True)
class EncodedText:
    """What a prompt became. Treat as read-only.

    ``tensors``: conditioning name to [1, ...], in the text graph's storage dtype. ``cut``: the part of the
    prompt, as it was written, that did not fit; empty where all of it did.
    """

    tensors: Mapping[str, NDArray[Any]]
    cut: str


class TextEncoder:
    """The bundle's tokenizers and its text graph. Thread-safe.

    The first prompt with weights in other programs' syntax, and the first that names a LoRA, is warned of in the log
    ``tgate``: both are read as plain text.
    """

    def __init__(self, session: Session) -> None:
        """Load the tokenizers. Raises :class:`BundleError` for a bundle without a text graph, or a file that is no
        tokenizer."""
        graph = session.graph(TEXT)
        if graph is None:
            raise BundleError(f"{session.bundle.path} has no text encoder (--components); export it with one")
        self._graph: GraphSpec = graph
        self._session = session
        specs = session.manifest.tokenizers
        self._tokenizers = [_load(session.bundle, spec, graph) for spec in specs]
        self._untold = dict(_SYNTAX)

    def encode(self, prompt: str) -> EncodedText:
        """Tokenize ``prompt`` (it may be empty) and run the text graph once.

        Raises :class:`RequestError` for what :func:`~tgate_runtime.request.check_prompt` does not let through, and
        :class:`EngineError` where what becomes of it is not finite.
        """
        check_prompt(prompt)
        self._tell(prompt)
        specs = self._session.manifest.tokenizers
        tokens = [
            self._tokenize(tokenizer, spec, prompt) for tokenizer, spec in zip(self._tokenizers, specs, strict=True)
        ]
        with GraphCall.borrow(self._session, self._graph) as encoder:
            for spec, (ids, _) in zip(specs, tokens, strict=True):
                encoder.inputs[spec.input].write(ids)
            encoder()
            tensors = {name: buffer.read() for name, buffer in encoder.outputs.items()}
            for name, buffer in encoder.outputs.items():
                check_computed(tensors[name], f"the text encoder's {name} of this prompt", dtype=buffer.dtype)
        return EncodedText(tensors=tensors, cut=max((cut for _, cut in tokens), key=len, default=""))

    def _tell(self, prompt: str) -> None:
        """Warn of syntax that means nothing here, once of each kind."""
        for syntax in list(self._untold):
            if (found := syntax.search(prompt)) and (says := self._untold.pop(syntax, None)):
                log.warning(says, shown(found[0].strip(", \n\t")))

    @staticmethod
    def _tokenize(tokenizer: tokenizers.Tokenizer, spec: Tokenizer, prompt: str) -> tuple[NDArray[np.int64], str]:
        """Ids [1, length], cut and filled up with padding, and what of the prompt was cut."""
        try:
            encoding = tokenizer.encode(prompt)
        except BaseException as error:
            if not _from_the_library(error):
                raise
            raise RequestError(f"the prompt cannot be tokenized ({shown(error, 300)}); write it differently") from None
        if len(encoding.ids) > spec.length:  # the library would cut, had it counted right
            raise RequestError(f"the prompt became {len(encoding.ids)} tokens, {spec.length} fit; shorten it")
        lost = [
            span
            for rest in encoding.overflowing
            for span, special in zip(rest.offsets, rest.special_tokens_mask, strict=True)
            if not special
        ]
        cut = prompt[min(begin for begin, _ in lost) : max(end for _, end in lost)] if lost else ""
        ids = [*encoding.ids, *[spec.pad_id] * (spec.length - len(encoding.ids))]
        return np.array([ids], np.int64), cut


def _load(bundle: Bundle, spec: Tokenizer, graph: GraphSpec) -> tokenizers.Tokenizer:
    """The tokenizer of a bundle's file, checked before the library sees it (:mod:`tgate_engine.tokenizer_check`), and
    that it fills its input of the text graph. Raises :class:`BundleError`."""
    path, content = bundle.file(spec.file), bundle.read(spec.file, MOST_BYTES)
    try:
        tokenizer = tokenizers.Tokenizer.from_str(check_tokenizer(content))
        # The library cuts, at export and here: one rule for what is kept of too long a prompt.
        around = tokenizer.num_special_tokens_to_add(False)
        if around >= spec.length:
            raise ValueError(f"it puts {around} tokens around a prompt, and {spec.length} fit")
        tokenizer.enable_truncation(spec.length)
        tokenizer.no_padding()
        known = set(tokenizer.get_vocab().values())
        if spec.pad_id not in known:
            raise ValueError(f"padding is token {shown(spec.pad_id)}, which it does not have")
        if (normalizer := tokenizer.normalizer) is not None:
            for token in tokenizer.get_added_tokens_decoder().values():
                if token.normalized and not normalizer.normalize_str(token.content):
                    # A character map may say so. The library then finds it between any two characters, and panics.
                    raise ValueError(f"its normalizer leaves nothing of the token {shown(token.content)}")
    except BaseException as error:
        if not _from_the_library(error):
            raise
        raise BundleError(f"{path} is not a tokenizer ({shown(error, 300)}); export the bundle again") from None
    takes = next((t for t in graph.inputs if t.name == spec.input), None)
    if takes is None or (takes.dtype, takes.shape) != ("int64", (1, spec.length)):
        got = "nothing" if takes is None else f"{takes.dtype} {list(takes.shape)}"
        raise BundleError(
            f"{path} gives {spec.length} tokens as {spec.input}, where the text graph takes {got}; export the bundle "
            "again"
        )
    return tokenizer


def _from_the_library(error: BaseException) -> bool:
    """Whether this is a fault of the file or the prompt: the library raises Exception itself, and where it panics a
    class that is no Exception and has no module to import it from."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"
