"""What ``benchmarks.gpu.run`` measures: each function is one section, made in a process of its own, and gives JSON values.

Nothing here has run on a GPU: what is special to one is in :class:`Clock`, :func:`held_bytes`, :func:`engine_of` and the
word "cuda" in :func:`reference` and :func:`peers`. torch, diffusers and ``tgate_export`` are imported where they are needed.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tgate_engine.bundle import Bundle
from tgate_engine.errors import EngineError, TgateError
from tgate_engine.inspect import guidance_stopped, ungated
from tgate_engine.manifest import Manifest, resolve
from tgate_engine.plan import Plan, build_plan
from tgate_runtime.backends import MEMORIES, PRECISIONS, Backend, EngineOptions, Options, backend
from tgate_runtime.benchmark import cpu_model
from tgate_runtime.binding import Binding
from tgate_runtime.conditioning import given, inputs_of
from tgate_runtime.noise import noise
from tgate_runtime.session import Session, graphs_of
from tgate_runtime.verify import relative_error

PACKAGES = (
    *("torch", "triton", "diffusers", "transformers", "tgate", "onnx", "onnxruntime", "onnxruntime-gpu", "openvino"),
    *("tensorrt", "tensorrt-rtx-cu13", "cuda-bindings", "numpy"),
)
TOLERANCES = {"float32": 1e-4, "float16": 3e-2, "bfloat16": 2e-1, "f16": 3e-2, "bf16": 2e-1}
"""As ``tgate verify`` allows, by the bundle's dtype and the engine's precision."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is exported where no bundle was brought. The published sizes get random weights."""

    steps: int
    m: int
    k: int
    dtype: str
    weights: str

    def settings(self, model: str, **changes: Any) -> Any:
        from tgate_export.build import ExportSettings

        own = {"steps": self.steps, "m": self.m, "k": self.k, "dtype": self.dtype, "weights": self.weights}
        return ExportSettings(model=model, components=("denoiser",), verify=False, **{**own, **changes})


