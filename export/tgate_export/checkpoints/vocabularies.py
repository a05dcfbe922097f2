"""Files of a checkpoint's tokenizers, checked before the libraries that load them see them.

transformers reads whatever lies in a tokenizer's directory and hands keys of its configuration on as arguments; the
tokenizers library panics on files that it did not write. So both are given a private copy of the files known here, and
of those only what was checked.
"""

from __future__ import annotations

import base64
import contextlib
import json
import tempfile
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers.convert_slow_tokenizer import import_protobuf

from tgate_engine.errors import ExportError
from tgate_engine.underway import unfinished
from tgate_export.checkpoints.configs import check_code, without_code
from tgate_export.checkpoints.files import kind_of, parse_object, present, quoted, read_bytes
from tgate_export.libraries import refusing

VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model")

FILE_BYTES = 64 << 20
"""Largest file of a tokenizer; CLIP's and T5's have up to 4 MB, Gemma's has 34."""

MOST_TOKENS = 1 << 20
MOST_ADDED = 1 << 14
MOST_CHARACTERS = 256
"""Of a token."""

_CONFIG = "tokenizer_config.json"
_JSON = (_CONFIG, "special_tokens_map.json", "added_tokens.json", "vocab.json", "tokenizer.json")
_FILES = (*_JSON, "merges.txt", "vocab.txt", "spiece.model")
_PIECES = "tokenizer.model"
"""SentencePiece's file, where a class reads no other vocabulary (ChatGLM's). Others have it lying beside theirs."""

_ARGUMENTS = (
    *("gguf_file", "tokenizer_object", "vocab", "merges", "init_inputs", "post_processor"),
    *("tokenizer_padding", "tokenizer_truncation", "_json_padding", "_json_truncation", "_spm_precompiled_charsmap"),
)
"""Keys of a configuration that transformers would take for arguments, and read other files by."""

_TYPES: Mapping[str, frozenset[str]] = {
    "normalizer": frozenset(
        (
            *("Sequence", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "Strip", "Replace", "Prepend"),
            *("Precompiled", "BertNormalizer"),
        )
    ),
    "pre_tokenizer": frozenset(
        ("Sequence", "Split", "ByteLevel", "Metaspace", "Whitespace", "WhitespaceSplit", "BertPreTokenizer")
    ),
    "post_processor": frozenset(("Sequence", "RobertaProcessing", "TemplateProcessing", "ByteLevel")),
    "decoder": frozenset(
        ("Sequence", "ByteLevel", "BPEDecoder", "Metaspace", "Replace", "Fuse", "Strip", "ByteFallback", "WordPiece")
    ),
    "model": frozenset(("BPE", "Unigram", "WordLevel", "WordPiece")),
}
"""Components of CLIP's, T5's, Gemma's and BERT's tokenizers, and of what converters made of them."""

_REGEXES = frozenset(
    (
        r"\s+",
        r" {2,}",
        r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
        r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
        r"|\s+(?!\S)|\s+",
    )
)
"""Regular expressions of the same. Others may take a lifetime."""

_MOST_PIECE_BYTES = 64
"""What SentencePiece's map of characters may make of one."""


@contextlib.contextmanager
def checked_vocabulary(
    directory: Path, reads: Collection[str] = VOCABULARIES, brought: Collection[str] = ()
) -> Iterator[Path]:
    """While open, a directory of what was checked of a tokenizer's files, as they are.

    ``reads``: files that its class takes a vocabulary from. ``brought``: modules of code that its configuration may
    name, and is handed on without (:func:`~tgate_export.checkpoints.configs.without_code`). Raises
    :class:`ExportError` for one without a vocabulary, and naming the file and what is wrong in it.
    """
    known = (_PIECES,) if _PIECES in reads else VOCABULARIES
    if not any(present(directory / file) for file in known):  # transformers would make one up
        raise ExportError(f"{directory} holds no vocabulary (one of {', '.join(known)}); it is incomplete")
    with tempfile.TemporaryDirectory(prefix="tgate-") as folder, unfinished(Path(folder)):
        for name in dict.fromkeys((*_FILES, *known)):
            if present(directory / name):
                content = read_bytes(directory / name, FILE_BYTES)
                if name == _CONFIG and brought:
                    named = parse_object(content, str(directory / name))
                    content = json.dumps(without_code(named, brought)).encode()
                _check(name, content, str(directory / name))
                (Path(folder) / name).write_bytes(content)
        yield Path(folder)


def _check(name: str, content: bytes, where: str) -> None:
    if name == "merges.txt":
        _check_merges(content, where)
    elif name == "vocab.txt":
        _check_lines(content, where)
    elif name in ("spiece.model", _PIECES):
        _check_pieces(content, where)
    else:
        data = parse_object(content, where)
        {
            _CONFIG: _check_config,
            "special_tokens_map.json": _check_tokens,
            "added_tokens.json": _check_ids,
            "vocab.json": _check_ids,
            "tokenizer.json": _check_tokenizer,
        }[name](data, where)


