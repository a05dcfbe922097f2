"""From a model's name to a bundle: trace every graph, stream the weights once, record goldens, commit by rename."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import tgate_engine
from tgate_engine.atomic import staging
from tgate_engine.bundle import DEFAULT, Bundle, digests_of
from tgate_engine.control import is_control, scale_name
from tgate_engine.graph import CONTROL, DENOISE, REFERENCE, TEXT, GraphSpec, TensorSpec
from tgate_engine.manifest import MANIFEST_FILE, Golden, Manifest, Shape, Tokenizer
from tgate_engine.manifest_json import dump_manifest
from tgate_engine.plan_report import report_of, save_report
from tgate_engine.report import Reporter
from tgate_engine.sampler import Fact
from tgate_engine.sampler_tables import dump_tables
from tgate_export import goldens, macs, scratch
from tgate_export.families import EMBEDDED, location
from tgate_export.families.base import Size, control_component
from tgate_export.graph_check import check_written
from tgate_export.graphs import TracedGraph, store_linears_transposed
from tgate_export.job import ExportSettings, Job, prepare
from tgate_export.modules import fake_module
from tgate_export.plans import make_plans
from tgate_export.sampling import compile_tables
from tgate_export.starts import compile_starts
from tgate_export.tokenizers import export_tokenizers
from tgate_export.tracing import (
    trace_control,
    trace_decoder,
    trace_encoder,
    trace_image,
    trace_preview,
    trace_reference,
    trace_step,
    trace_text,
)
from tgate_export.weights import WEIGHTS_FILE, attach, collect, place_weights, save_graph, write_weights

__all__ = ["ExportSettings", "export"]

SAMPLERS_FILE = "samplers.safetensors"


def export(settings: ExportSettings, report: Reporter, verify: Callable[[Path], None] | None = None) -> Path:
    """Build a bundle and return its directory.

    ``verify`` is given the finished bundle before it gets its name, where it has goldens; what it raises fails the
    export. Raises a :class:`~tgate_engine.errors.TgateError` for anything the user can mend; whatever happens, the
    target directory is either the whole new bundle or what it was before.
    """
    report.stage(f"reading {settings.model}")
    job = prepare(settings)
    with staging(settings.target, force=settings.force) as stage:
        manifest = _build(job, stage, report)
        (stage / MANIFEST_FILE).write_text(dump_manifest(manifest), "utf-8")
        report.stage("checking the bundle")
        bundle = Bundle.open(stage)
        if job.model.checkpoint == EMBEDDED:
            _take_reports(bundle, Path(location(settings.model)))
        if settings.verify and verify is not None and manifest.goldens:
            report.stage("replaying goldens")
            verify(stage)
    return settings.target


def _take_reports(bundle: Bundle, model: Path) -> None:
    """What was measured of the bundle's plans and ships with the model, where this export came out the same."""
    for plan in bundle.manifest.plans.values():
        measured = report_of(bundle, plan, model)
        if measured is not None:
            save_report(bundle, measured)


@dataclass(frozen=True)
class _Traced:
    """A shape's graphs, by the names that plans use, and the names of their files."""

    size: Size
    batch: tuple[int, int]
    graphs: Mapping[str, TracedGraph]
    files: Mapping[str, str]


