"""The commands that need export: they make bundles, and what is brought to one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from tgate_cli import views
from tgate_cli.command import EXPORT_ADVICE, RUN_ADVICE, Show, needs
from tgate_engine.bundle import Bundle
from tgate_engine.errors import EngineError, ExportError
from tgate_engine.report import Reporter


def export(args: argparse.Namespace, report: Reporter) -> Show:
    """``tgate-export``: a bundle."""
    with needs("export", EXPORT_ADVICE):
        from tgate_export import build
        from tgate_export.lora import Lora
    settings = build.ExportSettings(
        model=args.model,
        m=args.m,
        k=args.k,
        steps=args.steps,
        warm_up=args.warm_up,
        fidelity_interval=args.fidelity_interval,
        sampler=args.sampler,
        guidance_scale=args.guidance_scale,
        checkpoint=args.checkpoint,
        weights=args.weights,
        components=None if args.components is None else args.components.split(","),
        loras=tuple(Lora.parse(text) for text in args.lora),
        clip_skip=args.clip_skip,
        guidance_rescale=args.guidance_rescale,
        height=args.height,
        width=args.width,
        frames=args.frames,
        batch=args.batch,
        dtype=args.dtype,
        output=args.output,
        force=args.force,
        verify=args.verify,
    )
    path = build.export(settings, report, _replay(report) if args.verify else None)
    return lambda: print(path)


def _replay(report: Reporter) -> Callable[[Path], None]:
    """What replays the goldens of a bundle that is about to get its name. Asked for before minutes of work."""
    with needs("verifying an export", f"{RUN_ADVICE}; or skip it with --no-verify"):
        from tgate_runtime.verify import verify

    def check(stage: Path) -> None:
        bundle = Bundle.open(stage, check_digests=False)
        recorders = {name: golden.oracle for name, golden in bundle.manifest.goldens.items()}
        try:
            checked = verify(bundle, on_golden=report.progress)
        except EngineError as error:
            raise ExportError(f"{error}; nothing was written (--no-verify exports without a check)") from error
        for golden in checked:
            if not golden.ok:
                raise ExportError(
                    f"golden {golden.name} has a relative error of {golden.error:.2e}, tolerance "
                    f"{golden.tolerance:.0e}: the graphs do not compute what {recorders[golden.name] or 'PyTorch'} "
                    "makes of this checkpoint; nothing was written. Report it, or export without a check (--no-verify)"
                )
            report.note(f"golden {golden.name}: worst relative error {golden.error:.2e}")

    return check


def plan(args: argparse.Namespace, report: Reporter) -> Show:
    """``tgate plan``: a further plan over the graphs of a bundle."""
    with needs("compiling a sampler", EXPORT_ADVICE):
        from tgate_export.build import add_plan

    report.stage("compiling the sampler")
    added = add_plan(
        args.bundle,
        name=args.name,
        m=args.m,
        k=args.k,
        steps=args.steps,
        warm_up=args.warm_up,
        fidelity_interval=args.fidelity_interval,
        sampler=args.sampler,
        guidance_scale=args.guidance_scale,
        force=args.force,
    )
    return lambda: print(f"{args.bundle}: plan {added.name}, {len(added.steps)} steps over {', '.join(added.graphs())}")


def embed(args: argparse.Namespace, report: Reporter) -> Show:
    """``tgate embed``: prompts encoded into a file."""
    with needs("encoding prompts", EXPORT_ADVICE):
        from tgate_export.embed import embed as encode

    if not args.output.parent.is_dir():
        raise ExportError(f"{args.output}: there is no directory {args.output.parent}; make it first")
    report.stage(f"encoding with the text encoder of {args.model}")
    names = encode(
        args.model,
        args.prompt,
        args.output,
        checkpoint=args.checkpoint,
        negative_prompt=args.negative_prompt,
        clip_skip=args.clip_skip,
        half=args.half,
    )
    return lambda: print(f"{args.output}: {', '.join(names)} for {len(args.prompt)} prompts")


def list_models() -> int:
    """``tgate-export --list-models``. Returns the exit status."""
    with needs("listing models", EXPORT_ADVICE):
        from tgate_export.families import MODELS
    views.models(MODELS)
    return 0
