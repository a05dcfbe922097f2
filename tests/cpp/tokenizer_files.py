"""Files of tokenizers: every component and flag that a bundle may have, drawn at random; and one that shows the words
of a text byte by byte."""

from __future__ import annotations

import base64
import json
from random import Random
from typing import Any

from tests.contract.test_tokenizer_check import CLIP_WORDS, added, charsmap
from tests.cpp.prompts import SPECIAL
from tgate_engine.tokenizer_check import ENDS, ENDS_BEFORE

Json = dict[str, Any]

_ALPHABET = "abcdeghilmnorstuABS'12.!▁ĠéµﬁÃ©ł½ "
_CONTENTS = (*SPECIAL, "a", "red", " a", "a ", "é", "É", "star", "\ue000", "☺", "b-b", "ab", "abc", "ing", "x y")
_REPLACED = ("a", "ed", "<cat>", " a", "É", "☺", "^.$", "-", "a b", "&&", "#", "[a]", "\\", "~", "{", "'", "*+", "é")


def whole(model: Json, **parts: Any) -> Json:
    """A tokenizer.json of those parts."""
    names = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    return {"version": "1.0", "added_tokens": [], **dict.fromkeys(names), "model": model, **parts}


def byte_words(**parts: Any) -> Json:
    """A token for each byte, and another one for the last byte of a word: the ids of a text say all that was done to
    it before the model."""
    plain = [*range(33, 127), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    other = iter(range(0x100, 0x200))
    characters = [chr(byte if byte in plain else next(other)) for byte in range(256)]
    vocabulary = {token: i for i, token in enumerate([*characters, *(f"{c}</w>" for c in characters)])}
    pre = [*([parts.pop("words")] if "words" in parts else []), byte_level(use_regex=False)]
    pieces = {"type": "Sequence", "pretokenizers": pre}
    return whole(byte_pairs(vocabulary, [], end_of_word_suffix="</w>"), pre_tokenizer=pieces, **parts)


def byte_level(**flags: bool) -> Json:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True, **flags}


def byte_pairs(vocabulary: dict[str, int], merges: list[list[str]], **fields: Any) -> Json:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        "vocab": vocabulary,
        "merges": merges,
        **fields,
    }


def mapped(blob: bytes) -> Json:
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(blob).decode()}


def drawn(rng: Random) -> tuple[bytes, int, int]:
    """(file, length, padding). Its template may leave the text out, its added tokens may be parts of one another."""
    model = _model(rng)
    vocabulary = model["vocab"]
    ids = [*vocabulary.values()] if isinstance(vocabulary, dict) else [*range(len(vocabulary))]
    flags = ("single_word", "lstrip", "rstrip", "normalized", "special")
    tokens = [
        added(i, rng.choice(_CONTENTS), **{flag: rng.random() < 0.4 for flag in flags}) for i in range(rng.randrange(6))
    ]
    data = whole(
        model,
        added_tokens=tokens,
        normalizer=_some(rng, _normalizer, "normalizers"),
        pre_tokenizer=_some(rng, _pre_tokenizer, "pretokenizers"),
        post_processor=_post_processor(rng, ids),
    )
    return json.dumps(data).encode(), rng.choice((4, 8, 20, 77)), rng.choice(ids)


def _some(rng: Random, make: Any, items: str) -> Json | None:
    count = rng.randrange(5)
    if count < 2:
        return make(rng) if count else None
    parts = [make(rng) for _ in range(count)]
    if rng.random() < 0.2:
        parts.append({"type": "Sequence", items: [make(rng)]})
    return {"type": "Sequence", items: parts}