def _build(job: Job, stage: Path, report: Reporter) -> Manifest:
    family, checkpoint = job.family, job.checkpoint
    tokenizers = export_tokenizers(family, checkpoint, stage) if "text" in job.components else []
    report.stage("tracing")
    traced = _trace(job, tokenizers, report)
    distinct = {file: shape.graphs[name] for shape in traced for name, file in shape.files.items()}
    refs = collect(list(distinct.values()))
    if job.settings.weights == "none":
        placements = place_weights(refs)
    else:
        report.stage("writing weights")
        placements = write_weights(
            stage / WEIGHTS_FILE,
            refs,
            job.holder,
            lambda done, total: report.progress(done >> 20, total >> 20, "MiB"),
        )
    report.stage("writing graphs")
    specs: dict[str, GraphSpec] = {}
    for done, (file, graph) in enumerate(distinct.items()):
        report.progress(done, len(distinct), graph.name)
        least, most = graph.batch
        images = least if least == most else 1
        specs[file] = GraphSpec(
            file=file,
            role=graph.role,
            batch=graph.batch,
            inputs=graph.inputs,
            outputs=graph.outputs,
            macs=macs.count(graph.model, frozenset(graph.weights), images),
            scratch_bytes=scratch.peak_bytes(graph.model) // images,
        )
        attach(graph, placements)
        save_graph(graph, stage / file)
        check_written(stage / file, specs[file], graph, placements)
    shapes = tuple(_shape(job.at(shape.size), shape, specs) for shape in traced)
    carries: dict[str, dict[str, Fact]] = {
        name: dict(facts) for variant in job.variants for part in variant.parts for name, facts in part.facts.items()
    }
    plans = make_plans(
        DEFAULT,
        job.method,
        job.plan_settings,
        sampler=job.sampler,
        guidance_scale=job.guidance_scale,
        guided=job.guided,
        graphs=shapes[0].graphs,
        carries=carries,
        late=job.late,
    )
    samplers = compile_tables(job.sampler.name, job.scheduler)
    starts = compile_starts(samplers, job.sampler, job.scheduler) if "encoder" in job.components else {}
    (stage / SAMPLERS_FILE).write_bytes(dump_tables(samplers, starts))
    recorded: dict[str, Golden] = {}
    if job.settings.verify and job.settings.weights == "checkpoint":
        recorded = goldens.record(
            job,
            stage,
            tokenizers,
            shapes[0].graphs,
            carries,
            on_golden=lambda name: report.stage(f"recording goldens in eager PyTorch: {name}"),
        )
        for oracle in dict.fromkeys(golden.oracle for golden in recorded.values()):
            report.note(f"{', '.join(n for n, g in recorded.items() if g.oracle == oracle)}: recorded by {oracle}")
    report.stage("computing digests")
    return Manifest(
        model=job.settings.model,
        family=family.name,
        licence=checkpoint.licence(),
        dtype=job.dtype,
        frames=job.size.frames,
        fps=family.fps if job.size.frames > 1 else 0,
        guidance=job.guidance,
        guidance_scale=job.guidance_scale,
        guidance_rescale=job.settings.guidance_rescale,
        clip_skip=job.settings.clip_skip,
        zero_negative=family.zero_negative(checkpoint),
        weights="" if job.settings.weights == "none" else WEIGHTS_FILE,
        samplers=SAMPLERS_FILE,
        shapes=shapes,
        carries=carries,
        conditioning=tuple(c.conditioning for c in job.conditioning),
        tokenizers=tuple(tokenizers),
        plans=plans,
        goldens=recorded,
        files=digests_of(stage),
        scheduler=_plain(job.scheduler),
        tools=_tools(),
    )


def _shape(job: Job, traced: _Traced, specs: Mapping[str, GraphSpec]) -> Shape:
    return Shape(
        width=job.size.width,
        height=job.size.height,
        batch=traced.batch,
        latents=job.latents,
        constants={c.conditioning.name: c.value for c in job.conditioning if c.conditioning.source == "constant"},
        graphs={name: specs[file] for name, file in traced.files.items()},
    )


