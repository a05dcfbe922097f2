"""Samplers that export compiled ahead of time, so that a plan of other steps needs no torch.

One safetensors file: for each sampler a float32 tensor [calls, 12] whose rows are step rows
(:func:`tgate_engine.step.step_row`, guidance 0), the calls of every number of steps one after the other; and metadata
``samplers``, JSON, that says which rows are whose. Coefficients are rounded to float32, as a step row is anyway.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from tgate_engine.errors import BundleError, SamplerError
from tgate_engine.sampler import Sampler, SamplerStep
from tgate_engine.step import INPUT_SCALE, LATENTS_COLUMNS, NOISE_COLUMN, OUTPUT_COLUMNS, TIMESTEP, step_row

_METADATA = "samplers"


def dump_tables(samplers: Iterable[Sampler]) -> bytes:
    """The file's content for those samplers."""
    rows: dict[str, list[Any]] = {}
    entries: list[dict[str, Any]] = []
    for sampler in samplers:
        own = rows.setdefault(sampler.name, [])
        entry = sampler.to_json()
        del entry["calls"]
        entries.append({**entry, "first": len(own), "count": len(sampler.calls)})
        own += [step_row(call, 0.0) for call in sampler.calls]
    return save({name: np.stack(own) for name, own in rows.items()}, {_METADATA: json.dumps(entries)})


def load_tables(path: Path) -> dict[tuple[str, int], Sampler]:
    """Every sampler of the file, by name and number of steps. Raises :class:`BundleError` where it is damaged."""
    try:
        with safe_open(path, "np") as file:
            entries = json.loads(file.metadata()[_METADATA])
            rows = {name: file.get_tensor(name) for name in list(file.keys())}
        return {(entry["name"], entry["steps"]): _sampler(entry, rows) for entry in entries}
    except (OSError, ValueError, LookupError, TypeError, SafetensorError, SamplerError) as error:
        raise BundleError(f"{path} holds no tables of samplers ({error}); export the bundle again") from None


def _sampler(entry: Mapping[str, Any], rows: Mapping[str, Any]) -> Sampler:
    own = rows[entry["name"]][entry["first"] : entry["first"] + entry["count"]].astype(np.float64).tolist()
    calls = [
        SamplerStep(
            timestep=row[TIMESTEP],
            input_scale=row[INPUT_SCALE],
            latents=tuple(row[LATENTS_COLUMNS]),
            outputs=tuple(row[OUTPUT_COLUMNS]),
            noise=row[NOISE_COLUMN],
        )
        for row in own
    ]
    fields = {key: value for key, value in entry.items() if key not in ("first", "count")}
    return Sampler(**{**fields, "calls": tuple(calls)})
