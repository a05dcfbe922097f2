"""Small changes to files that are sound: the shape stays, a few places do not.

Whoever only flips bits never gets past a checksum, a bracket or a length. So files are taken apart, changed where they
mean something, and put together again; sometimes bits are flipped all the same. Every function is pure: the same input
and the same numbers of ``rng`` give the same file.
"""

from __future__ import annotations

import base64
import binascii
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from tests.hostile import NUMBERS, OTHERS, TEXTS, Raw

Mutator = Callable[[bytes, Random], bytes]

_SIZES = (0, 1, 2, 7, 8, 127, 128, 255, 256, 2**15, 2**16 - 1, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**64 - 1)
_PLAIN: Sequence[Any] = (
    *(0, 1, 2, 3, -1, 0.5, -0.0, 1e-40, 3e38, 255, 2**16, 2**31, 2**40, 2**62),
    *(True, False, None, "", "x", [], {}),
)
"""What any parser reads, and no bound has to refuse."""
_MOST_BYTES = 1 << 20


# --- bytes --------------------------------------------------------------------------------------


def mutate_bytes(data: bytes, rng: Random, words: Sequence[bytes] = ()) -> bytes:
    """A few changes that know nothing of the format; ``words`` are put in among them."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randint(0, len(changed))
        match rng.randrange(8 if words else 7):
            case 0:
                del changed[at:]
            case 1:
                del changed[at : at + rng.choice((1, 1, 2, 4, 32))]
            case 2:
                changed[at:at] = bytes([rng.choice((0, 10, 32, 127, 128, 255))]) * rng.choice((1, 1, 4, 100))
            case 3:
                start = rng.randint(0, len(changed))
                changed[at:at] = changed[start : start + rng.choice((1, 4, 16, 256))]
            case 4:
                width = rng.choice((1, 2, 4, 8))
                number = rng.choice(_SIZES) % (1 << 8 * width)
                changed[at : at + width] = number.to_bytes(width, rng.choice(("little", "big")))
            case 7:
                changed[at : at + rng.choice((0, 0, 1, 8))] = rng.choice(words)
            case _ if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
    return bytes(changed[:_MOST_BYTES])


def with_words(*words: str) -> Mutator:
    """:func:`mutate_bytes` that knows words of the format."""
    known = [word.encode("utf-8", "surrogatepass") for word in words]
    return lambda data, rng: mutate_bytes(data, rng, known)


def mutate_picture(data: bytes, rng: Random) -> bytes:
    """Bytes; where it is a PNG, with checksums that fit."""
    changed = mutate_bytes(data, rng)
    if not changed.startswith(b"\x89PNG") or rng.random() < 0.2:
        return changed
    fixed, at = bytearray(changed), 8
    while at + 12 <= len(fixed):
        (length,) = struct.unpack_from(">I", fixed, at)
        end = at + 8 + length
        if end + 4 > len(fixed):
            break
        struct.pack_into(">I", fixed, end, zlib.crc32(fixed[at + 4 : end]))
        at = end + 4
    return bytes(fixed)


# --- JSON ---------------------------------------------------------------------------------------


def mutate_json(data: bytes, rng: Random) -> bytes:
    """Values of other types, bad numbers, keys that are missing, foreign or there twice; sometimes bytes."""
    if rng.random() < 0.05:
        return mutate_bytes(data, rng)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, rng)
    return json_text(edited(value, rng))


def edited(value: Any, rng: Random) -> Any:
    """A JSON value with one to four changes. ``value`` itself is left as it is."""
    whole = value
    for _ in range(rng.choice((1, 1, 2, 4))):
        whole = _edited(whole, whole, rng)
    return whole


def _edited(value: Any, whole: Any, rng: Random) -> Any:
    """Goes down to some place, and changes what is there."""
    if isinstance(value, (dict, list)) and value and rng.random() < 0.95:
        keys: list[Any] = [*value] if isinstance(value, dict) else [*range(len(value))]
        deeper = [key for key in keys if isinstance(value[key], (dict, list))]
        key = rng.choice(deeper if deeper and rng.random() < 0.6 else keys)
        if rng.random() < 0.9:
            changed: Any = dict(value) if isinstance(value, dict) else list(value)
            changed[key] = _edited(value[key], whole, rng)
            return changed
        return _without_or_with(value, key, rng)
    if isinstance(value, str) and rng.random() < 0.5:
        return _text(value, rng)
    if type(value) in (int, float) and rng.random() < 0.4:
        return value + 1 if rng.random() < 0.5 else -value
    match rng.randrange(12):
        case 0:
            return rng.choice(NUMBERS)
        case 1:
            return rng.choice(TEXTS)
        case 2:
            return rng.choice(OTHERS)
        case 3 | 4 | 5:
            return _somewhere(whole, rng)
        case _:
            return rng.choice(_PLAIN)


def _without_or_with(value: Any, key: Any, rng: Random) -> Any:
    """A list or an object with an entry less, or one more, or in another order."""
    if isinstance(value, list):
        changed = list(value)
        match rng.randrange(3):
            case 0:
                del changed[key]
            case 1:
                changed[key:key] = [value[key]] * rng.choice((1, 1, 3, 300))
            case _:
                changed.reverse()
        return changed
    entries = dict(value)
    kept = entries.pop(key)
    if rng.random() < 0.5:
        other = rng.choice(["", "x", "__proto__", "digest", *value])
        entries[other] = kept
    return entries


def _text(text: str, rng: Random) -> Any:
    """A text with a character more or less; where it holds JSON or base64, what it holds is changed."""
    if text[:1] in "[{" and text and rng.random() < 0.8:
        try:
            return json_text(edited(json.loads(text), rng)).decode("utf-8", "replace")
        except (ValueError, RecursionError):
            pass
    if len(text) > 64 and rng.random() < 0.8:
        try:
            return base64.b64encode(mutate_bytes(base64.b64decode(text, validate=True), rng)).decode()
        except (binascii.Error, ValueError):
            pass
    at = rng.randint(0, len(text))
    match rng.randrange(4):
        case 0:
            return text[:at]
        case 1:
            return text[:at] + text[at + 1 :]
        case 2:
            return text + text
        case _:
            return text[:at] + rng.choice(("\0", "\n", "\x1b[2J", "/", "..", ".", "0", "ß", "\u202e", " ")) + text[at:]


def _somewhere(whole: Any, rng: Random) -> Any:
    """A value from elsewhere in the same document."""
    value = whole
    while isinstance(value, (dict, list)) and value and rng.random() < 0.8:
        value = rng.choice([*value.values()] if isinstance(value, dict) else value)
    return value


def json_text(value: Any) -> bytes:
    """A JSON value as text, in which a :class:`tests.hostile.Raw` goes in as it is, and so do halves of surrogate
    pairs, as escapes."""
    raws: list[str] = []

    def marked(item: Any) -> Any:
        if isinstance(item, Raw):
            raws.append(item)
            return f"raw {len(raws) - 1} raw"
        if isinstance(item, dict):
            return {key: marked(each) for key, each in item.items()}
        if isinstance(item, list):
            return [marked(each) for each in item]
        if isinstance(item, int) and abs(item) > 10**300:
            return marked(Raw("1" + "0" * 400))
        return item

    try:
        text = json.dumps(marked(value))
    except RecursionError:
        return b"[" * 100_000
    for number, raw in enumerate(raws):
        text = text.replace(f'"raw {number} raw"', raw)
    return text.encode("utf-8", "replace")


# --- safetensors --------------------------------------------------------------------------------


def mutate_safetensors(data: bytes, rng: Random) -> bytes:
    """The header's JSON, whose length is told as it is then; sometimes another length, or bytes."""
    if rng.random() < 0.1 or len(data) < 8:
        return mutate_bytes(data, rng)
    (length,) = struct.unpack("<Q", data[:8])
    header, rest = data[8 : 8 + length], data[8 + length :]
    if rng.random() < 0.8:
        header = mutate_json(header, rng)
    if rng.random() < 0.2:
        rest = mutate_bytes(rest, rng)
    length = rng.choice(_SIZES) if rng.random() < 0.03 else len(header)
    return struct.pack("<Q", length) + header + rest
