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
from typing import Any, NoReturn

from tgate_engine import __version__, views
from tgate_engine.errors import BundleError, EngineError, ExportError, TgateError
from tgate_engine.report import Reporter, reporter

FAILED, USAGE, FAULT, INTERRUPTED, TERMINATED = 1, 2, 70, 130, 143

Show = Callable[[], None]
"""Prints a command's results on stdout, once the reporter has let go of the terminal."""

OWN_PACKAGES = ("tgate_engine", "tgate_export", "tgate_runtime")
EXPORT_ADVICE = "it is not installed: pip install 'tgate-engine[export]'"
RUN_ADVICE = "it is not installed: pip install 'tgate-engine[cpu]'"


def main(arguments: Sequence[str] | None = None) -> int:
    """``tgate``. Returns the exit status."""
    return _run(_tgate_parser(), arguments)


def export_main(arguments: Sequence[str] | None = None) -> int:
    """``tgate-export``. Returns the exit status."""
    return _run(_export_parser(), arguments)


# --- commands -----------------------------------------------------------------------------------


def _generate(args: argparse.Namespace, report: Reporter) -> Show:
    with _needs("drawing", RUN_ADVICE):
        from tgate_runtime import files
        from tgate_runtime.pipeline import Pipeline
    from tgate_engine.bundle import Bundle

    initial = None if args.initial_latents is None else files.load_array(args.initial_latents)
    image = None if args.image is None else files.load_picture(args.image)
    embeds = None if args.prompt_embeds is None else files.load_embeddings(args.prompt_embeds)
    if args.save_latents is not None:
        files.check_place(args.save_latents)
    report.stage(f"opening {args.bundle}")
    bundle = Bundle.open(args.bundle)
    manifest = bundle.manifest
    rows = max([len(t) for t in embeds.values() if t.ndim], default=1) if embeds else 1
    paths = files.output_paths(
        args.output, rows * args.num_images, decoded=bool(manifest.decoder), video=manifest.frames > 1
    )
    with Pipeline.open(bundle, threads=args.threads, plans=[args.plan]) as pipe:
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

    with _needs("replaying goldens", RUN_ADVICE):
        from tgate_runtime.verify import verify

    report.stage(f"checking {args.bundle}")
    bundle = Bundle.open(args.bundle)
    report.stage("replaying goldens")
    checked = verify(bundle, threads=args.threads, on_golden=report.progress)
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

    with _needs("measuring", RUN_ADVICE):
        from tgate_runtime.benchmark import bench

    report.stage(f"opening {args.bundle}")
    bundle = Bundle.open(args.bundle)
    report.stage("measuring")
    data = bench(
        bundle,
        plan=args.plan,
        threads=args.threads,
        batch=args.batch,
        repeats=args.repeats,
        warm_ups=args.warm_ups,
        on_run=report.progress,
    )
    return lambda: _print_json(data) if args.json else views.benchmark(data)


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
        try:
            checked = verify(Bundle.open(stage, check_digests=False), on_golden=report.progress)
        except EngineError as error:
            raise ExportError(f"{error}; nothing was written (--no-verify exports without a check)") from error
        for golden in checked:
            if not golden.ok:
                raise ExportError(
                    f"golden {golden.name} has a relative error of {golden.error:.2e}, tolerance "
                    f"{golden.tolerance:.0e}: the graphs do not compute what PyTorch does; nothing was written"
                )
            report.note(f"golden {golden.name}: worst relative error {golden.error:.2e}")

    return check


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=1, ensure_ascii=False))


# --- arguments ----------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"tgate: error: {message} (see {self.prog} --help)\n")