def _normalizer(rng: Random) -> Json:
    match rng.randrange(6):
        case 0:
            return {"type": "NFC"}
        case 1:
            return {"type": "Lowercase"}
        case 2:
            return {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}
        case 3:
            return {"type": "Replace", "pattern": {"Regex": rng.choice((ENDS, ENDS_BEFORE))}, "content": ""}
        case 4:
            content = rng.choice(("\ue000", "\ue000 \ue001", " ", "\ue002" * 5))
            return {"type": "Replace", "pattern": {"String": rng.choice(_REPLACED)}, "content": content}
        case _:
            label = rng.choice((ord("x"), 0xCC, ord("a"), 0xD8, 0xE2, 0xF0))
            text = rng.choice((b"yz\0", b"\0", b"q\0", "é\0".encode(), b"abcdefg\0"))
            return mapped(charsmap(label, 0, text))


def _pre_tokenizer(rng: Random) -> Json:
    def flag() -> bool:
        return rng.random() < 0.5

    match rng.randrange(5):
        case 0:
            return {"type": "Whitespace"}
        case 1:
            return {"type": "WhitespaceSplit"}
        case 2:
            scheme = rng.choice(("always", "first", "never"))
            return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": flag()}
        case 3:
            return clip_words(flag())
        case _:
            return byte_level(add_prefix_space=flag(), trim_offsets=flag(), use_regex=flag())


def clip_words(special: bool) -> Json:
    regex = CLIP_WORDS if special else CLIP_WORDS[CLIP_WORDS.index("'s") :]
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Removed", "invert": True}


def _post_processor(rng: Random, ids: list[int]) -> Json | None:
    match rng.randrange(4):
        case 0:
            return None
        case 1:
            ends = {"sep": ["x", rng.choice(ids)], "cls": ["y", rng.choice(ids)]}
            trim, prefix = rng.random() < 0.7, rng.random() < 0.5
            return {"type": "RobertaProcessing", **ends, "trim_offsets": trim, "add_prefix_space": prefix}
        case _:
            count = rng.randrange(1, 3)
            special = {"id": "E", "ids": [rng.choice(ids)] * count, "tokens": ["E"] * count}
            end, text = {"SpecialToken": {"id": "E", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
            single = rng.choice(([text, end], [end, text], [text], [end], [], [end, text, end]))
            return {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {"E": special}}


def _model(rng: Random) -> Json:
    tokens = {"u", "</w>"}
    for _ in range(rng.randrange(1, 120)):
        tokens.add("".join(rng.choice(_ALPHABET) for _ in range(rng.choice((1, 1, 1, 2, 3, 4)))))
    names = sorted(tokens)
    rng.shuffle(names)
    match rng.randrange(3):
        case 0:
            return {"type": "WordLevel", "vocab": {token: i for i, token in enumerate(names)}, "unk_token": "u"}
        case 1:
            odd = rng.random() < 0.5
            scores = [rng.choice((0.0, -1, -1e-7, 3e5, -3e-10)) if odd else -10 * rng.random() for _ in names]
            unknown = rng.randrange(len(names))
            vocabulary = [list(each) for each in zip(names, scores, strict=True)]
            return {"type": "Unigram", "unk_id": unknown, "vocab": vocabulary, "byte_fallback": False}
        case _:
            return _random_byte_pairs(rng, names)


def _random_byte_pairs(rng: Random, names: list[str]) -> Json:
    characters = sorted({*"".join(names)})
    known = dict.fromkeys([*characters, *(f"{c}</w>" for c in characters), *names])
    merges = []
    for _ in range(rng.randrange(80)):
        first, second = rng.choice([*known]), rng.choice([*known])
        if not first.endswith("</w>") and len(first + second) < 12:
            known[first + second] = None
            merges.append([first, second])
    needed = {token for first, second in merges for token in (first, second, first + second)}
    if rng.random() < 0.3:
        known = {token: None for token in known if token in needed or rng.random() < 0.8} or known
    offset = rng.choice((0, 0, 5))
    return byte_pairs(
        {token: i + offset for i, token in enumerate(known)},
        merges,
        unk_token=rng.choice((None, rng.choice([*known]))),
        continuing_subword_prefix=rng.choice(("", None)),
        end_of_word_suffix=rng.choice(("</w>", "", None)),
        fuse_unk=rng.random() < 0.5,
        ignore_merges=rng.random() < 0.3,
    )
