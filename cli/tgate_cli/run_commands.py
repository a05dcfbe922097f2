"""The commands that run on a machine without export: they draw, show, check, measure and compile for an engine."""

from __future__ import annotations

import argparse
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from tgate_cli import views
from tgate_cli.command import ADVICE, RUN_ADVICE, Show, bundle_place, needs, print_json, print_lines
from tgate_cli.inspect import describe
from tgate_engine.bundle import Bundle
from tgate_engine.errors import BundleError
from tgate_engine.graph import DECODE
from tgate_engine.report import Reporter

if TYPE_CHECKING:
    from tgate_runtime.engines.protocol import Engine


def generate(args: argparse.Namespace, report: Reporter) -> Show:
    """``tgate generate``: pictures, or a video, into files."""
    place = bundle_place(args)
    report.stage(f"loading {args.engine}")
    with needs("drawing", _advice(args)):
        from tgate_runtime import files
        from tgate_runtime.conditioning import rows_of
        from tgate_runtime.generators import check_generator
        from tgate_runtime.pipeline import Pipeline
        from tgate_runtime.request import check_room
        from tgate_runtime.session import plan_of

    check_generator(args.generator)
    initial = None if args.initial_latents is None else files.load_array(args.initial_latents)
    image = None if args.image is None else files.load_picture(args.image)
    embeds = None if args.prompt_embeds is None else files.load_embeddings(args.prompt_embeds)
    if args.save_latents is not None:
        files.check_place(args.save_latents)
    engine = _engine(args)
    report.stage(f"opening {args.bundle}")
    bundle = Bundle.open(place)
    manifest, plan = bundle.manifest, plan_of(bundle.manifest, args.plan)
    decoded, video = manifest.graph(DECODE, args.size) is not None, manifest.frames > 1
    rows = (rows_of(embeds, manifest) if embeds is not None else 0) or 1
    count, suffix = rows * args.num_images, ".npy" if not decoded else ".mp4" if video else ".png"
    check_room(count, manifest.shapes_of(args.size)[0], manifest.frames)
    stem = Path(args.bundle).resolve().name
    named = files.output_paths(args.output or Path(f"{stem}-0001{suffix}"), count, decoded=decoded, video=video)
    sizes = [args.size or manifest.sizes[0]]
    with Pipeline.open(bundle, engine=engine, plans=[plan], sizes=sizes, on_build=report.progress) as pipe:
        report.stage("drawing")
        result = pipe(
            args.prompt,
            image=image,
            prompt_embeds=embeds,
            seed=args.seed,
            negative_prompt=args.negative_prompt,
            guidance_scale=args.guidance_scale,
            plan=plan,
            num_images=args.num_images,
            initial_latents=initial,
            generator=args.generator,
            on_step=lambda progress: report.progress(progress.done, progress.total, "steps"),
        )
    with nullcontext(named) if args.output else files.new_files(stem, suffix, count) as paths:
        for i, path in enumerate(paths):
            if not decoded:
                files.save_array(result.latents[i : i + 1], path)
            elif video:
                files.save_video(result.videos[i], path, fps=manifest.fps)
            else:
                files.save_picture(result.images[i], path)
    if args.save_latents is not None:
        files.save_array(result.latents, args.save_latents)
    if args.seed is None:
        first, last = result.seeds[0], result.seeds[-1]
        report.note(f"seed {first}" if first == last else f"seeds {first} to {last}")
    facts = {
        "outputs": [str(path) for path in paths],
        "seeds": result.seeds,
        "plan": plan.name,
        "size": sizes[0],
        "latents": None if args.save_latents is None else str(args.save_latents),
    }
    return lambda: print_json(facts) if args.json else print_lines(paths)


def inspect(args: argparse.Namespace, report: Reporter) -> Show:
    """``tgate inspect``: plans step by step, MACs and sizes."""
    data = describe(Bundle.open(bundle_place(args)), args.size)
    return lambda: print_json(data) if args.json else views.inspection(data)


