"""The arguments of ``tgate`` and ``tgate-export``; :mod:`tgate_cli.main` says what each command does.

What is parsed holds the command's own ``parser`` beside its arguments.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tgate_cli.command import LONGEST
from tgate_cli.hints import hint, meant
from tgate_engine import __version__
from tgate_engine.errors import TgateError, shown
from tgate_engine.reader import MOST_LETTERS, is_word

FAILED, USAGE = 1, 2


MOST = 10_000
"""Images, frames, turns: more is a slip of the finger, and would be counted out in memory."""
MOST_PIXELS = 16_384
LEAST_IMAGES = 4
"""Of a plan that is tuned: fewer tell nothing of how surely a mean is known."""
MOST_QUALITY = {"psnr": 58.9, "ssim": 1.0}
"""What equal pictures have, by the name of a budget; as in tgate_runtime.tuning, which is not imported for it."""
SEED_LIMIT = 2**63
"""As at run time, which is not imported for it."""

STATUS = (
    "exit status: 0 done; 1 the work failed; 2 the command line is wrong; 70 a fault of the program itself; "
    "130 interrupted; 143 terminated"
)


_FILES = {
    "bash": "_shtab_compgen_files",
    "zsh": "_files",
    "fish": "(__fish_complete_path (commandline -ct))",
    "tcsh": "f",
    "powershell": "_shtab_powershell_compgen_files",
}
"""What shtab, which writes completions of these parsers for shells, reads of an argument that is a path."""


class Parser(argparse.ArgumentParser):
    """An argument parser that says what is wrong in one line, and takes whole names of options alone: an abbreviation
    would mean something else as soon as another option is added."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, allow_abbrev=False, epilog=STATUS)

    def add_argument(self, *names: Any, **options: Any) -> argparse.Action:
        action = super().add_argument(*names, **options)
        if options.get("type") in (Path, _plan_file):
            action.complete = _FILES  # type: ignore[attr-defined]
        return action

    def _print_message(self, message: str, file: Any = None) -> None:
        """Write a help or a version; argparse would not tell where that cannot be written."""
        (file or sys.stderr).write(message)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """What is none of an argument's choices is told with the nearest of them."""
        if action.choices is None or value in action.choices:
            return
        choices = [str(choice) for choice in action.choices]
        instead = meant(str(value), choices)
        raise argparse.ArgumentError(
            action,
            f"expected one of {', '.join(choices)}, got '{shown(value, 40)}'{'; ' if instead else ''}{instead}",
        )

    def error(self, message: str) -> NoReturn:
        program = self.prog.partition(" ")[0]
        self.exit(USAGE, f"{program}: error: {shown(message, LONGEST)} (see {self.prog} --help)\n")

    def nothing(self) -> NoReturn:
        """End for a command line without anything on it: with the help, and what is missing as the last line."""
        self.print_help(sys.stderr)
        self.error("the following arguments are required: COMMAND")

    def unknown(self, arguments: Sequence[str]) -> NoReturn:
        """End for arguments that no option takes, with what to type instead."""
        known = [option for action in self._actions for option in action.option_strings]
        text = hint(arguments, known=known, command=self.prog.removeprefix("tgate "))
        self.error(f"unrecognized arguments: {shown(' '.join(arguments))}{'; ' if text else ''}{text}")


