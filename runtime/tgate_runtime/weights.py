"""The weight file of a bundle, mapped: tensors that are read when an engine touches them, and shared by all that do."""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from io import BufferedReader
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tgate_engine.dtypes import DTYPES, storage
from tgate_engine.errors import BundleError
from tgate_engine.onnx_form import Placed
from tgate_engine.plain_files import open_plain
from tgate_engine.reader import Reader, parse_json

MOST_HEADER_BYTES = 64 << 20
"""How large a header may be: a hundred times SDXL's, which names 2,500 tensors."""
_DTYPE_OF = {dtype.safetensors: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True, eq=False)
class Weight:
    """One tensor: the manifest's name of its ``dtype``, and ``array``, a read-only view of the file in the storage
    dtype, which keeps the file mapped for as long as it lives."""

    dtype: str
    array: NDArray[Any]


def map_weights(path: Path) -> dict[str, Weight]:
    """Every tensor of a safetensors file, by its name, which is also its initializer's name in the graphs.

    Nothing but the header is read. Raises :class:`BundleError` where that is damaged.
    """
    try:
        with open_plain(path) as file:
            places = _places(file)
            mapped = np.memmap(file, np.uint8, "r")
        weights = {}
        for name, place in places.items():
            array = np.frombuffer(mapped, np.uint8, place.length, place.offset).view(storage(place.dtype))
            weights[name] = Weight(place.dtype, array.reshape(place.shape))
    except (OSError, ValueError, BundleError) as error:
        raise _damaged(path, error) from None
    return weights


def read_places(path: Path) -> dict[str, Placed]:
    """Where every tensor of a safetensors file lies, by its name. Raises :class:`BundleError` where its header is
    damaged."""
    try:
        with open_plain(path) as file:
            return _places(file)
    except (OSError, ValueError, BundleError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> BundleError:
    return BundleError(f"{path} is not a whole weight file ({error!s:.200}); export the bundle again")


def _places(file: BufferedReader) -> dict[str, Placed]:
    """Those of the file's header, each inside the file. Raises :class:`ValueError` or :class:`BundleError`."""
    start = file.read(8)
    if len(start) < 8:
        raise ValueError("it ends in its first word")
    (header_bytes,) = struct.unpack("<Q", start)
    if header_bytes > MOST_HEADER_BYTES:
        raise ValueError(f"its header would hold {header_bytes} bytes, of at most {MOST_HEADER_BYTES}")
    text = file.read(header_bytes)
    if len(text) < header_bytes:
        raise ValueError("it ends in its header")
    header = Reader(parse_json(text), "its header")
    first, end = 8 + header_bytes, file.seek(0, os.SEEK_END)
    names = [name for name in header.data if name != "__metadata__"]
    return {name: _place(Reader(header.get(name, dict), f"tensor {name!r:.60}"), first, end) for name in names}


def _place(entry: Reader, first: int, end: int) -> Placed:
    """One tensor's place. ``first``, ``end``: where tensors begin, and the file ends, in bytes."""
    dtype = _DTYPE_OF[entry.choice("dtype", tuple(_DTYPE_OF))]
    shape, offsets = entry.whole_tuple("shape", least=0), entry.whole_tuple("data_offsets", least=0)
    length = prod(shape) * storage(dtype).itemsize
    if len(offsets) != 2 or offsets[1] - offsets[0] != length or first + offsets[1] > end:
        raise ValueError(f"{entry.where} of shape {list(shape)!r:.60} has {list(offsets)!r:.60} of {end - first} bytes")
    return Placed(dtype, shape, first + offsets[0], length)
