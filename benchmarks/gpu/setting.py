"""What the sections of ``benchmarks.gpu.run`` share: what they are told, engines by name, requests, clocks, memory.

Nothing here has run on a GPU. What is special to one, in all of these files: :class:`Clock`, :func:`held_bytes`,
:func:`engine_of`, and where references and peers put their networks. torch, diffusers and ``tgate_export`` are imported
where they are needed.
"""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.memory import proportional_bytes
from tgate_engine.bundle import Bundle
from tgate_engine.errors import EngineError, TgateError
from tgate_engine.inspect import guidance_stopped, ungated
from tgate_engine.manifest import Manifest
from tgate_engine.plan import Plan
from tgate_runtime.backends import MEMORIES, PRECISIONS, Backend, EngineOptions, Options, backend
from tgate_runtime.binding import Binding
from tgate_runtime.conditioning import given, inputs_of
from tgate_runtime.noise import noise
from tgate_runtime.session import Session, graphs_of


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


class Clock:
    """CUDA events where PyTorch sees a GPU. Engines return when their work is done, so the events of PyTorch's stream,
    which is idle then, enclose it."""

    def __init__(self, device: str) -> None:
        self._cuda: Any = None
        with contextlib.suppress(ImportError):
            if device == "cuda":
                import torch

                self._cuda = torch.cuda if torch.cuda.is_available() else None
        self.name = "CUDA events" if self._cuda else "perf_counter"

    def mark(self) -> Any:
        if self._cuda is None:
            return time.perf_counter()
        event = self._cuda.Event(enable_timing=True)
        event.record()
        return event

    def ms(self, begin: Any, end: Any) -> float:
        if self._cuda is None:
            return float(end - begin) * 1e3
        end.synchronize()
        return float(begin.elapsed_time(end))


def engine_of(name: str, device: str) -> Backend:
    """The engine of a :class:`Setting`'s name. Raises :class:`EngineError` where it is missing here."""
    base, *ways = name.split("+")
    options: Options = {}
    for way in ways:
        if way in PRECISIONS:
            options["precision"] = way
        elif way in MEMORIES:
            options["memory"] = way
        elif (base, way) != ("ort-cuda", "no-graphs"):
            raise EngineError(f"engine {base} has no way {way!r}")
    found = backend(base, **options)
    if base == "aoti" and device == "cuda" and "cuda" not in str(getattr(found, "device", "")):
        raise EngineError("engine aoti would run on the CPU: the PyTorch installed here sees no GPU")
    return _without_cuda_graphs(options) if "no-graphs" in ways else found


def _without_cuda_graphs(options: Options) -> Backend:
    from tgate_runtime.backends.ort_cuda import OrtCuda

    class WithoutCudaGraphs(OrtCuda):
        def providers(self) -> list[tuple[str, dict[str, str]]]:
            return [(name, {**own, "enable_cuda_graph": "0"} if own else {}) for name, own in super().providers()]

    return WithoutCudaGraphs(EngineOptions(**options))


def plans_of(manifest: Manifest) -> dict[str, Plan]:
    """The bundle's own plan, and the two derived from it."""
    chosen = manifest.plan("default")
    found = {"gated": chosen, "guidance_stopped": guidance_stopped(chosen, manifest)}
    return {name: plan for name, plan in found.items() if plan is not None} | {"ungated": ungated(chosen, manifest)}


def request(manifest: Manifest, seed: int) -> tuple[NDArray[np.float32], dict[str, NDArray[Any]]]:
    """Noise, and conditioning of noise: a GPU clocks higher on constants."""
    rows = {}
    for i, (name, spec) in enumerate(inputs_of(manifest).items()):
        shape = (1, *(int(side) for side in spec.shape[1:]))
        rows[name] = np.ones(shape, np.float32) if "mask" in name else noise(seed, i + 1, shape)
    return noise(seed, 0, manifest.latents)[None], given(manifest, rows)


def held_bytes(device: str) -> int:
    """What the first GPU has given out, to whomever; or this process's proportional set size."""
    if device == "cuda":
        return int(nvidia_smi("memory.used")) * 2**20
    return proportional_bytes()


def one_line(error: BaseException) -> str:
    """What an error says first. This project's own need no class before them."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed"
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]
    return text if isinstance(error, TgateError) else f"{type(error).__name__}: {text}"


def session_of(setting: Setting, opened: Bundle, plans: Mapping[str, Plan]) -> Session:
    """The setting's engine with the graphs of those plans."""
    engine = engine_of(setting.engine, setting.device)
    return Session(opened, engine, engine.load(opened, graphs_of(opened, [*plans.values()])))


def take(
    binding: Binding, start: NDArray[np.float32], rows: Mapping[str, NDArray[Any]], clock: Clock
) -> tuple[float, list[tuple[str, float]]]:
    """One loop: its milliseconds, and those of each step's graph."""
    plan, marks = binding.plan, []
    begin = clock.mark()
    binding.begin(start * np.float32(plan.sampler.initial_scale), rows)
    for step in plan.steps:
        call = binding.set_step(step, plan.guidance_scale)
        before = clock.mark()
        call()
        marks.append((step.graph, before, clock.mark()))
    return clock.ms(begin, marks[-1][2]), [(graph, clock.ms(before, after)) for graph, before, after in marks]


def nvidia_smi(query: str) -> str:
    """What the driver says of the first GPU."""
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "--id=0"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