CASES: Mapping[str, Case] = {
    "sdxl": Case(steps=25, m=10, k=5, dtype="fp16", weights="random"),
    "pixart-alpha": Case(steps=25, m=10, k=5, dtype="fp16", weights="random"),
    "mini-sdxl": Case(steps=8, m=4, k=2, dtype="fp32", weights="checkpoint"),
    "mini-pixart": Case(steps=8, m=4, k=2, dtype="fp32", weights="checkpoint"),
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
            return [(name, {**given, "enable_cuda_graph": "0"} if given else {}) for name, given in super().providers()]

    return WithoutCudaGraphs(EngineOptions(**options))


# --- sections -----------------------------------------------------------------------------------


def machine(setting: Setting) -> dict[str, Any]:
    """Settings that every section depends on, and the engines of ``setting.engine`` (with commas between)."""
    engines = {}
    for name in setting.engine.split(","):
        try:
            engines[name] = {"version": engine_of(name, setting.device).version, "says": "ready"}
        except EngineError as error:
            engines[name] = {"version": "", "says": str(error)}
    versions = {}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    settings: dict[str, Any] = {"cpu": cpu_model(), "cores": len(os.sched_getaffinity(0)), "packages": versions}
    settings |= {"python": platform.python_version(), "threads": os.environ.get("OMP_NUM_THREADS", "the engines' own")}
    if setting.device == "cuda":
        gpu = _nvidia_smi("name,driver_version,memory.total").split(", ")
        settings |= dict(zip(("gpu", "driver", "gpu_memory_mib"), gpu, strict=True))
    return {"settings": settings, "engines": engines}


def bundle(setting: Setting) -> dict[str, Any]:
    """The bundle, exported if it was not brought, and what it was made with."""
    path, begin = Path(setting.bundles) / setting.model, time.perf_counter()
    brought = (path / "manifest.json").exists()
    if not brought:
        from tgate_engine.report import Lines
        from tgate_export.build import export

        export(CASES[setting.model].settings(setting.model, output=path), Lines())
    manifest = setting.open().manifest
    plan = manifest.plan("default")
    return {
        **{"brought": brought, "export_s": None if brought else time.perf_counter() - begin, "dtype": manifest.dtype},
        **{"height": manifest.height, "width": manifest.width, "sampler": plan.sampler.name},
        **{"n": plan.schedule.steps, "m": plan.schedule.gate, "k": plan.schedule.self_interval},
        **{"warm_up": plan.schedule.warm_up, "guidance_scale": plan.guidance_scale, "batch": 1},
        "macs": {name: chosen.macs(manifest.graphs)[1] for name, chosen in plans_of(manifest).items()},
        "tools": dict(manifest.tools),
    }


def reference(setting: Setting) -> dict[str, Any]:
    """Four steps through every graph in eager PyTorch and float32, with the bundle's own weights, kept in a file."""
    if setting.reference_file.exists():
        return {"file": str(setting.reference_file), "brought": True}
    import torch
    from torch.nn.modules.module import register_module_forward_pre_hook

    from tgate_export.conditioning import halves
    from tgate_export.gating import GatedStep
    from tgate_export.goldens import walk
    from tgate_export.job import prepare
    from tgate_export.modules import real_module

    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    manifest, device = setting.open().manifest, torch.device(setting.device)
    size = {"height": manifest.height, "width": manifest.width}
    job = prepare(CASES[setting.model].settings(setting.model, steps=4, m=3, k=2, warm_up=0, **size))
    plan = build_plan(
        "short",
        schedule=job.schedule,
        sampler=job.sampler,
        guidance_scale=job.guidance_scale,
        graphs=manifest.graphs,
        carries=manifest.carries,
    )
    generator = torch.Generator().manual_seed(setting.seed)
    positive, negative = (
        {
            c.conditioning.name: torch.ones(1, *c.shape) if c.mask else torch.randn((1, *c.shape), generator=generator)
            for c in job.conditioning
        }
        for _ in range(2)
    )
    rows = halves(job.conditioning, positive, negative, guided=job.guided)
    start = torch.randn((1, *job.latents), generator=generator)
    # Rounded as the bundle's weights are, so that what is compared is arithmetic alone.
    denoiser = real_module(job.family, job.checkpoint, job.family.denoiser, getattr(torch, manifest.dtype))
    denoiser = denoiser.float().to(device)

    def move(module: Any, inputs: Any) -> Any:  # walk makes its step rows on the CPU
        return tuple(tensor.to(device) for tensor in inputs) if isinstance(module, GatedStep) else None

    hook, begin = register_module_forward_pre_hook(move), time.perf_counter()
    try:
        variants = {variant.name: variant for variant in job.variants}
        on_device = {name: row.to(device) for name, row in rows.items()}
        latents = walk(plan, job.family, denoiser, variants, start.to(device), on_device, job.guidance_scale)
    finally:
        hook.remove()
    tensors = {f"latents.{i}": x.cpu().numpy() for i, x in enumerate(latents)}
    tensors |= {f"conditioning.{name}": row.numpy() for name, row in rows.items()}
    np.savez(setting.reference_file, plan=np.array(json.dumps(plan.to_json())), **tensors)
    return {"file": str(setting.reference_file), "brought": False, "walk_s": time.perf_counter() - begin}


def check(setting: Setting) -> dict[str, Any]:
    """Every step of the reference on the engine, each from the reference's latents. Errors are the largest difference
    over the largest value: of the latents, and of what the step changed them by, which hides less."""
    opened = setting.open()
    with np.load(setting.reference_file) as file:
        tensors = {name: file[name] for name in file.files}
    plan = Plan.from_json(json.loads(str(tensors.pop("plan"))))
    wanted = [tensors[f"latents.{i}"] for i in range(len(plan.steps) + 1)]
    rows = {name.removeprefix("conditioning."): t for name, t in tensors.items() if name.startswith("conditioning.")}
    with _session(setting, opened, {"short": plan}) as session:
        binding, steps = Binding(session, plan, 1), []
        binding.begin(wanted[0], rows)
        for step in plan.steps:
            binding.set_step(step, plan.guidance_scale)()
            got, before, after = binding.latents(), wanted[step.index], wanted[step.index + 1]
            errors = (relative_error(got, after), relative_error(got - before, after - before))
            finite = bool(np.isfinite(got).all())
            steps.append({"graph": step.graph, **dict.fromkeys(("error", "change_error"))})
            if finite:
                steps[-1] |= dict(zip(("error", "change_error"), errors, strict=True))
            binding.replace_latents(after)
        options = session.backend.options
    tolerance = max(TOLERANCES[opened.manifest.dtype], TOLERANCES.get(options.precision or "", 0.0))
    finite_errors = [step["error"] for step in steps if step["error"] is not None]
    worst = max(finite_errors) if len(finite_errors) == len(steps) else None
    agrees = worst is not None and worst <= tolerance
    return {"worst": worst, "tolerance": tolerance, "agrees": agrees, "precision": options.precision, "steps": steps}


def opening(setting: Setting) -> dict[str, Any]:
    """From a new process to a bound request. A first opening compiles where the engine does so ahead of time."""
    cached, begin = _cached(), time.perf_counter()
    engine = engine_of(setting.engine, setting.device)
    engine_s, opened = time.perf_counter() - begin, setting.open()
    plans = plans_of(opened.manifest)
    loaded = Session(opened, engine, engine.load(opened, graphs_of(opened, [*plans.values()])))
    open_s = time.perf_counter() - begin - engine_s
    bindings = [Binding(loaded, plan, 1) for plan in plans.values()]
    bind_s = time.perf_counter() - begin - engine_s - open_s
    start, rows = request(opened.manifest, setting.seed)
    _take(bindings[0], start, rows, Clock("cpu"))
    first_loop_s = time.perf_counter() - begin - engine_s - open_s - bind_s
    times = {"engine_s": engine_s, "open_s": open_s, "bind_s": bind_s, "first_gated_loop_s": first_loop_s}
    return {**times, "cache_entries": {"before": cached, "after": _cached()}}


def loops(setting: Setting) -> dict[str, Any]:
    """Whole loops of the three plans, in turns; all times are medians in milliseconds."""
    opened, clock = setting.open(), Clock(setting.device)
    manifest = opened.manifest
    plans = plans_of(manifest)
    start, rows = request(manifest, setting.seed)
    whole: dict[str, list[float]] = {name: [] for name in plans}
    wall: dict[str, list[float]] = {name: [] for name in plans}
    steps: dict[str, list[float]] = {name: [] for name in plans}
    graphs: dict[str, list[float]] = {}
    with _session(setting, opened, plans) as session:
        bindings = {name: Binding(session, plan, 1) for name, plan in plans.items()}
        for turn in range(setting.warm_ups + setting.repeats):
            for name, binding in bindings.items():
                begin = time.perf_counter()
                loop_ms, taken = _take(binding, start, rows, clock)
                if turn >= setting.warm_ups:
                    wall[name].append((time.perf_counter() - begin) * 1e3)
                    whole[name].append(loop_ms)
                    steps[name] += [ms for _, ms in taken]
                    for graph, ms in taken:
                        graphs.setdefault(graph, []).append(ms)
        finite = all(bool(np.isfinite(binding.latents()).all()) for binding in bindings.values())
        options = session.backend.options
    medians = {name: statistics.median(ms) for name, ms in graphs.items()}
    return {
        "clock": clock.name,
        "graphs": {
            name: {"ms": ms, "tflop_per_s": 2 * manifest.graphs[name].macs.all / ms / 1e9}
            for name, ms in medians.items()
        },
        "plans": {
            name: {
                "ms": statistics.median(whole[name]),
                "wall_ms": statistics.median(wall[name]),
                "step_ms": {"p50": statistics.median(steps[name]), "p99": float(np.percentile(steps[name], 99))},
                "runs_ms": whole[name],
            }
            for name in plans
        },
        "options": {"precision": options.precision, "memory": options.memory, "threads": options.threads},
        "finite": finite,
    }


def memory(setting: Setting) -> dict[str, Any]:
    """Bytes held with the graph ``full`` (``setting.graphs`` is "one") or all of the gated plan's loaded and run once:
    of the GPU, all that it holds; on the CPU, the process's proportional set size."""
    before = held_bytes(setting.device)
    engine, opened = engine_of(setting.engine, setting.device), setting.open()
    names = opened.manifest.plan("default").graphs()
    names = names[:1] if setting.graphs == "one" else names
    buffers: dict[str, Any] = {}  # tensors of one name share one, as they do in a request
    kept = []
    for name, executable in engine.load(opened, names).items():
        spec = opened.manifest.graphs[name]
        for tensor in (*spec.inputs, *spec.outputs):
            if tensor.name not in buffers:
                buffers[tensor.name] = engine.allocate(resolve(tensor.shape, 1), tensor.dtype)
        inputs, outputs = ({t.name: buffers[t.name] for t in some} for some in (spec.inputs, spec.outputs))
        call = executable.bind(inputs, outputs)
        call()
        call()  # engines that record CUDA graphs do so the second time at the latest
        kept.append((executable, call))
    return {"graphs": list(names), "before_bytes": before, "held_bytes": held_bytes(setting.device) - before}


def peers(setting: Setting) -> dict[str, Any]:
    """Whole loops of diffusers' own pipeline, of the same with torch.compile, and of the ``tgate`` package, in turns
    with those of ``setting.engine``. A peer that fails is left out, with what it said."""
    import torch

    opened, clock = setting.open(), Clock(setting.device)
    manifest, plans = opened.manifest, plans_of(opened.manifest)
    start, rows = request(manifest, setting.seed)
    session = _session(setting, opened, plans)
    loop: dict[str, Callable[[], object]] = {}
    for name in ("gated", "ungated"):
        binding = Binding(session, plans[name], 1)
        loop[f"{setting.engine} {name}"] = lambda binding=binding: _take(binding, start, rows, Clock("cpu"))  # type: ignore[misc]
    plan = plans["gated"]
    method = {"gate_step": plan.schedule.gate, "sp_interval": plan.schedule.self_interval, "fi_interval": 1}
    pipes = {
        "diffusers eager": lambda: _pipeline(setting, manifest),
        "torch.compile": lambda: _compiled(_pipeline(setting, manifest), setting.compile_mode),
        "tgate eager gated": lambda: _gating(_pipeline(setting, manifest), manifest.family),
    }
    failed, first_s = {}, {}
    for name, build in pipes.items():
        begin = time.perf_counter()
        try:
            pipe = build()
            asked = _asked(manifest, plan, start, rows, next(iter(_network(pipe).parameters())))
            asked |= {**method, "warm_up": plan.schedule.warm_up} if "tgate" in name else {}
            run = pipe.tgate if "tgate" in name else pipe
            run(**asked)
        except Exception as error:
            failed[name] = one_line(error)
            continue
        first_s[name] = time.perf_counter() - begin
        loop[name] = lambda run=run, asked=asked: run(**asked)  # type: ignore[misc]
    taken: dict[str, list[float]] = {name: [] for name in loop}
    for turn in range(setting.warm_ups + setting.repeats):
        for name, once in loop.items():
            begin_mark = clock.mark()
            once()
            if turn >= setting.warm_ups:
                taken[name].append(clock.ms(begin_mark, clock.mark()))
    medians = {name: statistics.median(runs) for name, runs in taken.items()}
    told = {"engine": setting.engine, "torch": torch.__version__, "compile_mode": setting.compile_mode}
    return {**told, "clock": clock.name, "ms": medians, "runs_ms": taken, "first_s": first_s, "failed": failed}


SECTIONS: Mapping[str, Callable[[Setting], dict[str, Any]]] = {
    section.__name__: section for section in (machine, bundle, reference, opening, check, loops, memory, peers)
}


# --- what they share ----------------------------------------------------------------------------


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
        return int(_nvidia_smi("memory.used")) * 2**20
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("Pss:")))