def verify(args: argparse.Namespace, report: Reporter) -> Show:
    """``tgate verify``: digests and plans checked, goldens replayed."""
    place = bundle_place(args)
    report.stage(f"loading {args.engine}")
    with needs("replaying goldens", _advice(args)):
        from tgate_runtime.verify import verify as replay

    engine = _engine(args)
    report.stage(f"checking {args.bundle}")
    bundle = Bundle.open(place)
    report.stage("replaying goldens")
    checked = replay(bundle, engine=engine, on_golden=report.progress, on_build=report.progress)
    failed = [golden.name for golden in checked if not golden.ok]

    def show() -> None:
        manifest = bundle.manifest
        if args.json:
            print_json(
                {
                    "bundle": str(bundle.path),
                    "files": len(manifest.files),
                    "plans": list(manifest.plans),
                    "goldens": {
                        golden.name: {"error": golden.error, "tolerance": golden.tolerance, "ok": golden.ok}
                        for golden in checked
                    },
                    "ok": not failed,
                }
            )
        else:
            goldens = (
                f"golden {golden.name}: worst relative error {golden.error:.2e}, tolerance {golden.tolerance:.0e}"
                for golden in checked
            )
            print_lines(
                [
                    f"digests: {len(manifest.files)} files and the manifest match",
                    f"plans: {', '.join(manifest.plans)}; every carry is written before it is read",
                    *(goldens if checked else ["goldens: none to replay"]),
                ]
            )
        if failed:
            raise BundleError(
                f"{bundle.path}: {', '.join(failed)} not reproduced within tolerance by this engine on this "
                "machine; export the bundle again, or report it"
            )

    return show


def bench(args: argparse.Namespace, report: Reporter) -> Show:
    """``tgate bench``: a plan and those it is compared with, measured in turns."""
    place = bundle_place(args)
    report.stage(f"loading {args.engine}")
    with needs("measuring", _advice(args)):
        from tgate_runtime import benchmark, files

    if args.trace is not None:
        files.check_place(args.trace)
    engine = _engine(args)
    report.stage(f"opening {args.bundle}")
    bundle = Bundle.open(place)
    report.stage("measuring")
    data = benchmark.bench(
        bundle,
        plan=args.plan,
        against=args.against,
        size=args.size,
        engine=engine,
        batch=args.batch,
        repeats=args.repeats,
        warm_ups=args.warm_ups,
        on_run=report.progress,
        on_build=report.progress,
        trace=args.trace,
    )
    return lambda: print_json(data) if args.json else views.benchmark(data)


def engines(args: argparse.Namespace, report: Reporter) -> Show:
    """``tgate engines``: what is installed here."""
    with needs("listing engines", RUN_ADVICE):
        from tgate_runtime.engines import installed

    entries = installed()
    return lambda: print_json(entries) if args.json else views.engines(entries)


def build(args: argparse.Namespace, report: Reporter) -> Show:
    """``tgate build``: the graphs compiled into the engine cache."""
    place = bundle_place(args)
    report.stage(f"loading {args.engine}")
    with needs("compiling for an engine", _advice(args)):
        from tgate_runtime.session import graphs_of

    engine = _engine(args)
    report.stage(f"opening {args.bundle}")
    bundle = Bundle.open(place)
    plans = None if args.plan is None else [args.plan]
    graphs = graphs_of(bundle, plans, None if args.size is None else [args.size])
    report.stage(f"compiling for {engine.name} {engine.version}")
    places = engine.build(bundle, graphs, report.progress)
    if args.json:
        entries = {file: str(place) for file, place in places.items()}
        return lambda: print_json({"engine": engine.name, "version": engine.version, "entries": entries})
    if not places:
        return lambda: print(f"{engine.name} compiles nothing ahead of time: the bundle is ready")
    return lambda: print_lines(f"{file}: {place}" for file, place in places.items())


def _engine(args: argparse.Namespace) -> Engine:
    """The engine that the command line asks for. Asked for before a bundle is opened, which reads all of it."""
    from tgate_runtime.engines import open_engine

    return open_engine(
        args.engine,
        threads=args.threads,
        device=args.device,
        architecture=args.architecture,
        precision=args.precision,
        memory=args.memory,
    )


def _advice(args: argparse.Namespace) -> str:
    """What brings all that running on the engine of the command line takes: the extra that has its name, but for ORT's.

    No table is asked, since importing the run time may be what fails.
    """
    return ADVICE.format(args.engine.removeprefix("ort-"))
