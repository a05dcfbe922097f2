"""The commands of export: they make bundles, plans, and what is brought to a bundle.

All but ``tgate plan`` need what the extra ``[export]`` brings.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from tgate_cli import views
from tgate_cli.command import (
    EXPORT_ADVICE,
    RUN_ADVICE,
    Show,
    bundle_asked,
    bundle_place,
    needs,
    print_json,
    print_lines,
)
from tgate_engine.atomic import check_place, check_target, write_atomically
from tgate_engine.bundle import Bundle
from tgate_engine.errors import EngineError, ExportError
from tgate_engine.manifest import MANIFEST_FILE
from tgate_engine.report import Reporter


def export(args: argparse.Namespace, report: Reporter) -> Show:
    """``tgate-export``: a bundle."""
    from tgate_export.settings import ControlNet, ExportSettings, Lora, check_settings

    settings = ExportSettings(
        model=args.model,
        method=args.method,
        m=args.m,
        k=args.k,
        steps=args.steps,
        warm_up=args.warm_up,
        fidelity_interval=args.fidelity_interval,
        forecast_interval=args.forecast,
        cache_interval=args.cache_interval,
        refresh_interval=args.refresh,
        sampler=args.sampler,
        guidance_scale=args.guidance_scale,
        guidance_scale_2=args.guidance_scale_2,
        checkpoint=args.checkpoint,
        preview_decoder=args.preview_decoder,
        weights=args.weights,
        components=None if args.components is None else args.components.split(","),
        loras=tuple(Lora.parse(text) for text in args.lora),
        controlnets=tuple(ControlNet.parse(text) for text in args.controlnet),
        clip_skip=args.clip_skip,
        guidance_rescale=args.guidance_rescale,
        cache_branch=args.cache_branch,
        merge_ratio=args.merge_ratio,
        sizes=args.size or (),
        height=args.height,
        width=args.width,
        frames=args.frames,
        batches=args.batch or (),
        dtype=args.dtype,
        output=args.output,
        force=args.force,
        verify=args.verify,
        ip_adapter=args.ip_adapter,
        image_encoder=args.image_encoder,
    )
    check_settings(settings)
    check_target(settings.target, settings.force)
    report.stage("loading PyTorch and diffusers")
    with needs("export", EXPORT_ADVICE):
        from tgate_export import build
    errors: dict[str, float] = {}
    path = build.export(settings, report, _replay(args, report, errors))
    facts = {"bundle": str(path), "model": args.model, "goldens": errors}
    return lambda: print_json(facts) if args.json else print_lines([path])


def _replay(args: argparse.Namespace, report: Reporter, errors: dict[str, float]) -> Callable[[Path], None] | None:
    """What replays the goldens of a bundle that is about to get its name; None where it will have none. ``errors``: for
    the relative error of each.

    Its engine is asked for here, before minutes of work.
    """
    if not args.verify or args.weights != "checkpoint":
        return None
    skip = "--no-verify exports without a check"
    with needs("verifying an export", f"{RUN_ADVICE}; or skip it with --no-verify"):
        from tgate_runtime.engines import open_engine
        from tgate_runtime.verify import verify
    try:
        engine = open_engine("ort-cpu")
    except EngineError as error:
        raise ExportError(f"{error}, to verify what is exported; {skip}") from error

    def check(stage: Path) -> None:
        bundle = Bundle.open(stage, check_digests=False)
        recorders = {name: golden.oracle for name, golden in bundle.manifest.goldens.items()}
        try:
            checked = verify(bundle, engine=engine, on_golden=report.progress)
        except EngineError as error:
            raise ExportError(f"{error}; nothing was written ({skip})") from error
        for golden in checked:
            errors[golden.name] = golden.error
            if not golden.ok:
                raise ExportError(
                    f"golden {golden.name} has a relative error of {golden.error:.2e}, tolerance "
                    f"{golden.tolerance:.0e}: the graphs do not compute what {recorders[golden.name] or 'PyTorch'} "
                    "makes of this checkpoint; nothing was written. Report it, or export without a check (--no-verify)"
                )
            report.note(f"golden {golden.name}: worst relative error {golden.error:.2e}")

    return check


def plan(args: argparse.Namespace, report: Reporter) -> Show:
    """``tgate plan``: a further plan over the graphs of a bundle, in it or in a file; or fewer plans."""
    from tgate_export.plans import add_plan

    if args.remove:
        return _remove(args, report)
    if args.output is not None:
        check_place(args.output, ExportError)
        if (args.output.parent / MANIFEST_FILE).exists():
            raise ExportError(f"{args.output} lies in a bundle, whose files are its own; name another place")
        if os.path.lexists(args.output) and not args.force:
            raise ExportError(f"{args.output} exists already; choose another --output, or --force to replace it")
    report.stage("making the plan")
    made = add_plan(
        bundle_place(args),
        name=args.name,
        m=args.m,
        k=args.k,
        steps=args.steps,
        warm_up=args.warm_up,
        fidelity_interval=args.fidelity_interval,
        forecast_interval=args.forecast,
        cache_interval=args.cache_interval,
        refresh_interval=args.refresh,
        sampler=args.sampler,
        guidance_scale=args.guidance_scale,
        force=args.force,
        save=args.output is None,
    )
    own = made.pop(args.name)
    if args.output is not None:
        # A file is one plan: it may name baselines that the bundle has, not those that would have been made with it.
        stored = tuple(baseline for baseline in own.baselines if baseline not in made)
        content = json.dumps(replace(own, baselines=stored).to_json(), indent=1, ensure_ascii=False)
        write_atomically(args.output, f"{content}\n".encode())
    where = args.bundle if args.output is None else args.output
    added = [] if args.output is not None else list(made)
    if args.json:
        facts = {"name": own.name, "settings": dict(own.settings), "steps": len(own.steps), "graphs": own.graphs()}
        return lambda: print_json({"written": str(where), **facts, "baselines": own.baselines, "added": added})
    lines = [f"{where}: plan {own.name}, {len(own.steps)} steps over {', '.join(own.graphs())}"]
    lines += [f"{where}: plan {name}, a baseline of {own.name}" for name in added]
    return lambda: print_lines(lines)


def _remove(args: argparse.Namespace, report: Reporter) -> Show:
    """Take plans out. Their baselines stay, which may be other plans' too."""
    report.stage("removing plans")
    left = bundle_asked(args).remove_plans(args.remove).manifest.plans
    removed = list(dict.fromkeys(args.remove))
    if args.json:
        return lambda: print_json({"written": args.bundle, "removed": removed, "plans": list(left)})
    return lambda: print_lines(f"{args.bundle}: plan {name} removed; left are {', '.join(left)}" for name in removed)