def tgate_parser() -> Parser:
    """The parser of ``tgate``; ``command`` of what it parses is the command's name."""
    parser = Parser(prog="tgate", description="Run bundles of temporally gated diffusion models.")
    parser.add_argument("--version", action="version", version=f"tgate {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND", parser_class=Parser)

    def command(name: str, text: str, *, bundle: bool = True) -> argparse.ArgumentParser:
        added: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
        added.set_defaults(parser=added)  # whose --help an error points to
        if bundle:
            added.add_argument("bundle", metavar="BUNDLE", help="the bundle's directory; mini is the one that ships")
        _common(added)
        return added

    p = command("generate", "Draw pictures, or a video, from a prompt or an image.", bundle=False)
    which = "the bundle's directory; mini is the one that ships, and is meant with --from if this is left out"
    p.add_argument("bundle", metavar="BUNDLE", nargs="?", help=which)
    p.add_argument(
        "prompt",
        metavar="PROMPT",
        nargs="?",
        help="left out with --prompt-embeds or --from, or where the model takes none",
    )
    p.add_argument("--prompt", dest="prompts", action="append", default=[], metavar="TEXT", help="one more; repeatable")
    lines = "more of them, one a line; empty lines and those that begin with # are none; - is standard input"
    p.add_argument("--prompts-file", type=Path, metavar="FILE", help=lines)
    again = "draw it again from the record in it; other options come in place of what that says"
    p.add_argument("--from", dest="source", type=Path, metavar="PICTURE", help=again)
    several = "several become OUT-0.png, …; videos: .mp4, .gif; BUNDLE-0001.png, the next that is free, if left out; "
    p.add_argument("--output", type=Path, metavar="OUT.png", help=f"{several}- is standard output")
    begins = "what to begin from in place of noise, beside a prompt; or what an image-to-video model starts from"
    p.add_argument("--image", type=Path, metavar="IN.png", help=begins)
    part = "the part of the plan's steps that is taken from --image on, above 0 and at most 1; 0.6 if left out"
    p.add_argument("--strength", type=_number, metavar="S", help=part)
    anew = "what of --image is drawn anew: what is white, or transparent where it has alpha; the rest stays"
    p.add_argument("--mask", type=Path, metavar="M.png", help=anew)
    p.add_argument("--prompt-embeds", type=Path, metavar="E.safetensors", help="from `tgate embed`, for a prompt")
    p.add_argument("--seed", type=_seed, metavar="S", help="image j has seed S + j; drawn, and told, if left out")
    p.add_argument("--generator", metavar="NAME", help="of noise: numpy, if left out, or, as diffusers, torch-cuda")
    p.add_argument("--negative-prompt", metavar="TEXT", help="what to steer away from")
    p.add_argument("--guidance-scale", type=_number, metavar="G", help="above 1; the plan's if left out")
    _plan(p)
    _size(p)
    p.add_argument("--num-images", type=_count, default=1, metavar="N", help="of each prompt")
    p.add_argument("--initial-latents", type=Path, metavar="X.npy", help="standard normal noise, in place of a seed's")
    _json(p)
    p.add_argument("--save-latents", type=Path, metavar="Y.npy", help="the final latents, before decoding")
    unnoted = "leave what it was drawn from, the prompt too, out of the files"
    p.add_argument("--no-metadata", dest="metadata", action="store_false", help=unnoted)
    p.add_argument("--preview", type=Path, metavar="P.png", help="a rough picture of where it is heading, as steps go")
    p.add_argument("--preview-every", type=_count, default=5, metavar="N", help="steps; 5 if left out")
    _engine(p)

    p = command("embed", "Encode prompts ahead of time, for bundles without a text encoder.", bundle=False)
    p.add_argument("prompt", metavar="PROMPT", nargs="+")
    p.add_argument("--model", required=True, metavar="NAME", help="as for tgate-export")
    p.add_argument(
        "--checkpoint", metavar="DIR_OR_HUB_ID", help="where the text encoder is; the model's own if left out"
    )
    p.add_argument("--output", required=True, type=Path, metavar="E.safetensors")
    p.add_argument("--negative-prompt", metavar="TEXT", help="what to steer away from")
    p.add_argument("--clip-skip", type=_count_or_none, default=0, metavar="N", help="as the bundle was exported with")
    p.add_argument("--half", action="store_true", help="hold the encoder in bfloat16: half the memory")

    p = command("inspect", "Show a bundle's plans step by step, their MACs, and sizes.")
    _size(p)
    _json(p)

    p = command("verify", "Check digests and plans, and replay the recorded goldens.")
    _json(p)
    _engine(p)

    p = command("bench", "Measure a plan and those it is compared with, in turns.")
    _json(p)
    p.add_argument("--plan", default="default", metavar="NAME")
    against = "a plan to compare with; repeatable; the plan's own baselines if left out"
    p.add_argument("--against", action="append", metavar="NAME", help=against)
    _size(p)
    p.add_argument("--batch", type=_count, metavar="B", help="images at once")
    p.add_argument("--repeats", type=_count, default=5, metavar="N", help="measured turns")
    p.add_argument("--warm-ups", type=_count_or_none, default=1, metavar="N", help="turns before that")
    p.add_argument(
        "--trace", type=Path, metavar="FILE.json", help="a run of the plan, for Perfetto or chrome://tracing"
    )
    _engine(p)

    p = command("engines", "Show which engines are installed here, and what brings the others.", bundle=False)
    _json(p)

    p = command("build", "Compile a bundle for an engine ahead of time.")
    _json(p)
    _plan(p, help="the graphs of this plan alone; of every plan if left out")
    _size(p, help="the graphs of this size alone; of every size if left out")
    _engine(p)

    p = command("serve", "Answer requests for pictures over HTTP, as OpenAI's API has them.", bundle=False)
    named = "a bundle's directory, or NAME=DIRECTORY; mini is the one that ships"
    p.add_argument("bundle", metavar="BUNDLE", nargs="+", help=named)
    p.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="to listen on; 127.0.0.1 if left out")
    p.add_argument("--port", type=_port, default=8000, metavar="N", help="0 takes one that is free; 8000 if left out")
    p.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys that requests need, one a line")
    p.add_argument("--without-api-key", action="store_true", help="let whoever reaches ADDRESS draw")
    p.add_argument("--plan", action="append", metavar="NAME", help="serve this plan alone; repeatable")
    p.add_argument(
        "--size", action="append", type=_size_name, metavar="WIDTHxHEIGHT", help="this size alone; repeatable"
    )
    p.add_argument("--rows", type=_count, metavar="N", help="images of each size in flight; two calls' if left out")
    p.add_argument("--queue", type=_count, default=64, metavar="N", help="images that may wait; 64 if left out")
    patience = "calls that may pass over the oldest image, for each of its steps; 8 if left out"
    p.add_argument("--patience", type=_count_or_none, default=8, metavar="N", help=patience)
    p.add_argument("--memory-limit", type=_bytes, metavar="SIZE", help="all that is planned must fit, such as 8GiB")
    p.add_argument("--most-images", type=_count, default=10, metavar="N", help="of a request; 10 if left out")
    drain = "requests may go on for so long after SIGTERM; 60 if left out"
    p.add_argument("--drain-seconds", type=_count_or_none, default=60, metavar="N", help=drain)
    _engine(p)

    p = command("plan", "Add a plan to a bundle, over the graphs it has, with its baselines; or take some out.")
    p.add_argument("--name", type=_name, help="what it is called; a plan that is added needs it")
    p.add_argument("--m", type=_steps, help="the gate step; a plan that is added needs it")
    p.add_argument("--k", type=_steps, help="the self-attention interval before the gate; 1, no reuse, if left out")
    p.add_argument("--steps", type=_steps, metavar="N", help="the default plan's if left out, as the next two")
    p.add_argument("--sampler", metavar="NAME")
    _method(p)
    p.add_argument("--force", action="store_true", help="replace a plan of that name, or the file of --output")
    p.add_argument(
        "--remove",
        type=_name,
        action="append",
        metavar="NAME",
        help="take a plan out, and add none; repeatable",
    )
    _json(p)
    p.add_argument(
        "--output", type=_plan_file, metavar="FILE.json", help="write the plan to a file, and leave the bundle as it is"
    )

    p = command("tune", "Find the plan to take, by what it costs here in pictures and in time, and add it.")
    goal = p.add_mutually_exclusive_group(required=True)
    fastest = "the fastest plan whose pictures are so near the ungated ones: psnr=30 (dB) or ssim=0.95"
    goal.add_argument("--budget", type=_budget, metavar="NAME=NUMBER", help=fastest)
    nearest = "the plan whose pictures are nearest, of those that take a picture so many times as fast as ungated"
    goal.add_argument("--speedup", type=_speedup, metavar="X", help=nearest)
    yours = "yours, one a line, as for tgate generate; an embedded model has its own if left out"
    p.add_argument("--prompts", type=Path, metavar="FILE", help=yours)
    p.add_argument("--images", type=_images, default=32, metavar="N", help="of each plan in the end; 32 if left out")
    p.add_argument("--seed", type=_seed, default=0, metavar="S", help="image j has seed S + j; 0 if left out")
    p.add_argument("--steps", type=_steps, metavar="N", help="the default plan's if left out")
    p.add_argument("--name", type=_name, default="tuned", help="of the plan that is added; tuned if left out")
    p.add_argument("--force", action="store_true", help="replace a plan of that name")
    going_on = "keep what is measured in this file, and go on with what it holds"
    p.add_argument("--state", type=Path, metavar="FILE", help=going_on)
    _size(p)
    _json(p)
    _engine(p)
    return parser


