"""Samplers that export compiled ahead of time, so that a plan of other steps needs no torch.

One safetensors file: for each sampler a float32 tensor [calls, 12] whose rows are step rows
(:func:`tgate_engine.step.step_row`, guidance 0), the calls of every number of steps one after the other; and metadata
``samplers``, JSON, that says which rows are whose. Coefficients are rounded to float32, as a step row is anyway.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from tgate_engine.errors import BundleError, SamplerError
from tgate_engine.plain_files import open_plain, read_most
from tgate_engine.reader import parse_json
from tgate_engine.sampler import MOST_CALLS, Sampler, SamplerStep
from tgate_engine.step import INPUT_SCALE, LATENTS_COLUMNS, NOISE_COLUMN, OUTPUT_COLUMNS, TIMESTEP, step_row

MOST_BYTES = 64 << 20
"""How large the file may be; one of all samplers of 1 to 50 steps holds 150 KB."""
_METADATA = "samplers"


def dump_tables(samplers: Iterable[Sampler], further: Mapping[str, NDArray[np.float32]] | None = None) -> bytes:
    """The file's content for those samplers, and ``further`` tensors by their names
    (:data:`tgate_engine.starts.STARTS`)."""
    rows: dict[str, list[Any]] = {}
    entries: list[dict[str, Any]] = []
    for sampler in samplers:
        own = rows.setdefault(sampler.name, [])
        entry = sampler.to_json()
        del entry["calls"]
        entries.append({**entry, "first": len(own), "count": len(sampler.calls)})
        own += [step_row(call, 0.0) for call in sampler.calls]
    tensors = {name: np.stack(own) for name, own in rows.items()}
    return save({**tensors, **(further or {})}, {_METADATA: json.dumps(entries)})


def load_tables(path: Path) -> dict[tuple[str, int], Sampler]:
    """Every sampler of the file, by name and number of steps. Raises :class:`BundleError` where it is damaged."""
    try:
        with open_plain(path) as file:
            content = read_most(file, MOST_BYTES)
        rows = load(content)
        (header_bytes,) = struct.unpack("<Q", content[:8])
        entries = parse_json(parse_json(content[8 : 8 + header_bytes])["__metadata__"][_METADATA])
        tables: dict[tuple[str, int], Sampler] = {}
        for entry in entries:
            sampler = _sampler(entry, rows)
            if (sampler.name, sampler.steps) in tables:
                raise ValueError(f"{sampler.name} for {sampler.steps} steps is there twice")
            tables[sampler.name, sampler.steps] = sampler
    except (OSError, ValueError, LookupError, TypeError, AttributeError, SafetensorError, SamplerError) as error:
        raise BundleError(f"{path} holds no tables of samplers ({error!s:.200}); export the bundle again") from None
    return tables


def _sampler(entry: Mapping[str, Any], rows: Mapping[str, Any]) -> Sampler:
    first, count = entry["first"], entry["count"]
    if not (type(first) is type(count) is int and first >= 0 and 0 < count <= MOST_CALLS):
        raise ValueError(f"rows {first!r:.20} and on, {count!r:.20} of them, are not there")
    own = rows[entry["name"]][first : first + count].astype(np.float64).tolist()
    fields = {key: value for key, value in entry.items() if key not in ("first", "count")}
    return Sampler(**{**fields, "calls": tuple(map(call_of, own))})


def call_of(row: Sequence[float]) -> SamplerStep:
    """The call of a step row's 12 numbers; its guidance is not read."""
    return SamplerStep(
        timestep=row[TIMESTEP],
        input_scale=row[INPUT_SCALE],
        latents=tuple(row[LATENTS_COLUMNS]),
        outputs=tuple(row[OUTPUT_COLUMNS]),
        noise=row[NOISE_COLUMN],
    )
