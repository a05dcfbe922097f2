"""What the sections of ``benchmarks.gpu.run`` share: what they are told, engines by name, memory.

What is special to a GPU: :func:`held_bytes`, :func:`engine_of`, the clock of
``benchmarks.loops``, and where references and peers put their networks. torch, diffusers and ``tgate_export`` are
imported where they are needed.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.memory import proportional_bytes
from tgate_engine.bundle import Bundle
from tgate_engine.errors import EngineError
from tgate_engine.plan import Plan
from tgate_runtime.engines import open_engine
from tgate_runtime.engines.protocol import MEMORIES, PRECISIONS, Engine, EngineOptions, Options
from tgate_runtime.session import Session


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is exported where no bundle was brought. The published sizes get random weights."""

    steps: int
    m: int
    k: int
    dtype: str
    weights: str

    def settings(self, model: str, **changes: Any) -> Any:
        """The exporter's settings; ``changes`` are some of them."""
        from tgate_export.build import ExportSettings

        own = {"steps": self.steps, "m": self.m, "k": self.k, "dtype": self.dtype, "weights": self.weights}
        return ExportSettings(model=model, components=("denoiser",), verify=False, **{**own, **changes})


CASES: Mapping[str, Case] = {
    "sdxl": Case(steps=25, m=10, k=5, dtype="fp16", weights="random"),
    "pixart-alpha": Case(steps=25, m=10, k=5, dtype="fp16", weights="random"),
    "mini-sdxl": Case(steps=8, m=5, k=2, dtype="fp32", weights="checkpoint"),
    "mini-pixart": Case(steps=8, m=5, k=2, dtype="fp32", weights="checkpoint"),
}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a section is told. ``engine``: a name, with ways after it: ``ort-cuda+no-graphs``, ``openvino+bf16``."""

    model: str
    device: str
    bundles: str
    engine: str = ""
    repeats: int = 5
    warm_ups: int = 1
    seed: int = 0
    compile_mode: str = "max-autotune"
    graphs: str = "all"

    @property
    def reference_file(self) -> Path:
        return Path(self.bundles) / f"{self.model}.reference.npz"

    def open(self) -> Bundle:
        return Bundle.open(Path(self.bundles) / self.model, check_digests=False)


def engine_of(name: str, device: str) -> Engine:
    """The engine of a :class:`Setting`'s name. Raises :class:`EngineError` where it is missing here."""
    base, *ways = name.split("+")
    options: Options = {}
    for way in ways:
        if way in PRECISIONS:
            options["precision"] = way
        elif way in MEMORIES:
            options["memory"] = way
        elif way != "no-graphs" or base not in ("aoti", "ort-cuda"):
            raise EngineError(f"engine {base} has no way {way!r}")
    found = open_engine(base, **options)
    if base == "aoti" and device == "cuda" and "cuda" not in str(getattr(found, "device", "")):
        raise EngineError("engine aoti would run on the CPU: the PyTorch installed here sees no GPU")
    return _without_cuda_graphs(base, options) if "no-graphs" in ways else found


def _without_cuda_graphs(base: str, options: Options) -> Engine:
    if base == "aoti":
        from tgate_runtime.engines.aoti import Aoti

        class PlainAoti(Aoti):
            captured = ()

        return PlainAoti(EngineOptions(**options))
    from tgate_runtime.engines.ort_cuda import OrtCuda

    class PlainOrtCuda(OrtCuda):
        captured = ()

    return PlainOrtCuda(EngineOptions(**options))


def held_bytes(device: str) -> int:
    """What the first GPU has given out, to whomever; or this process's proportional set size."""
    if device == "cuda":
        return int(nvidia_smi("memory.used")) * 2**20
    return proportional_bytes()


def session_of(setting: Setting, opened: Bundle, plans: Mapping[str, Plan]) -> Session:
    """The setting's engine with the graphs of those plans."""
    return Session.open(opened, engine=engine_of(setting.engine, setting.device), plans=[*plans.values()])


def nvidia_smi(query: str) -> str:
    """What the driver says of the first GPU."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "--id=0"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