def export_parser(list_models: Callable[[], int] = lambda: 0) -> Parser:
    """The parser of ``tgate-export``, whose ``command`` is "export"; ``list_models`` shows them for --list-models."""
    parser = Parser(prog="tgate-export", description="Compile a diffusion model into a bundle, ahead of time.")
    parser.add_argument("--version", action="version", version=f"tgate-export {__version__}")
    parser.set_defaults(command="export", parser=parser)
    add = parser.add_argument
    add("--model", required=True, metavar="NAME", help="mini-sdxl (embedded), or another of --list-models")
    what = "show the models and their settings, and stop"
    parser.add_argument("--list-models", action=_ListModels, const=list_models, help=what)
    add("--checkpoint", metavar="FROM", help="a diffusers directory, a .safetensors file, or a hub id")
    add(
        "--weights",
        choices=("checkpoint", "random", "none"),
        default="checkpoint",
        help="random: the published structure, to measure; none: graphs, plans and MACs only",
    )
    add(
        "--components",
        metavar="A,B",
        help="of text, image, denoiser, decoder, encoder; all, or without weights the denoiser",
    )
    add("--lora", action="append", default=[], metavar="FILE[:SCALE]", help="fuse a LoRA into the weights; repeatable")
    add(
        "--clip-skip",
        type=_count_or_none,
        default=0,
        metavar="N",
        help="last layers of CLIP's text encoders to leave out",
    )
    add("--method", default="tgate", metavar="NAME", help="tgate, guidance_delta or tgate+guidance_delta")
    add("--m", type=_steps, help="the gate step; the model's own if left out")
    add("--k", type=_steps, help="the self-attention interval before the gate; 1: no reuse")
    add("--steps", type=_steps, metavar="N", help="inference steps")
    add("--sampler", metavar="NAME", help="dpmpp_2m, ddim, euler, …")
    _method(parser)
    rescaled = "bring guided outputs back to the prompt's deviation: 0 not at all, 1 wholly; 0.7 is usual"
    add("--guidance-rescale", type=_number, default=0.0, metavar="R", help=rescaled)
    sizes = "in pixels, such as 1024x1024; repeatable, the first one is the default"
    add("--size", type=_pixels, action="append", metavar="WIDTHxHEIGHT", help=sizes)
    add("--height", type=_side, metavar="PIXELS", help="of the only size, as the next one")
    add("--width", type=_side, metavar="PIXELS")
    add("--frames", type=_count, metavar="F", help="of a video model")
    batches = "images at once, such as 1 or 1:4; repeatable; the model's own if left out"
    add("--batch", type=_batch, action="append", metavar="N|LEAST:MOST", help=batches)
    add("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32")
    add("--output", type=Path, metavar="DIR", help="bundles/<model> if left out")
    add("--force", action="store_true", help="replace a bundle that is there")
    _json(parser)
    add("--no-verify", dest="verify", action="store_false", help="record no goldens, and replay none before finishing")
    _common(parser)
    return parser