def _check_config(data: Mapping[str, Any], where: str) -> None:
    check_code(where, data)
    for key in _ARGUMENTS:
        if data.get(key):
            raise ExportError(f"{where} has {key} = {quoted(data[key])}, which names what to load; leave it out")
    _check_tokens(data, where)
    extra = data.get("extra_ids", 0)
    if type(extra) is not int or not 0 <= extra <= MOST_ADDED:
        raise _wrong(where, "extra_ids", extra, f"a whole number from 0 to {MOST_ADDED}")
    added = data.get("added_tokens_decoder", {})
    if not isinstance(added, dict) or len(added) > MOST_ADDED:
        raise _wrong(where, "added_tokens_decoder", added, f"an object of at most {MOST_ADDED} tokens")
    for place, token in added.items():
        if not place.isdecimal() or not place.isascii() or len(place) > 7 or int(place) >= MOST_TOKENS:
            raise _wrong(where, "added_tokens_decoder", place, f"a token's place from 0 to {MOST_TOKENS - 1}")
        _check_token(token, f"{where}: added_tokens_decoder", place)


def _check_tokens(data: Mapping[str, Any], where: str) -> None:
    """Special tokens by name, and lists of them."""
    for key, value in data.items():
        if key.endswith("_token") and value is not None and not isinstance(value, bool):
            _check_token(value, where, key)
        if key in ("additional_special_tokens", "extra_special_tokens") and value is not None:
            tokens = list(value.values()) if isinstance(value, dict) else value
            if not isinstance(tokens, list) or len(tokens) > MOST_ADDED:
                raise _wrong(where, key, value, f"a list of at most {MOST_ADDED} tokens")
            for token in tokens:
                _check_token(token, where, key)


def _check_token(token: Any, where: str, key: str) -> None:
    text = token.get("content") if isinstance(token, dict) else token
    if not isinstance(text, str) or not 0 < len(text) <= MOST_CHARACTERS:
        raise _wrong(where, key, token, f"a token of 1 to {MOST_CHARACTERS} characters")
    if isinstance(token, dict):
        for name, value in token.items():
            if name not in ("content", "id", "__type") and not isinstance(value, bool):
                raise _wrong(where, f"{key}.{name}" if name.isidentifier() else key, value, "true or false")


def _check_ids(data: Mapping[str, Any], where: str) -> None:
    """Places by token."""
    if len(data) > MOST_TOKENS:
        raise ExportError(f"{where} has {len(data)} tokens, and {MOST_TOKENS} are the most")
    for token, place in data.items():
        if type(place) is not int or not 0 <= place < MOST_TOKENS:
            raise _wrong(where, quoted(token), place, f"a whole number from 0 to {MOST_TOKENS - 1}")
        if len(token) > MOST_CHARACTERS:
            raise ExportError(
                f"{where} has a token {quoted(token)} of {len(token)} characters; {MOST_CHARACTERS} at most"
            )


def _lines(content: bytes, where: str) -> list[str]:
    try:
        lines = content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ExportError(f"{where} is not UTF-8 ({error}); download it again") from None
    if len(lines) > MOST_TOKENS:
        raise ExportError(f"{where} has {len(lines)} lines, and {MOST_TOKENS} are the most")
    return lines


def _check_lines(content: bytes, where: str) -> None:
    """A token a line, as BERT's vocabulary has them."""
    for number, line in enumerate(_lines(content, where)):
        if len(line) > MOST_CHARACTERS:
            raise ExportError(
                f"{where}, line {number + 1}, holds {quoted(line)}; a token of at most {MOST_CHARACTERS} characters is "
                "wanted"
            )


def _check_merges(content: bytes, where: str) -> None:
    for number, line in enumerate(_lines(content, where)):
        if line.strip() and not line.startswith("#version"):
            _check_merge(line.rstrip("\r").split(" "), f"{where}, line {number + 1},")


def _check_merge(parts: Any, where: str) -> None:
    fits = isinstance(parts, list) and len(parts) == 2
    if not fits or not all(isinstance(part, str) and 0 < len(part) <= MOST_CHARACTERS for part in parts):
        raise ExportError(
            f"{where} holds {quoted(parts)}; two tokens of at most {MOST_CHARACTERS} characters are wanted"
        )


def _check_tokenizer(data: Mapping[str, Any], where: str) -> None:
    """The tokenizers library's own file: its components, their regular expressions, and its vocabulary."""
    for place, known in _TYPES.items():
        part = data.get(place)
        if place == "model" and isinstance(part, dict) and "type" not in part:
            raise ExportError(f"{where}: model has no type; one of {', '.join(sorted(known))} is wanted")
        _check_component(part, known, where, place)
    for place in ("truncation", "padding"):
        _check_fill(data.get(place), where, place)
    added = data.get("added_tokens", [])
    if not isinstance(added, list) or len(added) > MOST_ADDED:
        raise _wrong(where, "added_tokens", added, f"a list of at most {MOST_ADDED} tokens")
    for token in added:
        _check_token(token, where, "added_tokens")
        if not isinstance(token, dict):
            raise _wrong(where, "added_tokens", token, "an object")
        _check_ids({"id": token.get("id")}, f"{where}: added_tokens")
    model = data.get("model")
    if not isinstance(model, dict):
        raise _wrong(where, "model", model, "an object")
    _check_vocabulary(model.get("vocab"), f"{where}: the vocabulary")
    merges = model.get("merges", [])
    if not isinstance(merges, list) or len(merges) > MOST_TOKENS:
        raise _wrong(where, "merges", merges, f"a list of at most {MOST_TOKENS} pairs")
    for merge in merges:
        _check_merge(merge.split(" ") if isinstance(merge, str) else merge, f"{where}: merges")