def one_line(error: BaseException) -> str:
    """What an error says first. This project's own need no class before them."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")[:300]
    return text if isinstance(error, TgateError) else f"{type(error).__name__}: {text}"


def _session(setting: Setting, opened: Bundle, plans: Mapping[str, Plan]) -> Session:
    engine = engine_of(setting.engine, setting.device)
    return Session(opened, engine, engine.load(opened, graphs_of(opened, [*plans.values()])))


def _take(
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


def _cached() -> int:
    root = Path(os.environ["TGATE_CACHE"])
    return sum(1 for _ in root.glob("*/*.json")) if root.is_dir() else 0


def _nvidia_smi(query: str) -> str:
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader,nounits", "--id=0"]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()


# --- the peers: diffusers' pipelines around the same network --------------------------------------


def _pipeline(setting: Setting, manifest: Manifest) -> Any:
    import torch
    from diffusers import DPMSolverMultistepScheduler, PixArtAlphaPipeline, StableDiffusionXLPipeline

    from tgate_export.job import prepare
    from tgate_export.modules import real_module

    job = prepare(CASES[setting.model].settings(setting.model, height=manifest.height, width=manifest.width))
    network = real_module(job.family, job.checkpoint, job.family.denoiser, getattr(torch, manifest.dtype))
    scheduler = DPMSolverMultistepScheduler.from_config(manifest.scheduler)
    parts = {"vae": None, "text_encoder": None, "tokenizer": None, "scheduler": scheduler}
    if manifest.family == "sdxl":
        pipe = StableDiffusionXLPipeline(unet=network, text_encoder_2=None, tokenizer_2=None, **parts)
    else:
        pipe = PixArtAlphaPipeline(transformer=network, **parts)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(setting.device)


def _network(pipe: Any) -> Any:
    return pipe.unet if hasattr(pipe, "unet") else pipe.transformer


def _compiled(pipe: Any, mode: str) -> Any:
    import torch

    setattr(pipe, "unet" if hasattr(pipe, "unet") else "transformer", torch.compile(_network(pipe), mode=mode))
    return pipe


def _gating(pipe: Any, family: str) -> Any:
    import tgate

    return (tgate.TgateSDXLLoader if family == "sdxl" else tgate.TgatePixArtAlphaLoader)(pipe)


def _asked(
    manifest: Manifest, plan: Plan, start: NDArray[np.float32], rows: Mapping[str, NDArray[Any]], like: Any
) -> dict[str, Any]:
    """The same request, as a pipeline's arguments."""
    import torch

    tensors = {name: torch.from_numpy(np.array(row)).to(like) for name, row in {**rows, "latents": start}.items()}
    asked = {
        **{"latents": tensors["latents"], "num_inference_steps": len(plan.steps), "output_type": "latent"},
        **{"guidance_scale": plan.guidance_scale, "height": manifest.height, "width": manifest.width},
        "prompt_embeds": tensors["prompt_embeds.positive"],
        "negative_prompt_embeds": tensors["prompt_embeds.negative"],
    }
    if manifest.family == "sdxl":
        pooled = {"": tensors["pooled.positive"], "negative_": tensors["pooled.negative"]}
        return asked | {f"{half}pooled_prompt_embeds": tensor for half, tensor in pooled.items()}
    masks = {"": tensors["prompt_mask.positive"], "negative_": tensors["prompt_mask.negative"]}
    asked |= {f"{half}prompt_attention_mask": tensor for half, tensor in masks.items()}
    return asked | {"negative_prompt": None, "use_resolution_binning": False}
