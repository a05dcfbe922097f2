"""From a model's name to a bundle: trace every graph, stream the weights once, record goldens, commit by rename."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import tgate_engine
from tgate_engine.bundle import Bundle, digests_of, staging
from tgate_engine.errors import ExportError
from tgate_engine.manifest import (
    MANIFEST_FILE,
    Carry,


    GraphSpec,
    Manifest,
    TensorSpec,
    Tokenizer,
    dump_manifest,
)
from tgate_engine.plan import Plan, build_plan
from tgate_engine.report import Reporter
from tgate_engine.rows import STEP_ROW
from tgate_engine.sampler import Sampler
from tgate_engine.schedule import Schedule
from tgate_export import goldens, macs
from tgate_export.checkpoint import Checkpoint
from tgate_export.families import Model, find_model
from tgate_export.families.base import ConditioningInput, Family
from tgate_export.gating import AttentionSite, GatedStep, Variant, carry_name, variants
from tgate_export.graphs import TracedGraph, store_linears_transposed, trace
from tgate_export.modules import Decoder, fake_module, real_module
from tgate_export.sampling import compile_sampler
from tgate_export.tokenizers import export_tokenizer
from tgate_export.weights import WEIGHTS_FILE, attach, collect, save_graph, write_weights

TEXT_GRAPH = "text_encoder"
DECODER_GRAPH = "vae_decoder"
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}
GOLDEN_PROMPT = "a large red circle above a small blue square"
GOLDEN_SEED = 2404


@dataclass(frozen=True, kw_only=True)
class ExportSettings:
    """What the user asks for. None stands for the model's own default; sizes are in pixels."""

    model: str
    m: int | None = None
    k: int | None = None
    steps: int | None = None
    warm_up: int = 2
    fidelity_interval: int = 1
    sampler: str | None = None
    guidance_scale: float | None = None
    checkpoint: str | None = None
    height: int | None = None
    width: int | None = None
    batch: tuple[int, int] = (1, 1)
    dtype: str = "fp32"
    output: Path | None = None
    force: bool = False
    verify: bool = True


@dataclass(frozen=True)
class _Job:
    """Everything about an export that is known before the first graph is traced."""

    settings: ExportSettings
    model: Model
    family: Family
    checkpoint: Checkpoint
    schedule: Schedule
    sampler: Sampler
    guidance_scale: float
    height: int
    width: int
    latents: tuple[int, int, int]
    conditioning: tuple[ConditioningInput, ...]
    dtype: str
    decoder_dtype: str
    variants: tuple[Variant, ...]

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1


def export(settings: ExportSettings, report: Reporter, verify: Callable[[Path], None] | None = None) -> Path:
    """Build a bundle and return its directory.

    ``verify`` is given the finished bundle before it gets its name; what it raises fails the export. Raises a
    :class:`~tgate_engine.errors.TgateError` for anything the user can mend; whatever happens, the target directory
    is either the whole new bundle or what it was before.
    """
    target = settings.output or Path("bundles") / settings.model
    report.stage(f"reading {settings.model}")
    job = _prepare(settings)
    with staging(target, force=settings.force) as stage:
        manifest = _build(job, stage, report)
        (stage / MANIFEST_FILE).write_text(dump_manifest(manifest), "utf-8")
        Bundle.open(stage)
        if settings.verify and verify is not None:
            report.stage("replaying goldens")
            verify(stage)
    return target


def add_plan(
    path: Path,
    *,
    name: str,
    m: int,
    k: int,
    steps: int,
    sampler: str,
    warm_up: int = 2,
    fidelity_interval: int = 1,
    guidance_scale: float | None = None,
    force: bool = False,
) -> Plan:
    """Give a bundle one more plan over the graphs it has. The manifest is replaced atomically."""
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    if guidance_scale is not None:
        _check_guidance(guidance_scale)
        if (guidance_scale > 1) != manifest.guided:
            raise ExportError(
                f"guidance scale {guidance_scale} does not fit a bundle exported "
                f"{'with' if manifest.guided else 'without'} guidance; export again with --guidance-scale"
            )
    compiled = compile_sampler(sampler, manifest.scheduler, steps)
    plan = build_plan(
        name,
        schedule=_schedule(steps, m, k, warm_up, fidelity_interval, compiled.lead_in),
        sampler=compiled,
        guidance_scale=manifest.guidance_scale if guidance_scale is None else guidance_scale,
        graphs=manifest.graphs,
        carries=manifest.carries,
    )
    bundle.with_plan(plan, force=force)
    return plan


def _schedule(steps: int, m: int, k: int, warm_up: int, fidelity_interval: int, lead_in: int = 0) -> Schedule:
    return Schedule(
        steps=steps,
        gate=m,
        self_interval=k,
        warm_up=warm_up,
        fidelity_interval=fidelity_interval,
        lead_in=lead_in,
    )