def adapt(args: argparse.Namespace, report: Reporter) -> Show:
    """``tgate adapt``: a LoRA kept in a bundle for requests; or fewer of them."""
    if args.remove:
        report.stage("removing adapters")
        left = bundle_asked(args).remove_adapters(args.remove).manifest.adapters
        removed = list(dict.fromkeys(args.remove))
        if args.json:
            return lambda: print_json({"written": args.bundle, "removed": removed, "adapters": list(left)})
        there = ", ".join(left) or "none"
        return lambda: print_lines(f"{args.bundle}: adapter {name} removed; left are {there}" for name in removed)
    place = bundle_place(args)
    report.stage("loading PyTorch and diffusers")
    with needs("reading LoRAs", EXPORT_ADVICE):
        from tgate_export.adapt import adapt as keep
    name = args.lora.stem if args.name is None else args.name
    report.stage(f"reading {args.lora}")
    kept = keep(place, args.lora, name=name, force=args.force)
    if kept.left:
        report.warn(f"what {args.lora} changes in {', '.join(kept.left)} is left out: the bundle has none")
    for component, count in kept.unread.items():
        report.note(f"{count} layers of {component} that {args.lora} changes are behind those that the bundle reads")
    if args.json:
        facts = {"name": name, "layers": dict(kept.layers), "unread": dict(kept.unread), "left": kept.left}
        sizes = {"rank": kept.adapter.rank, "bytes": kept.bytes}
        return lambda: print_json({"written": args.bundle, **facts, **sizes})
    of = ", ".join(f"{count} layers of {component}" for component, count in kept.layers.items())
    line = f"{args.bundle}: adapter {name}, {of}, rank {kept.adapter.rank}, {kept.bytes / 1e6:.1f} MB"
    return lambda: print_lines([line])


def embed(args: argparse.Namespace, report: Reporter) -> Show:
    """``tgate embed``: prompts encoded into a file."""
    from tgate_export.settings import check_text

    check_text(args.model, checkpoint=args.checkpoint, clip_skip=args.clip_skip)
    check_place(args.output, ExportError)
    report.stage("loading PyTorch and transformers")
    with needs("encoding prompts", EXPORT_ADVICE):
        from tgate_export.embed import embed as encode
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
    return lambda: print_lines([f"{args.output}: {', '.join(names)} for {len(args.prompt)} prompts"])


def list_models() -> int:
    """``tgate-export --list-models``. Returns the exit status."""
    from tgate_export.families import MODELS

    views.models(MODELS)
    return 0