class _ListModels(argparse.Action):
    """Shows the models by calling ``const``, and stops, as --version does."""

    def __init__(
        self, option_strings: Sequence[str], dest: str, const: Callable[[], int], help: str | None = None
    ) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, const=const, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        try:
            parser.exit(self.const())
        except TgateError as error:
            parser.exit(FAILED, f"{parser.prog}: error: {error}\n")


def _method(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--warm-up", type=_steps_or_none, metavar="W", help="steps that reuse nothing")
    parser.add_argument("--fidelity-interval", type=_steps, metavar="F", help="k after the gate; 1 if left out")
    parser.add_argument(
        "--forecast", type=_steps, metavar="R", help="from step M on, compute every R-th step and forecast the others"
    )
    parser.add_argument("--guidance-scale", type=_number, metavar="G", help="of classifier-free guidance: 1 is without")


def check_generate(args: argparse.Namespace) -> None:
    """Ends as a wrong command line does where options of ``tgate generate`` do not go together."""
    if args.bundle is None and args.source is None:
        args.parser.error("the following arguments are required: BUNDLE")
    if args.json and args.output == Path("-"):
        args.parser.error("--json and --output - both write to standard output; give one of them")


def check_plan(args: argparse.Namespace) -> None:
    """Ends as a wrong command line does where ``tgate plan`` is told to add a plan without saying which, or to take
    some out and more beside."""
    numbers = ("m", "k", "steps", "sampler", "warm_up", "fidelity_interval", "forecast", "guidance_scale")
    given = [
        f"--{name.replace('_', '-')}"
        for name in ("name", *numbers, "output", "force")
        if getattr(args, name) is not None and getattr(args, name) is not False  # 0 is given
    ]
    missing = [option for option in ("--name", "--m") if option not in given]
    if args.remove and given:
        args.parser.error(f"--remove takes plans out and adds none; leave out {', '.join(given)}")
    if not args.remove and missing:
        args.parser.error(f"the following arguments are required: {', '.join(missing)}; or --remove NAME")


CHECKS: Mapping[str, Callable[[argparse.Namespace], None]] = {"generate": check_generate, "plan": check_plan}
"""What goes together, by the command."""


def _plan(parser: argparse.ArgumentParser, *, help: str | None = None) -> None:
    parser.add_argument("--plan", metavar="NAME|FILE.json", help=help or "the bundle's, or a file")


def _size(parser: argparse.ArgumentParser, *, help: str = "one of the bundle's; its first if left out") -> None:
    parser.add_argument("--size", type=_size_name, metavar="WIDTHxHEIGHT", help=help)


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as data")


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress; warnings and errors only")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")


