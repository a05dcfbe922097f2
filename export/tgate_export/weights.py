"""One content-addressed weight file for all graphs: a safetensors file that is also ONNX external data.

A tensor is streamed from the checkpoint once, cast and laid out as the graphs want it, and written once however
many graphs, or keys, hold the same bytes. The header's place is kept free at the front and filled in last.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir
import torch
from torch import Tensor

from tgate_engine.errors import ExportError
from tgate_export.checkpoints import Holder
from tgate_export.graphs import TracedGraph, WeightRef
from tgate_export.passes.slim import slim
from tgate_export.storage import cast, sound

WEIGHTS_FILE = "weights.safetensors"

_SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int64": "I64"}
_ONNX = {
    "float32": ir.DataType.FLOAT,
    "float16": ir.DataType.FLOAT16,
    "bfloat16": ir.DataType.BFLOAT16,
    "int64": ir.DataType.INT64,
}


@dataclass(frozen=True)
class Placement:
    """A tensor's name in the weight file, and where its bytes lie there: from the file's beginning, in bytes."""

    name: str
    offset: int
    length: int


def collect(graphs: Iterable[TracedGraph]) -> tuple[WeightRef, ...]:
    """Every weight that some graph uses, once, widest elements first, so that each lies at a multiple of its size."""
    refs = dict.fromkeys(ref for graph in graphs for ref in graph.weights.values())
    return tuple(sorted(refs, key=lambda ref: -_itemsize(ref)))


def write_weights(
    path: Path, refs: Iterable[WeightRef], holder: Callable[[str], Holder], progress: Callable[[int, int], None]
) -> dict[WeightRef, Placement]:
    """Write the weight file. ``holder``: of a component's tensors. ``progress`` gets (bytes done, bytes in all).

    Raises :class:`ExportError` for a tensor that is missing, not finite, beyond its dtype or of another shape than the
    graphs want, and before anything is written where the disk is too full.
    """
    refs = tuple(refs)
    total = sum(_nbytes(ref) for ref in refs)
    free = shutil.disk_usage(path.parent).free
    if total > free:
        raise ExportError(
            f"no space for the weights in {path.parent}: {total / 2**20:.0f} MiB wanted, {free / 2**20:.0f} MiB free; "
            "free some, or choose another --output"
        )
    header_bytes = _header_room(refs)
    placements: dict[WeightRef, Placement] = {}
    by_content: dict[tuple[str, str, tuple[int, ...]], Placement] = {}
    header: dict[str, object] = {}
    done, end = 0, 0
    with path.open("wb") as file:
        file.seek(8 + header_bytes)
        for ref in refs:
            data = _bytes_of(_fetch(holder(ref.component), ref))
            content = (hashlib.sha256(data).hexdigest(), ref.dtype, ref.shape)
            if content not in by_content:
                file.write(data)
                name = _name(ref)
                header[name] = {
                    "dtype": _SAFETENSORS[ref.dtype],
                    "shape": list(ref.shape),
                    "data_offsets": [end, end + len(data)],
                }
                by_content[content] = Placement(name, 8 + header_bytes + end, len(data))
                end += len(data)
            placements[ref] = by_content[content]
            done += len(data)
            progress(done, total)
        text = json.dumps(header, separators=(",", ":")).encode()
        assert len(text) <= header_bytes
        file.seek(0)
        file.write(struct.pack("<Q", header_bytes) + text.ljust(header_bytes))
    return placements


def place_weights(refs: Iterable[WeightRef]) -> dict[WeightRef, Placement]:
    """Where :func:`write_weights` would put tensors that all differ, for graphs without their weights."""
    refs = tuple(refs)
    placements: dict[WeightRef, Placement] = {}
    end = 8 + _header_room(refs)
    for ref in refs:
        placements[ref] = Placement(_name(ref), end, _nbytes(ref))
        end += _nbytes(ref)
    return placements


def attach(graph: TracedGraph, placements: Mapping[WeightRef, Placement]) -> None:
    """Point the graph's initializers at the weight file beside it, under the names that their tensors have there.

    Engines that share or refit weights find them by these names. Weights of one content become one initializer.
    """
    initializers = graph.model.graph.initializers
    for name, ref in graph.weights.items():
        place = placements[ref]
        value = initializers.pop(name)
        if place.name in initializers:
            value.replace_all_uses_with(initializers[place.name])
            continue
        value.name = place.name
        value.const_value = ir.ExternalTensor(
            WEIGHTS_FILE,
            place.offset,
            place.length,
            _ONNX[ref.dtype],
            shape=ir.Shape(ref.shape),
            name=place.name,
            base_dir="",
        )
        initializers[place.name] = value


def save_graph(graph: TracedGraph, path: Path) -> None:
    """Write the graph; its weights stay where :func:`attach` pointed it."""
    slim(graph.model)
    with path.open("wb") as file:
        file.write(ir.to_proto(graph.model).SerializeToString())
        file.flush()
        os.fsync(file.fileno())


def _fetch(checkpoint: Holder, ref: WeightRef) -> Tensor:
    shape = tuple(reversed(ref.shape)) if ref.transposed else ref.shape
    tensor = sound(checkpoint, ref.component, ref.key, shape)
    tensor = cast(checkpoint, ref.component, ref.key, tensor, getattr(torch, ref.dtype))
    return tensor.t() if ref.transposed else tensor


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _name(ref: WeightRef) -> str:
    return f"{ref.component}.{ref.key}" + ("^T" if ref.transposed else "")


def _itemsize(ref: WeightRef) -> int:
    return int(getattr(torch, ref.dtype).itemsize)


def _nbytes(ref: WeightRef) -> int:
    count = 1
    for size in ref.shape:
        count *= size
    return count * _itemsize(ref)


def _header_room(refs: Iterable[WeightRef]) -> int:
    """Enough bytes for the header of all of them, a multiple of 64 less the length word before it."""
    room = 2 + sum(len(ref.component) + len(ref.key) + 16 * len(ref.shape) + 110 for ref in refs)
    return (room + 8 + 63) // 64 * 64 - 8
