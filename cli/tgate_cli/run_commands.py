"""The commands that run on a machine without export: they draw, show, check, measure and compile for an engine."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from tgate_cli import views
from tgate_cli.command import ADVICE, RUN_ADVICE, Show, needs, print_json
from tgate_cli.inspect import describe
from tgate_engine.bundle import Bundle
from tgate_engine.errors import BundleError
from tgate_engine.report import Reporter

if TYPE_CHECKING:
    from tgate_runtime.backends import Backend

ENGINE_OPTIONS = ("engine", "threads", "device", "architecture", "precision", "memory")


def generate(args: argparse.Namespace, report: Reporter) -> Show:
    """``tgate generate``: pictures, or a video, into files."""
    with needs("drawing", _advice(args)):
        from tgate_runtime import files
        from tgate_runtime.pipeline import Pipeline

    initial = None if args.initial_latents is None else files.load_array(args.initial_latents)
    image = None if args.image is None else files.load_picture(args.image)
    embeds = None if args.prompt_embeds is None else files.load_embeddings(args.prompt_embeds)
    if args.save_latents is not None:
        files.check_place(args.save_latents)
    _backend(args)
    report.stage(f"opening {args.bundle}")
    bundle = Bundle.open(args.bundle)
    manifest = bundle.manifest
    rows = max([len(t) for t in embeds.values() if t.ndim], default=1) if embeds else 1
    paths = files.output_paths(
        args.output, rows * args.num_images, decoded=bool(manifest.decoder), video=manifest.frames > 1
    )
    with Pipeline.open(bundle, plans=[args.plan], on_build=report.progress, **_engine_options(args)) as pipe:
        report.stage("drawing")
        result = pipe(
            args.prompt,
            image=image,
            prompt_embeds=embeds,
            seed=args.seed,
            negative_prompt=args.negative_prompt,
            guidance_scale=args.guidance_scale,
            plan=args.plan,
            num_images=args.num_images,
            initial_latents=initial,
            on_step=lambda progress: report.progress(progress.done, progress.total, "steps"),
        )
    for i, path in enumerate(paths):
        if not manifest.decoder:
            files.save_array(result.latents[i : i + 1], path)
        elif manifest.frames > 1:
            files.save_video(result.videos[i], path, fps=manifest.fps)
        else:
            files.save_picture(result.images[i], path)
    if args.save_latents is not None:
        files.save_array(result.latents, args.save_latents)
    if args.seed is None:
        report.note(f"seed {result.seed}")
    return lambda: print(*paths, sep="\n")


def inspect(args: argparse.Namespace, report: Reporter) -> Show:
    """``tgate inspect``: plans step by step, MACs and sizes."""
    data = describe(Bundle.open(args.bundle))
    return lambda: print_json(data) if args.json else views.inspection(data)


def verify(args: argparse.Namespace, report: Reporter) -> Show:
    """``tgate verify``: digests and plans checked, goldens replayed."""
    with needs("replaying goldens", _advice(args)):
        from tgate_runtime.verify import verify as replay

    _backend(args)
    report.stage(f"checking {args.bundle}")
    bundle = Bundle.open(args.bundle)
    report.stage("replaying goldens")
    checked = replay(bundle, on_golden=report.progress, on_build=report.progress, **_engine_options(args))
    failed = [golden.name for golden in checked if not golden.ok]

    def show() -> None:
        manifest = bundle.manifest
        print(f"digests: {len(manifest.files)} files and the manifest match")
        print(f"plans: {', '.join(manifest.plans)}; every carry is written before it is read")
        for golden in checked:
            print(f"golden {golden.name}: worst relative error {golden.error:.2e}, tolerance {golden.tolerance:.0e}")
        if not checked:
            print("goldens: none to replay")
        if failed:
            raise BundleError(
                f"{bundle.path}: {', '.join(failed)} not reproduced within tolerance by this engine on this "
                "machine; export the bundle again, or report it"
            )

    return show


def bench(args: argparse.Namespace, report: Reporter) -> Show:
    """``tgate bench``: the plan and what it is compared with, measured in turns."""
    with needs("measuring", _advice(args)):
        from tgate_runtime import benchmark, files

    if args.trace is not None:
        files.check_place(args.trace)
    _backend(args)
    report.stage(f"opening {args.bundle}")
    bundle = Bundle.open(args.bundle)
    report.stage("measuring")
    data = benchmark.bench(
        bundle,
        plan=args.plan,
        batch=args.batch,
        stopped=args.stopped,
        repeats=args.repeats,
        warm_ups=args.warm_ups,
        on_run=report.progress,
        on_build=report.progress,
        trace=args.trace,
        **_engine_options(args),
    )
    return lambda: print_json(data) if args.json else views.benchmark(data)


def engines(args: argparse.Namespace, report: Reporter) -> Show:
    """``tgate engines``: what is installed here."""
    with needs("listing engines", RUN_ADVICE):
        from tgate_runtime.backends import installed

    entries = installed()
    return lambda: print_json(entries) if args.json else views.engines(entries)


def build(args: argparse.Namespace, report: Reporter) -> Show:
    """``tgate build``: the graphs compiled into the engine cache."""
    with needs("compiling for an engine", _advice(args)):
        from tgate_runtime.session import graphs_of

    loader = _backend(args)
    report.stage(f"opening {args.bundle}")
    bundle = Bundle.open(args.bundle)
    graphs = graphs_of(bundle, None if args.plan is None else [args.plan])
    report.stage(f"compiling for {loader.name} {loader.version}")
    places = loader.build(bundle, graphs, report.progress)
    if not places:
        return lambda: print(f"{loader.name} compiles nothing ahead of time: the bundle is ready")
    return lambda: print(*(f"{name}: {place}" for name, place in places.items()), sep="\n")


def _engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of the engine, as keyword arguments."""
    return {name: getattr(args, name) for name in ENGINE_OPTIONS}


def _backend(args: argparse.Namespace) -> Backend:
    """The engine that the command line asks for. Asked for before a bundle is opened, which reads all of it."""
    from tgate_runtime.backends import backend

    return backend(**_engine_options(args))


def _advice(args: argparse.Namespace) -> str:
    """What brings all that running on the engine of the command line takes."""
    from tgate_runtime.backends import ENGINES

    return ADVICE.format(ENGINES[args.engine].extra) if args.engine in ENGINES else RUN_ADVICE