def _check_guidance(scale: float) -> None:
    if not 0 <= scale < float("inf"):
        raise ExportError(f"the guidance scale must be a finite number of at least 0, got {scale}")


def _prepare(settings: ExportSettings) -> _Job:
    """Check everything that can be checked before work starts."""
    model = find_model(settings.model)
    family = model.family
    if settings.dtype not in DTYPES:
        raise ExportError(f"unknown dtype {settings.dtype!r}; choose one of {', '.join(DTYPES)}")
    low, high = settings.batch
    if not 1 <= low <= high:
        raise ExportError(f"--batch wants N or LOW:HIGH with 1 <= LOW <= HIGH, got {low}:{high}")
    steps = model.steps if settings.steps is None else settings.steps
    gate = model.gate if settings.m is None else settings.m
    interval = model.self_interval if settings.k is None else settings.k
    _schedule(steps, gate, interval, settings.warm_up, settings.fidelity_interval)
    guidance = model.guidance_scale if settings.guidance_scale is None else settings.guidance_scale
    _check_guidance(guidance)

    checkpoint = Checkpoint.open(settings.checkpoint or model.location(), prefer_half=settings.dtype != "fp32")
    found = checkpoint.model_index.get("_class_name")
    if found not in family.pipeline_classes:
        raise ExportError(
            f"{checkpoint.root} holds a {found}; --model {settings.model} wants {' or '.join(family.pipeline_classes)}"
        )
    family.check(checkpoint)
    for component in (family.denoiser, family.decoder, *family.text_components):
        checkpoint.tensors(component)

    multiple, default = family.size_multiple(checkpoint), family.default_size(checkpoint)
    height, width = settings.height or default, settings.width or default
    for name, size, given in (("--height", height, settings.height), ("--width", width, settings.width)):
        if size % multiple or (given is not None and given < multiple):
            below = max(multiple, (given or size) // multiple * multiple)
            raise ExportError(
                f"{name} must be a multiple of {multiple} pixels for this model, got {given or size}; "
                f"the nearest are {below} and {below + multiple}"
            )
    compiled = compile_sampler(settings.sampler or model.sampler, checkpoint.scheduler_config(), steps)
    dtype = DTYPES[settings.dtype]
    vae = checkpoint.config(family.decoder)
    factor = checkpoint.vae_factor()
    return _Job(
        settings=settings,
        model=model,
        family=family,
        checkpoint=checkpoint,
        schedule=_schedule(steps, gate, interval, settings.warm_up, settings.fidelity_interval, compiled.lead_in),
        sampler=compiled,
        guidance_scale=guidance,
        height=height,
        width=width,
        latents=(int(vae["latent_channels"]), height // factor, width // factor),
        conditioning=tuple(family.conditioning(checkpoint, height, width)),
        dtype=dtype,
        # Some decoders overflow in half precision and say so.
        decoder_dtype="float32" if vae.get("force_upcast", True) else dtype,
        variants=variants(guided=guidance > 1, fidelity_reuse=settings.fidelity_interval > 1),
    )


def _build(job: _Job, stage: Path, report: Reporter) -> Manifest:
    family, checkpoint = job.family, job.checkpoint
    names = [TEXT_GRAPH, DECODER_GRAPH, *(variant.name for variant in job.variants)]
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())

    report.progress(0, len(names), f"tracing {TEXT_GRAPH}")
    tokenizers = [
        export_tokenizer(
            checkpoint, name, f"ids.{i}", int(checkpoint.config(component)["max_position_embeddings"]),
            stage / "tokenizer" / f"{i}.json",
        )
        for i, (name, component) in enumerate(zip(family.tokenizers, family.text_components, strict=True))
    ]
    traced = [_trace_text(job, mode, tokenizers)]
    report.progress(1, len(names), f"tracing {DECODER_GRAPH}")
    traced.append(_trace_decoder(job, mode))
    denoiser = fake_module(mode, family, checkpoint, family.denoiser, getattr(torch, job.dtype))
    sites = family.attention(denoiser)
    transposed = store_linears_transposed(denoiser)
    carries: dict[str, Carry] = {}
    for variant in job.variants:
        report.progress(len(traced), len(names), f"tracing {variant.name}")
        graph = _trace_step(job, mode, denoiser, transposed, sites, variant, carries)
        carries |= {c.name: c for c in _carries_of(graph, sites, variant)}
        traced.append(graph)
    report.progress(len(names), len(names), "traced")

    report.stage("streaming weights")
    placements = write_weights(
        stage / WEIGHTS_FILE, collect(traced), checkpoint,
        lambda done, total: report.progress(done, total, "streaming weights"),
    )
    graphs: dict[str, GraphSpec] = {}
    for graph in traced:
        images = job.settings.batch[0] if job.settings.batch[0] == job.settings.batch[1] else 1
        graphs[graph.name] = GraphSpec(
            file=f"{graph.name}.onnx",
            inputs=graph.inputs,
            outputs=graph.outputs,
            macs=macs.count(
                graph.model, frozenset(graph.weights), 1 if graph.name in (TEXT_GRAPH, DECODER_GRAPH) else images
            ),
        )
        attach(graph, placements)
        save_graph(graph, stage / f"{graph.name}.onnx")

    def plan(name: str, schedule: Schedule, sampler: Sampler) -> Plan:
        return build_plan(
            name,
            schedule=schedule,
            sampler=sampler,
            guidance_scale=job.guidance_scale,
            graphs=graphs,
            carries=tuple(carries.values()),
        )

    plans = {"default": plan("default", job.schedule, job.sampler)}
    if job.guided:
        plans["guidance_stopped"] = plan("guidance_stopped", job.schedule.guidance_stopped(), job.sampler)
    plans["ungated"] = plan("ungated", job.schedule.ungated(), job.sampler)

    recorded: dict[str, goldens.Golden] = {}
    if job.settings.verify:
        report.stage("recording goldens in eager PyTorch")
        recorded = _record_goldens(job, stage, tokenizers, plan)
    return Manifest(
        model=job.settings.model,
        family=family.name,
        licence=checkpoint.licence(),
        dtype=job.dtype,
        height=job.height,
        width=job.width,
        latents=job.latents,
        batch=job.settings.batch,
        guided=job.guided,
        guidance_scale=job.guidance_scale,
        zero_negative=family.zero_negative(checkpoint),
        weights=WEIGHTS_FILE,
        text=TEXT_GRAPH,
        decoder=DECODER_GRAPH,
        graphs=graphs,
        carries=tuple(carries.values()),
        conditioning=tuple(c.conditioning for c in job.conditioning),
        tokenizers=tuple(tokenizers),
        plans=plans,
        goldens=recorded,
        files=digests_of(stage),
        scheduler=_plain(checkpoint.scheduler_config()),
        tools=_tools(),
    )


def _trace_text(job: _Job, mode: FakeTensorMode, tokenizers: Sequence[Tokenizer]) -> TracedGraph:
    family, checkpoint = job.family, job.checkpoint
    dtype = getattr(torch, job.dtype)
    encoders = [fake_module(mode, family, checkpoint, c, dtype) for c in family.text_components]
    module = family.text(encoders)
    transposed = store_linears_transposed(module)
    return trace(
        TEXT_GRAPH,
        module,
        mode=mode,
        inputs=[TensorSpec(name=t.input, dtype="int64", shape=(1, t.length)) for t in tokenizers],
        outputs={c.conditioning.name: 1 for c in job.conditioning if c.conditioning.source == "text"},
        batch=(1, 1),
        components={f"{c}.": c for c in family.text_components},
        transposed=transposed,
    )


def _trace_decoder(job: _Job, mode: FakeTensorMode) -> TracedGraph:
    family, checkpoint = job.family, job.checkpoint
    dtype = getattr(torch, job.decoder_dtype)
    module = Decoder(
        fake_module(mode, family, checkpoint, family.decoder, dtype), checkpoint.config(family.decoder), dtype
    )
    transposed = store_linears_transposed(module)
    return trace(
        DECODER_GRAPH,
        module,
        mode=mode,
        inputs=[TensorSpec(name="latents", dtype="float32", shape=(1, *job.latents))],
        outputs={"image": 1},
        batch=(1, 1),
        components={"vae.": family.decoder},
        transposed=transposed,
    )


def _trace_step(
    job: _Job,
    mode: FakeTensorMode,
    denoiser: nn.Module,
    transposed: frozenset[str],
    sites: Sequence[AttentionSite],
    variant: Variant,
    carries: Mapping[str, Carry],
) -> TracedGraph:
    conditioning = {c.conditioning.name: c for c in job.conditioning}
    step = GatedStep(denoiser, job.family.denoise, sites, variant, tuple(conditioning), getattr(torch, job.dtype))

    def spec(name: str) -> TensorSpec:
        if name in carries:
            return TensorSpec(name=name, dtype=carries[name].dtype, shape=carries[name].shape)
        stem = name.rpartition(".")[0]
        if stem in conditioning:
            dtype = job.dtype if conditioning[stem].follows_dtype else "float32"
            return TensorSpec(name=name, dtype=dtype, shape=("batch", *conditioning[stem].shape))
        tail = (STEP_ROW,) if name == "step" else job.latents
        return TensorSpec(name=name, dtype="float32", shape=("batch", *tail))

    with step.attached():
        return trace(
            variant.name,
            step,
            mode=mode,
            inputs=[spec(name) for name in step.input_names],
            outputs=step.output_batches,
            batch=job.settings.batch,
            components={"denoiser.": job.family.denoiser},
            transposed=frozenset(f"denoiser.{name}" for name in transposed),
        )


def _carries_of(graph: TracedGraph, sites: Sequence[AttentionSite], variant: Variant) -> list[Carry]:
    """The carries that a graph gives, with the shapes it gives them in."""
    outputs = {tensor.name: tensor for tensor in graph.outputs}
    found = []
    for kind, mean in variant.stores:
        for i, site in enumerate(s for s in sites if s.kind == kind):
            tensor = outputs[carry_name(kind, i, mean)]
            found.append(
                Carry(
                    name=tensor.name, module=site.module, attention=kind, mean=mean,
                    dtype=tensor.dtype, shape=tensor.shape,
                )
            )
    return found


def _record_goldens(
    job: _Job, stage: Path, tokenizers: Sequence[Tokenizer], plan: Callable[[str, Schedule, Sampler], Plan]
) -> dict[str, goldens.Golden]:
    family, checkpoint, directory = job.family, job.checkpoint, stage / "golden"
    recorded: dict[str, goldens.Golden] = {}
    text = family.text([real_module(family, checkpoint, c) for c in family.text_components])
    names = [c.conditioning.name for c in job.conditioning if c.conditioning.source == "text"]
    conditioning: dict[str, torch.Tensor] = {}
    batch = job.settings.batch[0]
    for half, prompt in (("positive", GOLDEN_PROMPT), ("negative", "")):
        ids = {t.input: torch.tensor([_ids(stage / t.file, t, prompt)]) for t in tokenizers}
        with torch.no_grad():
            outputs = dict(zip(names, text(*ids.values()), strict=True))
        if half == "positive":
            recorded["text"] = goldens.record_graph(
                directory / "text.safetensors", TEXT_GRAPH, ids, outputs, goldens.TOLERANCES[job.dtype]
            )
        conditioning |= {f"{n}.{half}": v.expand(batch, *v.shape[1:]) for n, v in outputs.items()}
        conditioning |= {
            f"{c.conditioning.name}.{half}": torch.tensor(c.conditioning.value).expand(batch, -1)
            for c in job.conditioning
            if c.conditioning.source == "constant"
        }
    del text
    if not job.guided:
        conditioning = {name: value for name, value in conditioning.items() if name.endswith(".positive")}

    denoiser = real_module(family, checkpoint, family.denoiser)
    noise = torch.randn((batch, *job.latents), generator=torch.Generator().manual_seed(GOLDEN_SEED))
    by_name = {variant.name: variant for variant in job.variants}
    final = noise
    schedules = goldens.golden_schedules(
        fidelity_reuse=job.settings.fidelity_interval > 1, guided=job.guided, lead_in=job.sampler.lead_in
    )
    for name, schedule in schedules.items():
        sampler = compile_sampler(job.sampler.name, checkpoint.scheduler_config(), schedule.steps)
        short = plan(name, schedule, sampler)
        latents = goldens.walk(short, family, denoiser, by_name, noise, conditioning, job.guidance_scale)
        final = latents[-1]
        recorded[name] = goldens.record_plan(
            directory / f"{name}.safetensors", short, latents, noise, conditioning, job.dtype
        )
    del denoiser

    decoder = Decoder(
        real_module(family, checkpoint, family.decoder), checkpoint.config(family.decoder), torch.float32
    )
    with torch.no_grad():
        image = decoder(final[:1])
    recorded["image"] = goldens.record_graph(
        directory / "image.safetensors",
        DECODER_GRAPH,
        {"latents": final[:1]},
        {"image": image},
        goldens.IMAGE_TOLERANCES[job.decoder_dtype],
    )
    return recorded


def _ids(file: Path, tokenizer: Tokenizer, prompt: str) -> list[int]:
    import tokenizers as library  # noqa: PLC0415  (the name is taken by this package's own module)

    ids = list(library.Tokenizer.from_file(str(file)).encode(prompt).ids)
    if len(ids) > tokenizer.length:
        ids = [*ids[: tokenizer.length - 1], ids[-1]]
    return ids + [tokenizer.pad_id] * (tokenizer.length - len(ids))


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's config as plain JSON values, without diffusers' private notes except the class name."""
    return {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"}


def _tools() -> dict[str, str]:
    names = ("torch", "diffusers", "transformers", "onnx-ir", "onnxscript")
    versions = {name: metadata.version(name) for name in names}
    return {"tgate-engine": tgate_engine.__version__, "python": platform.python_version(), **versions}


