"""The commands beside ``generate`` that run without export: they show, check, measure and compile for an engine."""

from __future__ import annotations

import argparse

from tgate_cli import views
from tgate_cli.command import (
    RUN_ADVICE,
    Show,
    asked_builder,
    asked_engine,
    bundle_asked,
    engine_advice,
    needs,
    print_json,
    print_lines,
)
from tgate_cli.inspect import describe
from tgate_engine.errors import BundleError
from tgate_engine.report import Reporter


def inspect(args: argparse.Namespace, report: Reporter) -> Show:
    """``tgate inspect``: plans step by step, MACs and sizes."""
    bundle = bundle_asked(args)
    data = describe(bundle, args.size)
    bundle.checked()
    return lambda: print_json(data) if args.json else views.inspection(data)


def verify(args: argparse.Namespace, report: Reporter) -> Show:
    """``tgate verify``: digests and plans checked, goldens replayed."""
    bundle = bundle_asked(args)
    with needs("replaying goldens", engine_advice(args)):
        from tgate_runtime.verify import check_goldens
        from tgate_runtime.verify import verify as replay

    check_goldens(bundle)
    report.stage(f"loading {args.engine}")
    engine = asked_engine(args)
    report.stage(f"checking {args.bundle}")
    bundle = bundle.checked()
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
    bundle = bundle_asked(args)
    with needs("measuring", engine_advice(args)):
        from tgate_runtime import benchmark, files

    if args.trace is not None:
        files.check_place(args.trace)
    asked = {"plan": args.plan, "against": args.against, "size": args.size, "batch": args.batch}
    benchmark.compared(bundle, **asked)
    report.stage(f"loading {args.engine}")
    engine = asked_engine(args)
    report.stage(f"opening {args.bundle}")
    bundle = bundle.checked()
    report.stage("measuring")
    data = benchmark.bench(
        bundle,
        **asked,
        engine=engine,
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
    """``tgate build``: the graphs compiled into the engine cache, or lowered into the bundle's folder."""
    bundle = bundle_asked(args)
    with needs("compiling for an engine", engine_advice(args)):
        from tgate_runtime.session import graphs_of

    plans = None if args.plan is None else [args.plan]
    graphs = graphs_of(bundle, plans, None if args.size is None else [args.size])
    report.stage(f"loading {args.engine}")
    builder = asked_builder(args)
    report.stage(f"opening {args.bundle}")
    bundle = bundle.checked()
    report.stage(f"compiling for {builder.name} {builder.version}")
    places = builder.build(bundle, graphs, report.progress)
    if args.json:
        entries = {file: str(place) for file, place in places.items()}
        return lambda: print_json({"engine": builder.name, "version": builder.version, "entries": entries})
    if not places:
        return lambda: print(f"{builder.name} compiles nothing ahead of time: the bundle is ready")
    return lambda: print_lines(f"{file}: {place}" for file, place in places.items())