def _trace(job: Job, tokenizers: Sequence[Tokenizer], report: Reporter) -> list[_Traced]:
    """Every graph of every shape; those that do not differ between shapes are traced once."""
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    around = [c for c in job.components if c != "denoiser"]
    once = [c for c in around if c in ("text", "reference")]
    small = job.preview is not None
    per_size = len(around) - len(once) + small + len(job.batches) * len(job.variants)
    total, done = len(job.sizes) * per_size + len(once), 0

    def trace(graph: Callable[[], TracedGraph], label: str) -> TracedGraph:
        nonlocal done
        report.progress(done, total, label)
        traced = graph()
        done += 1
        return traced

    unsized: list[TracedGraph] = []
    if "text" in around:
        unsized.append(trace(lambda: trace_text(job, mode, tokenizers), "the text encoder"))
    if "reference" in around:
        unsized.append(trace(lambda: trace_reference(job, mode), "the IP-Adapter's encoder"))
    beside: dict[Size, list[TracedGraph]] = {}
    for size in job.sizes:
        sized = job.at(size)
        beside[size] = []
        if "image" in around:
            beside[size].append(trace(partial(trace_image, sized, mode), f"the image encoder, {size}"))
        if "decoder" in around:
            beside[size].append(trace(partial(trace_decoder, sized, mode), f"the decoder, {size}"))
        if job.preview is not None:
            beside[size].append(trace(partial(trace_preview, sized, mode), f"the small decoder, {size}"))
        if "encoder" in around:
            beside[size].append(trace(partial(trace_encoder, sized, mode), f"the encoder, {size}"))
    denoisers: dict[str, tuple[nn.Module, frozenset[str]]] = {}
    for component in dict.fromkeys(map(job.denoiser_of, job.variants)):
        module = fake_module(mode, job.family, job.checkpoint, component, getattr(torch, job.dtype))
        denoisers[component] = module, store_linears_transposed(module)
    nets: dict[str, tuple[nn.Module, frozenset[str]]] = {}
    for net in job.controls:
        module = fake_module(mode, job.family, job.checkpoint, control_component(net), getattr(torch, job.dtype))
        nets[net] = module, store_linears_transposed(module)
    shapes: list[_Traced] = []
    for size in job.sizes:
        for batch in job.batches:
            sized, graphs, carries = job.at(size), list[TracedGraph](), dict[str, TensorSpec]()
            for variant in job.variants:
                graph = trace(
                    partial(trace_step, sized, mode, *denoisers[job.denoiser_of(variant)], variant, batch, carries),
                    f"{variant.name}, {size}",
                )
                stored = {name for part in variant.parts for name in part.writes}
                carries |= {tensor.name: tensor for tensor in graph.outputs if tensor.name in stored}
                graphs.append(graph)
            for net, (module, own) in nets.items():
                wanted = _wanted(graphs, net)
                total += len(wanted)
                for name, taken in wanted.items():
                    make = partial(trace_control, sized, mode, net, module, own, f"control-{net}-{name}", taken, batch)
                    graphs.append(trace(make, f"ControlNet {net} beside {name}, {size}"))
            everything = [*unsized, *beside[size], *graphs]
            files = {g.name: _file(job, g, size, batch) for g in everything}
            shapes.append(_Traced(size, batch, {g.name: g for g in everything}, files))
    report.progress(total, total)
    return shapes


def _wanted(denoisers: Sequence[TracedGraph], net: str) -> dict[str, tuple[str, ...]]:
    """Each of the different things that denoising graphs take of a ControlNet, by the first graph that does."""
    own = scale_name(net)
    found: dict[tuple[str, ...], str] = {}
    for graph in denoisers:
        taken = tuple(t.name for t in graph.inputs if is_control(t.name) and t.name.startswith(f"{own}."))
        if graph.role == DENOISE and taken:
            found.setdefault(taken, graph.name)
    return {name: taken for taken, name in found.items()}


def _file(job: Job, graph: TracedGraph, size: Size, batch: tuple[int, int]) -> str:
    """A graph's file: external data may not lie above it, so all graphs are beside the weights."""
    of_size = "" if size == job.sizes[0] or graph.role in (TEXT, REFERENCE) else f"-{size}"
    several = len(job.batches) > 1 and graph.role in (DENOISE, CONTROL)
    of_batch = f"-batch-{batch[0]}-{batch[1]}" if several else ""
    return f"{graph.name}{of_size}{of_batch}.onnx"


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's config as plain JSON values, with those of diffusers' private notes that a sampler goes by."""
    noted = ("_class_name", "_use_default_values")
    return {key: value for key, value in config.items() if not key.startswith("_") or key in noted}


def _tools() -> dict[str, str]:
    names = ("torch", "diffusers", "transformers", "onnx-ir", "onnxscript")
    versions = {name: metadata.version(name) for name in names}
    return {"tgate-engine": tgate_engine.__version__, "python": platform.python_version(), **versions}
