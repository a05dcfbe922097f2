"""The command line: ``tgate`` and ``tgate-export``.

The one file that knows both export and run time; each is imported inside the command that needs it, so that a
production host needs no torch and a build host no engine. Results go to stdout, everything else to stderr.

Exit status: 0 done; 1 the work failed; 2 the command line is wrong; 70 a fault of the program itself;
130 interrupted; 143 terminated. A failure is one line on stderr that begins ``tgate: error:``.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from tgate_engine import views
from tgate_engine.arguments import FAILED, export_parser, tgate_parser
from tgate_engine.errors import BundleError, EngineError, ExportError, TgateError
from tgate_engine.report import Reporter, reporter

if TYPE_CHECKING:
    from tgate_runtime.backends import Backend

FAULT, INTERRUPTED, TERMINATED = 70, 130, 143

Show = Callable[[], None]
"""Prints a command's results on stdout, once the reporter has let go of the terminal."""

OWN_PACKAGES = ("tgate_engine", "tgate_export", "tgate_runtime")
ADVICE = "it is not installed: pip install 'tgate-engine[{}]'"
EXPORT_ADVICE, RUN_ADVICE = ADVICE.format("export"), ADVICE.format("cpu")
ENGINE_OPTIONS = ("engine", "threads", "device", "architecture", "precision", "memory")


def main(arguments: Sequence[str] | None = None) -> int:
    """``tgate``. Returns the exit status."""
    return _run(tgate_parser(), arguments)


def export_main(arguments: Sequence[str] | None = None) -> int:
    """``tgate-export``. Returns the exit status."""
    return _run(export_parser(_list_models), arguments)


# --- commands -----------------------------------------------------------------------------------


def _generate(args: argparse.Namespace, report: Reporter) -> Show:
    with _needs("drawing", _advice(args)):
        from tgate_runtime import files
        from tgate_runtime.pipeline import Pipeline
    from tgate_engine.bundle import Bundle

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


def _inspect(args: argparse.Namespace, report: Reporter) -> Show:
    from tgate_engine.bundle import Bundle
    from tgate_engine.inspect import describe

    data = describe(Bundle.open(args.bundle))
    return lambda: _print_json(data) if args.json else views.inspection(data)


def _verify(args: argparse.Namespace, report: Reporter) -> Show:
    from tgate_engine.bundle import Bundle

    with _needs("replaying goldens", _advice(args)):
        from tgate_runtime.verify import verify

    _backend(args)
    report.stage(f"checking {args.bundle}")
    bundle = Bundle.open(args.bundle)
    report.stage("replaying goldens")
    checked = verify(bundle, on_golden=report.progress, on_build=report.progress, **_engine_options(args))
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


