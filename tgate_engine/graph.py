"""One exported computation: its role, its signature, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from tgate_engine.dtypes import storage

BATCH = "batch"
"""The one symbolic dimension there is, and always the first: the images of a call."""

Dim = int | str
"""A fixed size, or :data:`BATCH`."""

Role = Literal["denoise", "text", "image", "decode", "encode", "preview", "reference", "control"]
DENOISE: Role = "denoise"
TEXT: Role = "text"
IMAGE: Role = "image"
DECODE: Role = "decode"
ENCODE: Role = "encode"
PREVIEW: Role = "preview"
REFERENCE: Role = "reference"
CONTROL: Role = "control"
ROLES: tuple[Role, ...] = get_args(Role)


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """One input or output of a graph: its name there, its dtype (see :mod:`tgate_engine.dtypes`) and its shape.

    Where the first dimension is :data:`BATCH`, row j is image j's, so the rows of any range of images are one
    contiguous piece. Both halves of guidance, and a video's frames or places, lie inside an image's row.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]

    def resolve(self, batch: int) -> tuple[int, ...]:
        """The sizes for a batch of ``batch`` images."""
        return tuple(batch if isinstance(dim, str) else dim for dim in self.shape)

    def size_bytes(self, batch: int) -> int:
        """The memory of one such tensor."""
        return math.prod(self.resolve(batch)) * storage(self.dtype).itemsize


@dataclass(frozen=True, kw_only=True)
class Macs:
    """Multiply-accumulates. ``paper`` counts linear and convolution layers, as the paper's tool does;
    ``all`` adds the two attention products."""

    paper: int
    all: int


@dataclass(frozen=True, kw_only=True)
class GraphSpec:
    """One exported computation.

    ``role``: what it is for; a host looks at this, never at names. ``batch``: the least and the largest number of
    images in one call. ``macs`` are for one image (both halves where it is guided), and so is ``scratch_bytes``, the
    most that its inner values hold at once; 0 where it is not known.
    """

    file: str
    role: Role
    batch: tuple[int, int]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    macs: Macs
    scratch_bytes: int = 0

    def input_names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.inputs)

    def output_names(self) -> tuple[str, ...]:
        return tuple(tensor.name for tensor in self.outputs)

    def batch_of(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """How many images inputs of those shapes are for; 1 where none of them says so."""
        for tensor in self.inputs:
            if tensor.shape and tensor.shape[0] == BATCH and shapes[tensor.name]:
                return shapes[tensor.name][0]
        return 1
