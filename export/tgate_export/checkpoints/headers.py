"""Headers of safetensors files, checked before any library opens the file.

The format: eight bytes that say how long the header is, the header, a JSON object, and the tensors' bytes without gaps.
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tgate_engine.errors import ExportError
from tgate_export.checkpoints.base import Stored
from tgate_export.checkpoints.files import kind_of, open_regular, parse_object, quoted

HEADER_BYTES = 32 << 20
"""Longest header; trainers write what they were shown into that of a LoRA, some MiB."""

NAME_LENGTH = 1024
DIMENSIONS = 8
LARGEST = 1 << 48
"""Of a size, and of the elements of a tensor."""

_METADATA = "__metadata__"
_BITS: Mapping[str, int] = {
    **dict.fromkeys(("F4", "F6_E2M3", "F6_E3M2"), 0),  # in part of a byte: known, and read by nothing here
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself: its tensors, and texts by name."""

    tensors: Mapping[str, Stored]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """The checked header of a safetensors file. Reads no values, however large the file says they are.

    Raises :class:`ExportError` naming the file, the tensor and what is wrong with it.
    """
    where = f"{path} is not a whole safetensors file"
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        try:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if length < 0:
                raise ExportError(f"{where} (it has {size} bytes); download it again")
            if length > min(HEADER_BYTES, size - 8):
                raise ExportError(
                    f"{where} (its header has {length} bytes by its own account, in a file of {size}, and may have "
                    f"{HEADER_BYTES}); download it again"
                )
            text = file.read(length)
        except OSError as error:
            raise ExportError(f"{where} ({error}); download it again") from None
    if not text.startswith(b"{"):
        raise ExportError(f"{where} (its header does not begin with an object); download it again")
    data = parse_object(text, f"{path}: the header")
    metadata = _texts(path, data.pop(_METADATA, {}))
    tensors: dict[str, Stored] = {}
    places: list[tuple[int, int, str]] = []
    for name, entry in data.items():
        tensors[name], begin, end = _tensor(path, name, entry)
        places.append((begin, end, name))
    reached = 0
    for begin, end, name in sorted(places):
        if begin != reached:
            raise ExportError(
                f"{where} (tensor {quoted(name)} begins at byte {begin}, and the one before it ends at {reached}); "
                "download it again"
            )
        reached = end
    if reached != size - 8 - length:
        raise ExportError(
            f"{where} (its tensors have {reached} bytes, and {size - 8 - length} follow the header); download it again"
        )
    return Header(tensors, metadata)


def _texts(path: Path, metadata: Any) -> dict[str, str]:
    if not isinstance(metadata, dict):
        raise ExportError(f"{path}: {_METADATA} is {kind_of(metadata)}, and an object of texts is wanted")
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise ExportError(f"{path}: {_METADATA} has {quoted(key)} = {quoted(value)}, and a text is wanted")
    return metadata


def _tensor(path: Path, name: str, entry: Any) -> tuple[Stored, int, int]:
    """One entry, and where its bytes begin and end behind the header."""
    where = f"{path}: tensor {quoted(name)}"
    if len(name) > NAME_LENGTH or not name.isprintable():
        raise ExportError(f"{where} has a name that is too long ({len(name)} characters) or not printable")
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        what = f"the keys {quoted(sorted(entry))}" if isinstance(entry, dict) else kind_of(entry)
        raise ExportError(f"{where} has {what}, and dtype, shape and data_offsets are wanted; download it again")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _BITS:
        raise ExportError(f"{where} has dtype = {quoted(dtype)}; one of {', '.join(_BITS)} is wanted")
    if not _whole_numbers(shape) or len(shape) > DIMENSIONS or math.prod(shape) > LARGEST:
        raise ExportError(
            f"{where} has shape = {quoted(shape)}; at most {DIMENSIONS} whole numbers from 0, of at most {LARGEST} "
            "elements, are wanted"
        )
    if not _whole_numbers(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ExportError(f"{where} has data_offsets = {quoted(offsets)}; its first byte and the one after its last")
    held, wanted = offsets[1] - offsets[0], math.prod(shape) * _BITS[dtype] // 8
    if _BITS[dtype] and held != wanted:
        raise ExportError(f"{where} has {held} bytes, and {dtype} {shape} has {wanted}; download it again")
    return Stored(dtype, tuple(shape)), offsets[0], offsets[1]


def _whole_numbers(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value <= LARGEST for value in values)
