"""From a model's name to a bundle: trace every graph, stream the weights once, record goldens, commit by rename."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import tgate_engine
from tgate_engine.bundle import Bundle, digests_of, staging
from tgate_engine.errors import ExportError
from tgate_engine.manifest import MANIFEST_FILE, Carry, Golden, GraphSpec, Manifest, Tokenizer, dump_manifest
from tgate_engine.plan import DENOISING_GRAPHS, Plan, build_plan
from tgate_engine.report import Reporter
from tgate_engine.sampler import Sampler
from tgate_engine.schedule import Schedule
from tgate_export import goldens, macs, scratch
from tgate_export.graphs import TracedGraph, store_linears_transposed
from tgate_export.job import ExportSettings, Job, check_guidance, prepare, schedule_of
from tgate_export.modules import fake_module
from tgate_export.sampling import compile_sampler
from tgate_export.tokenizers import export_tokenizers
from tgate_export.tracing import (
    DECODER_GRAPH,
    IMAGE_GRAPH,
    TEXT_GRAPH,
    carries_of,
    trace_decoder,
    trace_image,
    trace_step,
    trace_text,
)
from tgate_export.weights import WEIGHTS_FILE, attach, collect, place_weights, save_graph, write_weights

__all__ = ["ExportSettings", "add_plan", "export"]


def export(settings: ExportSettings, report: Reporter, verify: Callable[[Path], None] | None = None) -> Path:
    """Build a bundle and return its directory.

    ``verify`` is given the finished bundle before it gets its name, where it has goldens; what it raises fails the
    export. Raises a :class:`~tgate_engine.errors.TgateError` for anything the user can mend; whatever happens, the
    target directory is either the whole new bundle or what it was before.
    """
    target = settings.output or Path("bundles") / settings.model
    report.stage(f"reading {settings.model}")
    job = prepare(settings)
    with staging(target, force=settings.force) as stage:
        manifest = _build(job, stage, report)
        (stage / MANIFEST_FILE).write_text(dump_manifest(manifest), "utf-8")
        Bundle.open(stage)
        if settings.verify and verify is not None and manifest.goldens:
            report.stage("replaying goldens")
            verify(stage)
    return target


def add_plan(
    path: Path,
    *,
    name: str,
    m: int,
    k: int,
    steps: int | None = None,
    sampler: str | None = None,
    warm_up: int | None = None,
    fidelity_interval: int = 1,
    guidance_scale: float | None = None,
    force: bool = False,
) -> Plan:
    """Give a bundle one more plan over the graphs it has. The manifest is replaced atomically.

    ``steps``, ``sampler`` and ``warm_up``: None takes those of the default plan.
    """
    bundle = Bundle.open(path)
    manifest = bundle.manifest
    default = manifest.plan("default")
    steps = default.schedule.steps if steps is None else steps
    warm_up = default.schedule.warm_up if warm_up is None else warm_up
    if guidance_scale is not None:
        check_guidance(guidance_scale)
        if manifest.guidance != "embedded" and (guidance_scale > 1) != manifest.guided:
            raise ExportError(
                f"guidance scale {guidance_scale} does not fit a bundle exported "
                f"{'with' if manifest.guided else 'without'} guidance; export again with --guidance-scale"
            )
    compiled = compile_sampler(sampler or default.sampler.name, manifest.scheduler, steps)
    plan = build_plan(
        name,
        schedule=schedule_of(steps, m, k, warm_up, fidelity_interval, compiled.lead_in),
        sampler=compiled,
        guidance_scale=manifest.guidance_scale if guidance_scale is None else guidance_scale,
        graphs=manifest.graphs,
        carries=manifest.carries,
    )
    bundle.with_plan(plan, force=force)
    return plan


def _build(job: Job, stage: Path, report: Reporter) -> Manifest:
    family, checkpoint = job.family, job.checkpoint
    tokenizers = export_tokenizers(family, checkpoint, stage) if "text" in job.components else []
    traced, carries = _trace(job, tokenizers, report)
    refs = collect(traced)
    if job.settings.weights == "none":
        placements = place_weights(refs)
    else:
        report.stage("streaming weights")
        placements = write_weights(
            stage / WEIGHTS_FILE,
            refs,
            checkpoint,
            lambda done, total: report.progress(done, total, "streaming weights"),
        )
    graphs: dict[str, GraphSpec] = {}
    least, most = job.settings.batch
    images = least if least == most else 1
    for graph in traced:
        graphs[graph.name] = GraphSpec(
            file=f"{graph.name}.onnx",
            inputs=graph.inputs,
            outputs=graph.outputs,
            macs=macs.count(graph.model, frozenset(graph.weights), images if graph.name in DENOISING_GRAPHS else 1),
            scratch_bytes=scratch.peak_bytes(graph.model) // (images if graph.name in DENOISING_GRAPHS else 1),
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

    recorded: dict[str, Golden] = {}
    if job.settings.verify and job.settings.weights == "checkpoint":
        report.stage("recording goldens in eager PyTorch")
        recorded = goldens.record(job, stage, tokenizers, plan)
        for oracle in dict.fromkeys(golden.oracle for golden in recorded.values()):
            report.note(f"{', '.join(n for n, g in recorded.items() if g.oracle == oracle)}: recorded by {oracle}")
    return Manifest(
        model=job.settings.model,
        family=family.name,
        licence=checkpoint.licence(),
        dtype=job.dtype,
        height=job.size.height,
        width=job.size.width,
        frames=job.size.frames,
        fps=family.fps if job.size.frames > 1 else 0,
        latents=job.latents,
        batch=job.settings.batch,
        guidance=job.guidance,
        guidance_scale=job.guidance_scale,
        guidance_rescale=job.settings.guidance_rescale,
        clip_skip=job.settings.clip_skip,
        zero_negative=family.zero_negative(checkpoint),
        weights="" if job.settings.weights == "none" else WEIGHTS_FILE,
        text=TEXT_GRAPH if "text" in job.components else "",
        image=IMAGE_GRAPH if "image" in job.components else "",
        decoder=DECODER_GRAPH if "decoder" in job.components else "",
        graphs=graphs,
        carries=tuple(carries.values()),
        conditioning=tuple(c.conditioning for c in job.conditioning),
        tokenizers=tuple(tokenizers),
        plans=plans,
        goldens=recorded,
        files=digests_of(stage),
        scheduler=_plain(job.scheduler),
        tools=_tools(),
    )


def _trace(job: Job, tokenizers: Sequence[Tokenizer], report: Reporter) -> tuple[list[TracedGraph], dict[str, Carry]]:
    """Every graph of the bundle, and the carries between them."""
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    around: dict[str, Callable[[], TracedGraph]] = {}
    if "text" in job.components:
        around[TEXT_GRAPH] = lambda: trace_text(job, mode, tokenizers)
    if "image" in job.components:
        around[IMAGE_GRAPH] = lambda: trace_image(job, mode)
    if "decoder" in job.components:
        around[DECODER_GRAPH] = lambda: trace_decoder(job, mode)
    total = len(around) + len(job.variants)
    traced: list[TracedGraph] = []
    for name, trace in around.items():
        report.progress(len(traced), total, f"tracing {name}")
        traced.append(trace())
    denoiser = fake_module(mode, job.family, job.checkpoint, job.family.denoiser, getattr(torch, job.dtype))
    sites = job.sites
    transposed = store_linears_transposed(denoiser)
    carries: dict[str, Carry] = {}
    for variant in job.variants:
        report.progress(len(traced), total, f"tracing {variant.name}")
        graph = trace_step(job, mode, denoiser, transposed, sites, variant, carries)
        carries |= {c.name: c for c in carries_of(graph, sites, variant)}
        traced.append(graph)
    report.progress(total, total, "traced")
    return traced, carries


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's config as plain JSON values, with those of diffusers' private notes that a sampler goes by."""
    noted = ("_class_name", "_use_default_values")
    return {key: value for key, value in config.items() if not key.startswith("_") or key in noted}


def _tools() -> dict[str, str]:
    names = ("torch", "diffusers", "transformers", "onnx-ir", "onnxscript")
    versions = {name: metadata.version(name) for name in names}
    return {"tgate-engine": tgate_engine.__version__, "python": platform.python_version(), **versions}