def _tgate_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="tgate", description="Run bundles of temporally gated diffusion models.")
    parser.add_argument("--version", action="version", version=f"tgate {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=_Parser)

    def command(name: str, run: Callable[..., Show], text: str, *, quiet: bool = True) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        added.add_argument("bundle", metavar="BUNDLE", type=Path, help="the bundle's directory")
        _common(added)
        return added

    p = command("generate", _generate, "Draw pictures, or a video, from a prompt or an image.")
    p.add_argument("prompt", metavar="PROMPT", nargs="?", help="left out with --image or --prompt-embeds")
    p.add_argument(
        "--output", required=True, type=Path, metavar="OUT.png", help="several become OUT-0.png, …; videos: .mp4, .gif"
    )
    p.add_argument("--image", type=Path, metavar="IN.png", help="what an image-to-video model starts from")
    p.add_argument("--prompt-embeds", type=Path, metavar="E.safetensors", help="from `tgate embed`, for a prompt")
    p.add_argument("--seed", type=int, help="from 0; one is drawn, and reported, if left out")
    p.add_argument("--negative-prompt", metavar="TEXT", help="what to steer away from")
    p.add_argument("--guidance-scale", type=float, metavar="G", help="above 1; the plan's if left out")
    p.add_argument("--plan", default="default", metavar="NAME")
    p.add_argument("--num-images", type=_count, default=1, metavar="N")
    p.add_argument("--initial-latents", type=Path, metavar="X.npy", help="standard normal noise, in place of a seed's")
    p.add_argument("--save-latents", type=Path, metavar="Y.npy", help="the final latents, before decoding")
    _threads(p)

    p = commands.add_parser("embed", help=(text := "Encode prompts ahead of time, for bundles without a text encoder."))
    p.description = text
    p.set_defaults(run=_embed)
    p.add_argument("prompt", metavar="PROMPT", nargs="+")
    p.add_argument("--model", required=True, metavar="NAME", help="as for tgate-export")
    p.add_argument(
        "--checkpoint", metavar="DIR_OR_HUB_ID", help="where the text encoder is; the model's own if left out"
    )
    p.add_argument("--output", required=True, type=Path, metavar="E.safetensors")
    p.add_argument("--negative-prompt", metavar="TEXT", help="what to steer away from")
    p.add_argument("--half", action="store_true", help="hold the encoder in bfloat16: half the memory")
    _common(p)

    p = command("inspect", _inspect, "Show a bundle's plans step by step, their MACs, and sizes.")
    p.add_argument("--json", action="store_true", help="as data")

    p = command("verify", _verify, "Check digests and plans, and replay the recorded goldens.")
    _threads(p)

    p = command("bench", _bench, "Measure gated, guidance-stopped and ungated plans in turns.")
    p.add_argument("--json", action="store_true", help="as data")
    p.add_argument("--plan", default="default", metavar="NAME")
    p.add_argument("--batch", type=_count, metavar="B", help="images at once")
    p.add_argument("--repeats", type=_count, default=5, metavar="N", help="measured turns")
    p.add_argument("--warm-ups", type=int, default=1, metavar="N", help="turns before that")
    _threads(p)

    p = command("plan", _plan, "Add a plan to a bundle, over the graphs it has.")
    p.add_argument("--name", required=True)
    p.add_argument("--m", type=int, required=True, help="the gate step")
    p.add_argument("--k", type=int, default=1, help="the self-attention interval before the gate; 1: no reuse")
    p.add_argument("--steps", type=int, metavar="N", help="the default plan's if left out, as the next two")
    p.add_argument("--sampler", metavar="NAME")
    _method(p)
    p.add_argument("--force", action="store_true", help="replace a plan of that name")
    return parser


def _export_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="tgate-export", description="Compile a diffusion model into a bundle, ahead of time.")
    parser.add_argument("--version", action="version", version=f"tgate-export {__version__}")
    parser.set_defaults(run=_export)
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="mini-sdxl (embedded), or another of --list-models")
    parser.add_argument("--list-models", action=_ListModels, help="show the models and their settings, and stop")
    add("--checkpoint", metavar="FROM", help="a diffusers directory, a .safetensors file, or a hub id")
    add(
        "--weights",
        choices=("checkpoint", "random", "none"),
        default="checkpoint",
        help="random: the published structure, to measure; none: graphs, plans and MACs only",
    )
    add("--components", metavar="A,B", help="of text, image, denoiser, decoder; all, or without weights the denoiser")
    add("--lora", action="append", default=[], metavar="FILE[:SCALE]", help="fuse a LoRA into the weights; repeatable")
    add("--m", type=int, help="the gate step; the model's own if left out")
    add("--k", type=int, help="the self-attention interval before the gate; 1: no reuse")
    add("--steps", type=int, metavar="N", help="inference steps")
    add("--sampler", metavar="NAME", help="dpmpp_2m, ddim, euler, …")
    _method(parser)
    add("--height", type=int, metavar="PIXELS")
    add("--width", type=int, metavar="PIXELS")
    add("--frames", type=int, metavar="F", help="of a video model")
    add("--batch", type=_batch, default=(1, 1), metavar="B|LEAST:MOST", help="images at once, such as 1 or 1:4")
    add("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32")
    add("--output", type=Path, metavar="DIR", help="bundles/<model> if left out")
    add("--force", action="store_true", help="replace a bundle that is there")
    add("--no-verify", dest="verify", action="store_false", help="record no goldens, and replay none before finishing")
    _common(parser)
    return parser


class _ListModels(argparse.Action):
    """Shows the models and stops, as --version does."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        try:
            parser.exit(_list_models())
        except TgateError as error:
            parser.exit(FAILED, f"tgate: error: {error}\n")


def _method(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--warm-up", type=int, metavar="W", help="steps that reuse nothing")
    parser.add_argument("--fidelity-interval", type=int, default=1, metavar="F", help="k after the gate")
    parser.add_argument("--guidance-scale", type=float, metavar="G", help="of classifier-free guidance: 1 is without")


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress; warnings and errors only")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")


def _threads(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=_count, metavar="N", help="of one graph; the engine's choice if left out")


def _count(text: str) -> int:
    with contextlib.suppress(ValueError):
        if int(text) >= 1:
            return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got {text!r}")


def _batch(text: str) -> tuple[int, int]:
    least, colon, most = text.partition(":")
    return _count(least), _count(most if colon else least)


# --- running ------------------------------------------------------------------------------------


class _Terminated(BaseException):
    """SIGTERM came. Not an Exception, so that only clean-up code sees it on its way to the top."""


def _parse(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse; a PROMPT may also come after options, where argparse no longer looks for one that may be left out."""
    args, left = parser.parse_known_args(arguments)
    if left and not left[0].startswith("-") and getattr(args, "prompt", "") is None:
        args.prompt = left.pop(0)
    if left:
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    return args


def _run(parser: argparse.ArgumentParser, arguments: Sequence[str] | None) -> int:
    """Parse, run the command, and turn whatever ends it into one line and an exit status."""
    args = _parse(parser, arguments)
    try:
        with _sigterm_raises(), reporter(quiet=args.quiet) as report, _warnings_to(report):
            show = args.run(args, report)
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