def _check_component(part: Any, known: frozenset[str], where: str, place: str) -> None:
    """A component or several, at any depth: of a known type, its regular expressions known too."""
    if isinstance(part, list):
        for inner in part:
            _check_component(inner, known, where, place)
    elif isinstance(part, dict):
        kind = part.get("type")
        if kind is not None and (not isinstance(kind, str) or kind not in known):
            raise _wrong(where, f"{place}.type", kind, f"one of {', '.join(sorted(known))}")
        regex = part.get("Regex")
        if regex is not None and (not isinstance(regex, str) or regex not in _REGEXES):
            raise ExportError(
                f"{where}: {place} has the regular expression {quoted(regex)}, which is none of CLIP's, T5's or "
                "Qwen's; give the tokenizer as vocab.json and merges.txt, or as spiece.model"
            )
        if "precompiled_charsmap" in part:
            _check_charsmap(_decoded(part["precompiled_charsmap"], where, place), f"{where}: {place}")
        for name, inner in part.items():
            if name not in ("vocab", "merges"):
                _check_component(inner, known, where, place)


def _check_fill(part: Any, where: str, place: str) -> None:
    """How texts are filled up or cut, which the exporter tells by itself: numbers that memory can hold."""
    if part is None:
        return
    if not isinstance(part, dict):
        raise _wrong(where, place, part, "an object, or null")
    strategy = part.get("strategy")
    fixed = strategy.get("Fixed") if isinstance(strategy, dict) else None
    for value in (*part.values(), fixed):
        if isinstance(value, (int, float)) and not 0 <= value <= MOST_TOKENS:
            raise _wrong(where, place, value, f"a number from 0 to {MOST_TOKENS}")


def _check_vocabulary(vocabulary: Any, where: str) -> None:
    """Tokens by place, or, for Unigram, in their order with scores."""
    if isinstance(vocabulary, dict):
        _check_ids(vocabulary, where)
        return
    if not isinstance(vocabulary, list) or not 0 < len(vocabulary) <= MOST_TOKENS:
        raise ExportError(f"{where} is {kind_of(vocabulary)}; 1 to {MOST_TOKENS} tokens are wanted")
    for entry in vocabulary:
        token, score = entry if isinstance(entry, list) and len(entry) == 2 else (None, None)
        if not isinstance(token, str) or len(token) > MOST_CHARACTERS or type(score) not in (int, float):
            raise ExportError(f"{where} holds {quoted(entry)}; a token and its score are wanted")


def _check_pieces(content: bytes, where: str) -> None:
    """SentencePiece's file."""
    with refusing(f"{where} is no model of SentencePiece", "download it again"):
        model = import_protobuf().ModelProto()
        model.ParseFromString(content)
    pieces = model.pieces
    if not 0 < len(pieces) <= MOST_TOKENS:
        raise ExportError(f"{where} has {len(pieces)} pieces; 1 to {MOST_TOKENS} are wanted")
    for piece in pieces:
        if len(piece.piece) > MOST_CHARACTERS or not abs(piece.score) < 1e6:
            raise ExportError(f"{where} has the piece {quoted(piece.piece)} of score {piece.score}; it is damaged")
    _check_charsmap(model.normalizer_spec.precompiled_charsmap, where)


def _decoded(text: Any, where: str, place: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (TypeError, ValueError):
        raise _wrong(where, f"{place}.precompiled_charsmap", text, "base64") from None


def _check_charsmap(blob: bytes, where: str) -> None:
    """SentencePiece's map of characters: a trie of as many bytes as it says, and texts behind it, ended by zeros."""
    if not blob:
        return
    size = int.from_bytes(blob[:4], "little")
    texts = blob[4 + size :]
    if len(blob) < 4 or size % 4 or not 0 < size <= len(blob) - 4:
        raise ExportError(f"{where}: its map of characters has {len(blob)} bytes, {size} of them a trie; it is damaged")
    if max(map(len, texts.split(b"\0"))) > _MOST_PIECE_BYTES:
        raise ExportError(f"{where}: its map makes more than {_MOST_PIECE_BYTES} bytes of a character; it is damaged")


def _wrong(where: str, key: str, value: Any, wanted: str) -> ExportError:
    return ExportError(f"{where} has {key} = {quoted(value)} ({kind_of(value)}); {wanted} is wanted")
