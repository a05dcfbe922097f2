"""Small changes to how a graph is written: what protobuf reads alike, or almost, and never writes itself."""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random

from tgate_engine.onnx_form import FORM

_FIELDS = {
    name: {int(number): kind.rstrip("*") for _, number, kind in (re.split("[=:]", text) for text in fields.split())}
    for name, fields in FORM.items()
}
_INTEGERS = (0, 1, -1, 2, 7, 20, 127, 128, 2**31 - 1, 2**31, -(2**31), -(2**31) - 1, 2**32, 2**62, 2**63 - 1, -(2**63))
_TEXTS = (b"", b"x", b"\xff", b"\xc3\xa9", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xc0\x80", b"a\x00b", b"batch")


@dataclass
class Written:
    """A field as it is written: its number and wire type, and what it holds, a number, bytes, or the fields of a
    message of a kind; ``pad``: of bytes, more than its number or its length needs."""

    number: int
    wire: int
    kind: str
    value: int | bytes | list[Written] = 0
    pad: int = 0

    def encoded(self) -> bytes:
        tag = varint(self.number << 3 | self.wire)
        if isinstance(self.value, int):
            return tag + varint(self.value % 2**64, self.pad)
        inside = self.value if isinstance(self.value, bytes) else b"".join(each.encoded() for each in self.value)
        return tag + (varint(len(inside), self.pad) if self.wire == 2 else b"") + inside


def varint(number: int, pad: int = 0) -> bytes:
    """``pad`` bytes longer than it has to be."""
    text = bytearray()
    while number > 127 or (pad and len(text) < 9):
        pad -= number <= 127
        text.append(number & 127 | 128)
        number >>= 7
    return bytes([*text, number])


def read(data: bytes, kind: str) -> list[Written]:
    """The fields of a message as protobuf writes it. Raises ValueError or IndexError for anything else."""
    fields, at = [], 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte, at = data[at], at + 1
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    while at < len(data):
        tag = number()
        inner = _FIELDS.get(kind, {}).get(tag >> 3, "bytes")
        match tag & 7:
            case 0:
                fields.append(Written(tag >> 3, 0, inner, number()))
            case 2:
                size = number()
                inside, at = data[at : at + size], at + size
                value = read(inside, inner) if inner in FORM else inside
                fields.append(Written(tag >> 3, 2, inner, value))
            case 5:
                fields.append(Written(tag >> 3, 5, inner, data[at : at + 4]))
                at += 4
            case wire:
                raise ValueError(f"wire type {wire}")
    return fields


def rewritten(data: bytes, rng: Random) -> bytes:
    """The graph with one of its fields, at any depth, written otherwise; as it is where it is no message."""
    try:
        model = read(data, "ModelProto")
    except (ValueError, IndexError):
        return data
    fields, kind = model, "ModelProto"
    while inner := [each for each in fields if isinstance(each.value, list)]:
        if rng.random() < 0.15:
            break
        # Short lists as often as long ones: a graph has hundreds of nodes and a few inputs.
        number = rng.choice(sorted({each.number for each in inner}))
        if kind == "ModelProto" and rng.random() < 0.9:
            number = inner[0].number
        chosen = rng.choice([each for each in inner if each.number == number])
        assert isinstance(chosen.value, list)
        fields, kind = chosen.value, chosen.kind
    _edit(fields, kind, rng)
    return b"".join(each.encoded() for each in model)


def _edit(fields: list[Written], kind: str, rng: Random) -> None:
    """Changes the fields of one message of a kind."""
    known = _FIELDS.get(kind, {})
    at = rng.randrange(len(fields)) if fields else 0
    case = rng.randrange(12)
    if case == 0 or not fields:
        fields.insert(at, _new(known, rng))
    elif case == 1:
        fields[at].pad = rng.choice((1, 1, 2, 5, 9))
    elif case == 2:
        del fields[at]
    elif case == 3:
        fields.insert(rng.choice((at, at + 1, len(fields))), fields[at])
    elif case == 4:
        rng.shuffle(fields)
    elif case == 5:
        fields.sort(key=lambda each: each.number)
    elif case == 6:
        fields[at].number = rng.choice((rng.choice([*known, 1]), rng.randint(1, 30), 2**29 - 1))
    elif case == 7:
        wire = fields[at].wire = rng.choice((0, 1, 2, 3, 4, 5))
        fields[at].value = 1 if wire == 0 else {1: bytes(8), 2: b"\x01", 5: bytes(4)}.get(wire, b"")
    elif isinstance(fields[at].value, int):
        fields[at].value = rng.choice(_INTEGERS)
    elif isinstance(fields[at].value, bytes) and fields[at].wire == 2:
        fields[at].value = rng.choice((*_TEXTS, varint(rng.choice(_INTEGERS) % 2**64)))
    elif isinstance(fields[at].value, bytes):
        fields[at].value = rng.choice((bytes(4), b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff", b"\x01\x00\xa0\x7f"))
    else:
        fields[at].value = rng.choice((b"", b"\x08\x01", [], [_new(_FIELDS.get(fields[at].kind, {}), rng)]))


def _new(known: dict[int, str], rng: Random) -> Written:
    """A field that a message may have, or another one."""
    if not known or rng.random() < 0.2:
        return Written(rng.randint(1, 30), 0, "int64", rng.choice(_INTEGERS))
    number = rng.choice([*known])
    kind = known[number]
    if kind in ("int32", "int64"):
        return Written(number, 0, kind, rng.choice(_INTEGERS))
    if kind == "float":
        return Written(number, 5, kind, bytes(4))
    return Written(number, 2, kind, [] if kind in FORM else rng.choice(_TEXTS))