def _bench(args: argparse.Namespace, report: Reporter) -> Show:
    from tgate_engine.bundle import Bundle

    with _needs("measuring", _advice(args)):
        from tgate_runtime import files
        from tgate_runtime.benchmark import bench

    if args.trace is not None:
        files.check_place(args.trace)
    _backend(args)
    report.stage(f"opening {args.bundle}")
    bundle = Bundle.open(args.bundle)
    report.stage("measuring")
    data = bench(
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
    return lambda: _print_json(data) if args.json else views.benchmark(data)


def _engines(args: argparse.Namespace, report: Reporter) -> Show:
    with _needs("listing engines", RUN_ADVICE):
        from tgate_runtime.backends import installed

    found = installed()
    return lambda: _print_json(found) if args.json else views.engines(found)


def _build(args: argparse.Namespace, report: Reporter) -> Show:
    from tgate_engine.bundle import Bundle

    with _needs("compiling for an engine", _advice(args)):
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


def _plan(args: argparse.Namespace, report: Reporter) -> Show:
    with _needs("compiling a sampler", EXPORT_ADVICE):
        from tgate_export.build import add_plan

    report.stage("compiling the sampler")
    plan = add_plan(
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
    return lambda: print(f"{args.bundle}: plan {plan.name}, {len(plan.steps)} steps over {', '.join(plan.graphs())}")


def _embed(args: argparse.Namespace, report: Reporter) -> Show:
    with _needs("encoding prompts", EXPORT_ADVICE):
        from tgate_export.embed import embed

    if not args.output.parent.is_dir():
        raise ExportError(f"{args.output}: there is no directory {args.output.parent}; make it first")
    report.stage(f"encoding with the text encoder of {args.model}")
    names = embed(
        args.model,
        args.prompt,
        args.output,
        checkpoint=args.checkpoint,
        negative_prompt=args.negative_prompt,
        clip_skip=args.clip_skip,
        half=args.half,
    )
    return lambda: print(f"{args.output}: {', '.join(names)} for {len(args.prompt)} prompts")


def _list_models() -> int:
    with _needs("listing models", EXPORT_ADVICE):
        from tgate_export.families import MODELS
    views.models(MODELS)
    return 0


def _export(args: argparse.Namespace, report: Reporter) -> Show:
    with _needs("export", EXPORT_ADVICE):
        from tgate_export.build import ExportSettings, export
        from tgate_export.lora import Lora
    settings = ExportSettings(
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
    path = export(settings, report, _replay(report) if args.verify else None)
    return lambda: print(path)


def _replay(report: Reporter) -> Callable[[Path], None]:
    """What replays the goldens of a bundle that is about to get its name. Asked for before minutes of work."""
    from tgate_engine.bundle import Bundle

    with _needs("verifying an export", f"{RUN_ADVICE}; or skip it with --no-verify"):
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


_COMMANDS: dict[str, Callable[[argparse.Namespace, Reporter], Show]] = {
    "generate": _generate,
    "embed": _embed,
    "inspect": _inspect,
    "verify": _verify,
    "bench": _bench,
    "engines": _engines,
    "build": _build,
    "plan": _plan,
    "export": _export,
}


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=1, ensure_ascii=False))


# --- running ------------------------------------------------------------------------------------


class _Terminated(BaseException):
    """SIGTERM came. Not an Exception, so that only clean-up code sees it on its way to the top."""


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse; a PROMPT may also come after options, where argparse no longer looks for one that may be left out."""
    args, left = parser.parse_known_args(arguments)
    if left and not left[0].startswith("-") and getattr(args, "prompt", "") is None:
        args.prompt = left.pop(0)
    if left:
        args.parser.error(f"unrecognized arguments: {' '.join(left)}")
    return args


def _run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Parse, run the command, and turn whatever ends it into one line and an exit status."""
    args = _parse(parser, arguments)
    try:
        with _sigterm_raises(), reporter(quiet=args.quiet) as report, _warnings_to(report):
            show = _COMMANDS[args.command](args, report)
        show()
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of stdout went away, which is its right
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED
    except (TgateError, OSError) as error:
        return _fail(args, _line(error), FAILED)
    except KeyboardInterrupt:
        return _fail(args, "interrupted", INTERRUPTED)
    except _Terminated:
        return _fail(args, "terminated", TERMINATED)
    except Exception as error:  # a fault of the program: still one line, unless asked for more
        hint = "" if args.traceback else "; run with --traceback to see where"
        return _fail(args, f"unexpected {type(error).__name__}: {error}{hint}", FAULT)
    return 0


def _fail(args: argparse.Namespace, text: str, status: int) -> int:
    if args.traceback:
        traceback.print_exc()
    print(f"tgate: error: {' '.join(text.split())}", file=sys.stderr)
    return status


def _line(error: TgateError | OSError) -> str:
    if isinstance(error, TgateError):
        return str(error)
    what = error.strerror or str(error)
    return f"{os.fsdecode(error.filename)}: {what}" if error.filename else what


@contextlib.contextmanager
def _needs(work: str, advice: str) -> Iterator[None]:
    """Turns a library that is not installed into one line that says how to install it."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] in OWN_PACKAGES:
            raise
        raise EngineError(f"{work} needs {error.name}; {advice}") from None


@contextlib.contextmanager
def _sigterm_raises() -> Iterator[None]:
    """Lets SIGTERM unwind the stack, so that what is half written is removed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(*_: object) -> NoReturn:
        raise _Terminated

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


class _Handler(logging.Handler):
    """Gives the warnings of the log ``tgate`` to a reporter."""

    def __init__(self, report: Reporter) -> None:
        super().__init__(logging.WARNING)
        self._report = report

    def emit(self, record: logging.LogRecord) -> None:
        self._report.warn(" ".join(record.getMessage().split()))


@contextlib.contextmanager
def _warnings_to(report: Reporter) -> Iterator[None]:
    log, handler = logging.getLogger("tgate"), _Handler(report)
    log.addHandler(handler)
    try:
        yield
    finally:
        log.removeHandler(handler)


if __name__ == "__main__":
    sys.exit(main())
