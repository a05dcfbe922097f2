"""Which ``tokenizer.json`` is handed to the ``tokenizers`` library, and how much of it.

The file comes from a stranger, and the library trusts it: parts of it panic, never end, or run any regular expression.
So only what export writes is known here, component by component and field by field; all else is refused by name, and
what is known is written anew, so that the library reads no byte that was not looked at. Export asks the same check of
what it writes.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from tgate_engine.errors import shown

MOST_BYTES = 2**24
"""Of a file. CLIP's and T5's hold up to 4 million."""

_MOST_TOKENS = 2**20
_MOST_ADDED = 2**14
_MOST_CHARACTERS = 256
"""Of a token, or of what stands for one."""
_MOST_SCORE = 1e6
_MOST_REPLACED = 2e4
_MOST_NAMED = 2**22
"""Bounds on what textual inversions cost: how often a prompt is read, times how much longer it may become; and added
tokens times replacements, which the library tries on each of them when it loads."""
_MOST_CHARSMAP_BYTES = 2**20
_MOST_PIECE_BYTES = 64
_MOST_SPECIAL = 16

_SPACE = r"[\t-\r\x1c-\x20\u0085\u00a0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
ENDS = rf"\A{_SPACE}+|(?<!{_SPACE}){_SPACE}+\z"
"""What Python strips off a text. A run of spaces is tried from its first one alone: trying every space within it takes
seconds for a prompt of 20 000."""
_SPACE_BEFORE = r"[\t-\r\x1c-\x20\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"
ENDS_BEFORE = rf"\A{_SPACE_BEFORE}+|{_SPACE_BEFORE}+\z"
"""What bundles exported earlier have, which misses two spaces, being written as bytes. :data:`ENDS` is used instead."""

_REPLACED_REGEX = {(r"\s+", " "): r"\s+", (ENDS, ""): ENDS, (ENDS_BEFORE, ""): ENDS}
_SPLIT_REGEX = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
)
"""How CLIP's tokenizer cuts a text into words, as transformers writes it and wrote it."""

_PRIVATE_USE = range(0xE000, 0xF900)
"""Characters that mean nothing; export lets them stand for the vectors of textual inversions."""

Check = Callable[[Any, str], Any]
"""(value, where it stands) to the value that is handed on. Raises ValueError."""
Fields = Callable[[Any, str], dict[str, Any]]
"""The same for objects."""


def check_tokenizer(content: bytes) -> str:
    """The JSON of a tokenizer to be handed to the library, without the parts that are not used: truncation, padding,
    the decoder, and what is done with pairs of texts.

    Raises ValueError, in words that end a sentence about the file, for whatever export does not write.
    """
    if len(content) > MOST_BYTES:
        raise ValueError(f"it holds {len(content)} bytes, at most {MOST_BYTES} are read")
    try:
        data = json.loads(content)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"it is no JSON: {shown(error)}") from None
    whole = _fields(
        {
            "version": _one_of("1.0"),
            "truncation": _left_out,
            "padding": _left_out,
            "added_tokens": _list(_added_token, _MOST_ADDED),
            "normalizer": _optional(_normalizers),
            "pre_tokenizer": _optional(_pre_tokenizers),
            "post_processor": _optional(_component(_POST_PROCESSORS)),
            "decoder": _left_out,
            "model": _component(_MODELS),
        }
    )(data, "")
    _check_replacements(whole)
    _check_ids(whole)
    return json.dumps(whole)


# --- kinds of values ----------------------------------------------------------------------------


def _one_of(*choices: object) -> Check:
    def check(value: Any, where: str) -> Any:
        if not any(type(value) is type(choice) and value == choice for choice in choices):
            raise ValueError(f"{where} is {shown(value)}, known is {' or '.join(map(str, choices))}")
        return value

    return check


_FLAG = _one_of(False, True)


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _MOST_CHARACTERS:
        raise ValueError(f"{where} is {shown(value)}, wanted is text of 1 to {_MOST_CHARACTERS} characters")
    if not _is_unicode(value):
        raise ValueError(f"{where} is {shown(value)}, which is no valid Unicode")
    return value