def _engine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--engine", default="ort-cpu", metavar="NAME", help="one of `tgate engines`; ort-cpu if left out")
    add("--threads", type=_count, metavar="N", help="of one graph; the engine's choice if left out")
    add("--device", type=_count_or_none, default=0, metavar="N", help="the GPU's number")
    add("--architecture", metavar="sm_NN", help="the GPU to compile for, where there is none")
    add("--precision", choices=("f32", "bf16", "f16"), help="what the engine computes in; its choice if left out")
    layouts = "one copy of the weights, or private ones in faster layouts"
    defaults = "fast on ort-cpu, openvino and TensorRT, shared on ort-cuda, aoti and TensorRT-RTX"
    add("--memory", choices=("shared", "fast"), help=f"{layouts}; if left out {defaults}")


def _whole(text: str, least: int, most: int) -> int:
    """A number of the digits 0 to 9 alone, which int() is not so strict about."""
    if re.fullmatch("[0-9]{1,19}", text) and least <= int(text) <= most:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number from {least} to {most}, got '{shown(text, 40)}'")


def _steps(text: str) -> int:
    return _steps_or_none(text, 1)


def _steps_or_none(text: str, least: int = 0) -> int:
    from tgate_engine.sampler import MOST_STEPS

    return _whole(text, least, MOST_STEPS)


def _port(text: str) -> int:
    return _whole(text, 0, 65535)


def _bytes(text: str) -> int:
    match = re.fullmatch("([0-9]{1,9})(MiB|GiB)", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected a size such as 900MiB or 8GiB, got '{shown(text, 40)}'")
    return int(match[1]) * (2**20 if match[2] == "MiB" else 2**30)


def _count(text: str) -> int:
    return _whole(text, 1, MOST)


def _count_or_none(text: str) -> int:
    return _whole(text, 0, MOST)


def _side(text: str) -> int:
    return _whole(text, 1, MOST_PIXELS)


def _seed(text: str) -> int:
    return _whole(text, 0, SEED_LIMIT - 1)


def _number(text: str) -> float:
    with contextlib.suppress(ValueError):
        if math.isfinite(float(text)):
            return float(text)
    raise argparse.ArgumentTypeError(f"expected a finite number, got '{shown(text, 40)}'")


def _budget(text: str) -> tuple[str, float]:
    """(metric, least) of ``psnr=30``."""
    metric, equals, number = text.partition("=")
    if not equals or metric not in MOST_QUALITY:
        raise argparse.ArgumentTypeError(
            f"expected psnr=NUMBER, in dB, or ssim=NUMBER, up to 1, got '{shown(text, 40)}'; accuracy takes a judge of "
            "your own, see docs/choose.md"
        )
    least, most = _number(number), MOST_QUALITY[metric]
    if not 0 < least <= most:
        raise argparse.ArgumentTypeError(f"expected {metric} above 0 and at most {most:g}, got '{shown(number, 40)}'")
    return metric, least


def _speedup(text: str) -> float:
    factor = _number(text)
    if not 1 < factor <= MOST:
        raise argparse.ArgumentTypeError(f"expected a number above 1, times as fast, got '{shown(text, 40)}'")
    return factor


def _images(text: str) -> int:
    return _whole(text, LEAST_IMAGES, MOST)


def _pixels(text: str) -> tuple[int, int]:
    """(width, height) of WIDTHxHEIGHT."""
    match = re.fullmatch("([1-9][0-9]{0,5})x([1-9][0-9]{0,5})", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT in pixels, such as 1024x768, got '{shown(text, 40)}'")
    return _side(match[1]), _side(match[2])


def _size_name(text: str) -> str:
    width, height = _pixels(text)
    return f"{width}x{height}"


def _name(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("a plan's name cannot be empty")
    if not is_word(text):
        raise argparse.ArgumentTypeError(
            f"a plan's name is at most {MOST_LETTERS} characters, all of them printable, got '{shown(text)}'"
        )
    return text


def _plan_file(text: str) -> Path:
    if not text.endswith(".json"):
        raise argparse.ArgumentTypeError(
            f"a plan file's name ends in .json, by which --plan knows it, got '{shown(text)}'"
        )
    return Path(text)


def _batch(text: str) -> tuple[int, int]:
    least, colon, most = text.partition(":")
    return _count(least), _count(most if colon else least)
