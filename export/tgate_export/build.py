"""From a model's name to a bundle: trace every graph, stream the weights once, record goldens, commit by rename."""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import tgate_engine
from tgate_engine.bundle import Bundle, digests_of, staging
from tgate_engine.errors import ExportError
from tgate_engine.manifest import MANIFEST_FILE, Carry, Golden, GraphSpec, Manifest, dump_manifest
from tgate_engine.plan import Plan, build_plan
from tgate_engine.report import Reporter
from tgate_engine.sampler import Sampler
from tgate_engine.schedule import Schedule
from tgate_export import goldens, macs
from tgate_export.graphs import store_linears_transposed
from tgate_export.job import ExportSettings, Job, check_guidance, prepare, schedule_of
from tgate_export.modules import fake_module
from tgate_export.sampling import compile_sampler
from tgate_export.tokenizers import export_tokenizer
from tgate_export.tracing import DECODER_GRAPH, TEXT_GRAPH, carries_of, trace_decoder, trace_step, trace_text
from tgate_export.weights import WEIGHTS_FILE, attach, collect, save_graph, write_weights

__all__ = ["ExportSettings", "add_plan", "export"]


def export(settings: ExportSettings, report: Reporter, verify: Callable[[Path], None] | None = None) -> Path:
    """Build a bundle and return its directory.

    ``verify`` is given the finished bundle before it gets its name; what it raises fails the export. Raises a
    :class:`~tgate_engine.errors.TgateError` for anything the user can mend; whatever happens, the target directory
    is either the whole new bundle or what it was before.
    """
    target = settings.output or Path("bundles") / settings.model
    report.stage(f"reading {settings.model}")
    job = prepare(settings)
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
        check_guidance(guidance_scale)
        if (guidance_scale > 1) != manifest.guided:
            raise ExportError(
                f"guidance scale {guidance_scale} does not fit a bundle exported "
                f"{'with' if manifest.guided else 'without'} guidance; export again with --guidance-scale"
            )
    compiled = compile_sampler(sampler, manifest.scheduler, steps)
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
    names = [TEXT_GRAPH, DECODER_GRAPH, *(variant.name for variant in job.variants)]
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())

    report.progress(0, len(names), f"tracing {TEXT_GRAPH}")
    tokenizers = [
        export_tokenizer(
            checkpoint,
            name,
            f"ids.{i}",
            checkpoint.token_length(name, component),
            stage / "tokenizer" / f"{i}.json",
        )
        for i, (name, component) in enumerate(zip(family.tokenizers, family.text_components, strict=True))
    ]
    traced = [trace_text(job, mode, tokenizers)]
    report.progress(1, len(names), f"tracing {DECODER_GRAPH}")
    traced.append(trace_decoder(job, mode))
    denoiser = fake_module(mode, family, checkpoint, family.denoiser, getattr(torch, job.dtype))
    sites = family.attention(denoiser)
    transposed = store_linears_transposed(denoiser)
    carries: dict[str, Carry] = {}
    for variant in job.variants:
        report.progress(len(traced), len(names), f"tracing {variant.name}")
        graph = trace_step(job, mode, denoiser, transposed, sites, variant, carries)
        carries |= {c.name: c for c in carries_of(graph, sites, variant)}
        traced.append(graph)
    report.progress(len(names), len(names), "traced")

    report.stage("streaming weights")
    placements = write_weights(
        stage / WEIGHTS_FILE,
        collect(traced),
        checkpoint,
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

    recorded: dict[str, Golden] = {}
    if job.settings.verify:
        report.stage("recording goldens in eager PyTorch")
        recorded = goldens.record(job, stage, tokenizers, plan)
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


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A scheduler's config as plain JSON values, without diffusers' private notes except the class name."""
    return {key: value for key, value in config.items() if not key.startswith("_") or key == "_class_name"}


def _tools() -> dict[str, str]:
    names = ("torch", "diffusers", "transformers", "onnx-ir", "onnxscript")
    versions = {name: metadata.version(name) for name in names}
    return {"tgate-engine": tgate_engine.__version__, "python": platform.python_version(), **versions}
