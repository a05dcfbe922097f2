"""The weight file of a bundle, mapped: tensors that are read when an engine touches them, and shared by all that do."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tgate_engine.dtypes import DTYPES, storage
from tgate_engine.errors import BundleError

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
        mapped = np.memmap(path, np.uint8, "r")
        (length,) = struct.unpack("<Q", mapped[:8].tobytes())
        header = json.loads(mapped[8 : 8 + length].tobytes())
        weights = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            dtype, shape, (begin, end) = _DTYPE_OF[entry["dtype"]], entry["shape"], entry["data_offsets"]
            kind = storage(dtype)
            if end - begin != math.prod(shape) * kind.itemsize:
                raise ValueError(f"{name} has {end - begin} bytes for shape {shape}")
            array = np.frombuffer(mapped, np.uint8, end - begin, 8 + length + begin).view(kind)
            weights[name] = Weight(dtype, array.reshape(shape))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise BundleError(f"{path} is not a whole weight file ({error}); export the bundle again") from None
    return weights