def _is_unicode(text: str) -> bool:
    """JSON may write half of a surrogate pair, which Python reads and the library does not."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


def _id(value: Any, where: str) -> int:
    if type(value) is not int or not 0 <= value < _MOST_TOKENS:
        raise ValueError(f"{where} is {shown(value)}, wanted is a whole number from 0 to {_MOST_TOKENS - 1}")
    return value


def _left_out(_value: Any, _where: str) -> None:
    return None


def _optional(check: Check) -> Check:
    return lambda value, where: None if value is None else check(value, where)


def _list(check: Check, most: int) -> Check:
    def listed(value: Any, where: str) -> list[Any]:
        if not isinstance(value, list) or len(value) > most:
            raise ValueError(f"{where} is {shown(value)}, wanted is a list of at most {most}")
        return [check(item, f"{where}[{i}]") for i, item in enumerate(value)]

    return listed


def _fields(known: Mapping[str, Check]) -> Fields:
    """An object with those fields, all of them and no others."""

    def check(value: Any, where: str) -> dict[str, Any]:
        checked = _some(known)(value, where)
        if missing := [name for name in known if name not in checked]:
            raise ValueError(f"{_in(where, missing[0])} is missing")
        return checked

    return check


def _one_field(known: Mapping[str, Check]) -> Fields:
    """An object with one of those fields."""

    def check(value: Any, where: str) -> dict[str, Any]:
        checked = _some(known)(value, where)
        if len(checked) != 1:
            raise ValueError(f"{where} has {len(checked)} of {' and '.join(known)}, wanted is one")
        return checked

    return check


def _some(known: Mapping[str, Check]) -> Fields:
    def check(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValueError(f"{where or 'it'} is {shown(value)}, wanted is an object")
        if odd := [name for name in value if name not in known]:
            raise ValueError(f"{_in(where, shown(odd[0]))} is not known")
        return {name: known[name](each, _in(where, name)) for name, each in value.items()}

    return check


def _component(kinds: Mapping[str, Check]) -> Check:
    """An object whose ``type`` says which fields it has."""

    def check(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {shown(value)}, wanted is an object")
        kind = value.get("type")
        if not isinstance(kind, str) or kind not in kinds:
            raise ValueError(f"{where}.type is {shown(kind)}, known is {' or '.join(kinds)}")
        rest = {name: each for name, each in value.items() if name != "type"}
        return {"type": kind, **kinds[kind](rest, where)}

    return check


def _sequence(kinds: Mapping[str, Check], items: str, most: int) -> Check:
    """A component, or a ``Sequence`` of some, which may hold another one, as export nests them; handed on as one."""
    one = _component(kinds)

    def flat(value: Any, where: str, depth: int) -> list[Any]:
        if not isinstance(value, dict) or value.get("type") != "Sequence":
            return [one(value, where)]
        if depth > 2:
            raise ValueError(f"{where} is nested too deeply")
        inner = _fields({"type": _one_of("Sequence"), items: _list(lambda item, _: item, most)})(value, where)
        return [x for i, item in enumerate(inner[items]) for x in flat(item, f"{where}.{items}[{i}]", depth + 1)]

    def check(value: Any, where: str) -> dict[str, Any]:
        parts = flat(value, where, 0)
        return parts[0] if len(parts) == 1 else {"type": "Sequence", items: parts}

    return check


def _in(where: str, name: str) -> str:
    return f"{where}.{name}" if where else name


# --- normalizers --------------------------------------------------------------------------------


def _replace(value: Any, where: str) -> dict[str, Any]:
    """Regular expressions that export writes; or a text in whose place characters of the private use area are put.

    A text holds none of those, and not spaces alone, so that what is put in is not replaced again: replacements in a
    row would else double a prompt each.
    """
    fields = _fields({"pattern": _one_field({"Regex": _any_text, "String": _text}), "content": _any_text})(value, where)
    pattern, content = fields["pattern"], fields["content"]
    text = pattern.get("String", pattern.get("Regex"))
    if (regex := _REPLACED_REGEX.get((pattern.get("Regex"), content))) is not None:
        return {"pattern": {"Regex": regex}, "content": content}
    means_nothing = [ord(c) in _PRIVATE_USE or c == " " for c in content]
    if (
        "Regex" in pattern
        or not text.strip()
        or any(ord(c) in _PRIVATE_USE for c in text)
        or not 0 < len(content) <= _MOST_CHARACTERS
        or not all(means_nothing)
    ):
        raise ValueError(f"{where} replaces {shown(text)} by {shown(content)}, which export does not write")
    return fields


def _any_text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{where} is {shown(value)}, wanted is text")
    return value


def _charsmap(value: Any, where: str) -> str:
    """SentencePiece's map of characters, in base64: a trie, and the texts that its leaves point at.

    The library follows both without looking whether they end inside the bytes. Every place that a text can lead to is
    visited here.
    """
    try:
        blob = base64.b64decode(_any_text(value, where), validate=True)
    except (binascii.Error, ValueError):
        raise ValueError(f"{where} is not base64") from None
    size = int.from_bytes(blob[:4], "little")
    if len(blob) > _MOST_CHARSMAP_BYTES:
        raise ValueError(f"{where} holds {len(blob)} bytes, at most {_MOST_CHARSMAP_BYTES} are read")
    if len(blob) < 4 or size % 1024 or not 0 < size <= len(blob) - 4:  # 256 units of 4 bytes, as such tries are built
        raise ValueError(f"{where} says that its trie takes {size} of {len(blob)} bytes")
    texts = blob[4 + size :]
    try:
        texts.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{where} is not UTF-8 where its texts are") from None
    if any(len(piece) > _MOST_PIECE_BYTES for piece in texts.split(b"\0")):
        raise ValueError(f"{where} makes more than {_MOST_PIECE_BYTES} bytes of a character")
    leaves = _leaves(np.frombuffer(blob, "<u4", size // 4, 4).astype(np.int64), where)
    starts = np.frombuffer(texts + b"\0", np.uint8)
    if leaves.size and (leaves.max() > len(texts) or ((starts[leaves] & 0xC0) == 0x80).any()):
        raise ValueError(f"{where} points beside its texts")
    return base64.b64encode(blob).decode("ascii")


def _leaves(units: Any, where: str) -> Any:
    """The values of all leaves that any bytes can lead to in a double array of ``units`` [n], n a multiple of 256.

    A unit holds its label in the lowest 8 bits, its offset to its children above, and whether a leaf is among them in
    bit 8, see Darts-clone, whose arithmetic this is.
    """
    offsets = (units >> 10) << ((units & 512) >> 6)
    labels = np.arange(1, 256)
    seen = np.zeros(len(units), bool)
    leaves = [np.zeros(0, np.int64)]
    waiting = [offsets[:1]]  # places where the children of nodes begin: child c is at place ^ c
    while waiting:
        places = waiting.pop()
        if (places >= len(units)).any():
            raise ValueError(f"{where} leads out of its trie")
        children = (places[:, None] ^ labels).ravel()
        found = np.unique(children[(units[children] & 0x800000FF) == np.tile(labels, len(places))])
        found = found[~seen[found]]
        seen[found] = True
        places = found ^ offsets[found]
        ends = places[(units[found] & 256) != 0]
        if (ends >= len(units)).any():
            raise ValueError(f"{where} leads out of its trie")
        leaves.append(units[ends] & 0x7FFFFFFF)
        waiting += [places[i : i + 4096] for i in range(0, len(places), 4096)]
    return np.concatenate(leaves)


_NOTHING = _fields({})
_normalizers = _sequence(
    {
        "NFC": _NOTHING,
        "Lowercase": _NOTHING,
        "Replace": _replace,
        "Precompiled": _fields({"precompiled_charsmap": _charsmap}),
    },
    "normalizers",
    _MOST_ADDED,
)

# --- pre-tokenizers -----------------------------------------------------------------------------

_pre_tokenizers = _sequence(
    {
        "Whitespace": _NOTHING,
        "WhitespaceSplit": _NOTHING,
        "Metaspace": _fields(
            {"replacement": _one_of("▁"), "prepend_scheme": _one_of("always", "first", "never"), "split": _FLAG}
        ),
        "Split": _fields(
            {
                "pattern": _fields({"Regex": _one_of(*_SPLIT_REGEX)}),
                "behavior": _one_of("Removed"),
                "invert": _one_of(True),
            }
        ),
        "ByteLevel": _fields({"add_prefix_space": _FLAG, "trim_offsets": _FLAG, "use_regex": _FLAG}),
    },
    "pretokenizers",
    _MOST_SPECIAL,
)

# --- models -------------------------------------------------------------------------------------


def _vocabulary(value: Any, where: str) -> dict[str, int]:
    if not isinstance(value, dict) or not 0 < len(value) <= _MOST_TOKENS:
        raise ValueError(f"{where} is {shown(value)}, wanted is an object of 1 to {_MOST_TOKENS} tokens")
    return {_text(token, f"a token of {where}"): _id(i, f"{where}.{shown(token)}") for token, i in value.items()}


def _merge(value: Any, where: str) -> list[str]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{where} is {shown(value)}, wanted is a pair of tokens")
    return [_text(part, where) for part in value]


def _scored(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{where} is {shown(value)}, wanted is a token with its score")
    token, score = value
    if type(score) not in (int, float) or not abs(score) <= _MOST_SCORE:  # NaN is not
        raise ValueError(f"{where} has the score {shown(score)}, wanted is a number up to {_MOST_SCORE:.0f}")
    return [_text(token, where), float(score)]


def _table(value: Any, where: str) -> dict[str, Any]:
    model = _fields({"vocab": _vocabulary, "unk_token": _text})(value, where)
    return _unknown_is_known(model, where)


def _byte_pairs(value: Any, where: str) -> dict[str, Any]:
    model = _fields(
        {
            "dropout": _one_of(None),
            "unk_token": _optional(_text),
            "continuing_subword_prefix": _one_of("", None),
            "end_of_word_suffix": _one_of("</w>", "", None),
            "fuse_unk": _FLAG,
            "byte_fallback": _one_of(False),
            "ignore_merges": _FLAG,
            "vocab": _vocabulary,
            "merges": _list(_merge, _MOST_TOKENS),
        }
    )(value, where)
    vocabulary = model["vocab"]
    for first, second in model["merges"]:  # the library panics over some that are not
        if odd := [token for token in (first, second, first + second) if token not in vocabulary]:
            raise ValueError(f"{where}.merges name {shown(odd[0])}, which is not in the vocabulary")
    return _unknown_is_known(model, where)


def _unknown_is_known(model: dict[str, Any], where: str) -> dict[str, Any]:
    """The token that stands for whatever has none has to be there: the library asks for it while it encodes."""
    unknown = model["unk_token"]
    if unknown is not None and unknown not in model["vocab"]:
        raise ValueError(f"{where}.unk_token {shown(unknown)} is not in the vocabulary")
    return model


def _unigram(value: Any, where: str) -> dict[str, Any]:
    model = _fields({"unk_id": _id, "vocab": _list(_scored, _MOST_TOKENS), "byte_fallback": _one_of(False)})(
        value, where
    )
    if model["unk_id"] >= len(model["vocab"]):
        raise ValueError(f"{where}.unk_id is {model['unk_id']}, the vocabulary has {len(model['vocab'])} tokens")
    return model


_MODELS: Mapping[str, Check] = {"BPE": _byte_pairs, "Unigram": _unigram, "WordLevel": _table}
"""CLIP's and T5's; and a table of words, in which there is nothing to fear."""

# --- special tokens -----------------------------------------------------------------------------


def _seen(value: Any, where: str) -> str:
    """Text of more than spaces: of those a normalizer may leave nothing, which the library finds everywhere."""
    if not _text(value, where).strip():
        raise ValueError(f"{where} is {shown(repr(value))}, wanted is more than spaces")
    return str(value)


_added_token = _fields(
    {
        "id": _id,
        "content": _seen,
        **dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), _FLAG),
    }
)


def _token_and_id(value: Any, where: str) -> list[Any]:
    if not isinstance(value, list) or len(value) != 2:
        raise ValueError(f"{where} is {shown(value)}, wanted is a token with its id")
    return [_text(value[0], where), _id(value[1], where)]


_TYPE_ID = _one_of(0, 1)
_PLACE = _one_field(
    {
        "Sequence": _fields({"id": _one_of("A"), "type_id": _TYPE_ID}),
        "SpecialToken": _fields({"id": _text, "type_id": _TYPE_ID}),
    }
)
_PAIR = [{"Sequence": {"id": name, "type_id": 0}} for name in ("A", "B")]


def _template(value: Any, where: str) -> dict[str, Any]:
    """Special tokens around a text, which stands there once at most."""
    fields = _fields(
        {"single": _list(_PLACE, _MOST_SPECIAL), "pair": _left_out, "special_tokens": lambda each, _: each}
    )(value, where)
    tokens, single = fields["special_tokens"], fields["single"]
    if not isinstance(tokens, dict) or len(tokens) > _MOST_SPECIAL:
        raise ValueError(f"{where}.special_tokens is {shown(tokens)}, wanted is an object of at most {_MOST_SPECIAL}")
    special = _fields({"id": _text, "ids": _list(_id, _MOST_SPECIAL), "tokens": _list(_text, _MOST_SPECIAL)})
    checked = {_text(n, where): special(each, f"{where}.special_tokens.{shown(n)}") for n, each in tokens.items()}
    for name, each in checked.items():
        if each["id"] != name or not 0 < len(each["ids"]) == len(each["tokens"]):
            raise ValueError(f"{where}.special_tokens.{shown(name)} is not one token with as many ids as names")
    if sum("Sequence" in place for place in single) > 1:
        raise ValueError(f"{where}.single holds the text more than once")
    for name in (place["SpecialToken"]["id"] for place in single if "SpecialToken" in place):
        if name not in checked:
            raise ValueError(f"{where}.single names {shown(name)}, which is not in special_tokens")
    return {"single": single, "pair": _PAIR, "special_tokens": checked}


_POST_PROCESSORS: Mapping[str, Check] = {
    "RobertaProcessing": _fields(
        {"sep": _token_and_id, "cls": _token_and_id, "trim_offsets": _FLAG, "add_prefix_space": _FLAG}
    ),
    "TemplateProcessing": _template,
}

# --- the whole ----------------------------------------------------------------------------------


def _check_replacements(whole: Mapping[str, Any]) -> None:
    """What a file costs for every prompt, and once when it is loaded."""
    normalizer = whole["normalizer"] or {}
    parts: Sequence[Any] = normalizer.get("normalizers", [normalizer])
    texts = [part for part in parts if part.get("type") == "Replace" and "String" in part["pattern"]]
    growth = max((len(each["content"]) / len("".join(each["pattern"]["String"].split())) for each in texts), default=1)
    added = len(whole["added_tokens"])
    if len(parts) * max(growth, 1) > _MOST_REPLACED or len(parts) * added > _MOST_NAMED:
        raise ValueError(
            f"it writes out {len(texts)} names of textual inversions, up to {growth:.0f} times as long, for {added} "
            "added tokens: more than can be done for a prompt; use fewer of them, of fewer vectors"
        )


def _check_ids(whole: Mapping[str, Any]) -> None:
    """Special tokens that are put around a text have ids that a token has."""
    vocabulary = whole["model"]["vocab"]
    ids = {*vocabulary.values()} if isinstance(vocabulary, dict) else {*range(len(vocabulary))}
    ids |= {token["id"] for token in whole["added_tokens"]}
    processor = whole["post_processor"] or {}
    put = [processor[name][1] for name in ("sep", "cls") if name in processor]
    put += [i for special in processor.get("special_tokens", {}).values() for i in special["ids"]]
    if odd := [i for i in put if i not in ids]:
        raise ValueError(f"post_processor puts token {odd[0]} around a text, which is none of its tokens")
