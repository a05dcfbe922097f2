"""The models that can be exported, by name, and the architectures behind them.

A family is one file here. It says how an architecture loads, what conditions it, which of its modules are self- and
cross-attention, and nothing about gating, graphs or samplers.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from tgate_engine.errors import ExportError
from tgate_export.families.base import Family
from tgate_export.families.sdxl import Sdxl


@dataclass(frozen=True, kw_only=True)
class Model:
    """One name of ``--model``: its family, where its weights are, and the settings the paper or its authors use."""

    family: Family
    checkpoint: str | None
    steps: int
    gate: int
    self_interval: int
    guidance_scale: float
    sampler: str = "dpmpp_2m"

    def location(self) -> str:
        """A directory or a hub id. The embedded model lies inside this package."""
        return str(_embedded()) if self.checkpoint is None else self.checkpoint


MODELS: Mapping[str, Model] = {
    "mini-sdxl": Model(family=Sdxl(), checkpoint=None, steps=25, gate=10, self_interval=5, guidance_scale=5.0),
    "sdxl": Model(
        family=Sdxl(),
        checkpoint="stabilityai/stable-diffusion-xl-base-1.0",
        steps=25,
        gate=10,
        self_interval=5,
        guidance_scale=5.0,
    ),
}


def find_model(name: str) -> Model:
    """The model of that name. Raises :class:`ExportError` with the nearest name."""
    if name in MODELS:
        return MODELS[name]
    near = difflib.get_close_matches(name, MODELS, n=1, cutoff=0.0)
    raise ExportError(f"unknown model {name!r}; did you mean {near[0]!r}? Models: {', '.join(MODELS)}")


def _embedded() -> Path:
    return Path(str(resources.files("tgate_export") / "models" / "mini-sdxl"))
