"""The arguments of ``tgate`` and ``tgate-export``; :mod:`tgate_cli.main` says what each command does.

What is parsed holds the command's own ``parser`` beside its arguments.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tgate_cli.command import LONGEST
from tgate_cli.hints import hint, meant
from tgate_cli.tune_arguments import add_tune, check_tune
from tgate_cli.values import (
    adapter_name,
    amount,
    batch,
    control_name,
    control_picture,
    control_scale,
    control_span,
    count,
    count_or_none,
    lora,
    number,
    pixels,
    plan_file,
    plan_name,
    port,
    seed,
    side,
    size_name,
    steps,
    steps_or_none,
)
from tgate_engine import __version__
from tgate_engine.errors import TgateError, shown

FAILED, USAGE = 1, 2


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
        if options.get("type") in (Path, plan_file):
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
    part = "the part of the plan's steps that is taken from --image on, above 0 and at most 1; if left out 0.6"
    p.add_argument("--strength", type=number, metavar="S", help=f"{part}, 1 of an inpainting model")
    anew = "what of --image is drawn anew: what is white, or transparent where it has alpha; the rest stays"
    p.add_argument("--mask", type=Path, metavar="M.png", help=anew)
    p.add_argument("--prompt-embeds", type=Path, metavar="E.safetensors", help="from `tgate embed`, for a prompt")
    attended = "a picture that all images attend to beside their prompts, of a bundle with an IP-Adapter"
    p.add_argument("--ip-adapter-image", type=Path, metavar="IN.png", help=attended)
    added = "how much of --ip-adapter-image is added, from 0.001 to 10; 1 if left out, 0.4 to 0.8 is usual"
    p.add_argument("--ip-adapter-scale", type=number, metavar="S", help=added)
    p.add_argument("--seed", type=seed, metavar="S", help="image j has seed S + j; drawn, and told, if left out")
    p.add_argument("--generator", metavar="NAME", help="of noise: numpy, if left out, or, as diffusers, torch-cuda")
    p.add_argument("--negative-prompt", metavar="TEXT", help="what to steer away from")
    p.add_argument("--guidance-scale", type=number, metavar="G", help="above 1; the plan's if left out")
    named = "add an adapter of the bundle's to the weights (tgate adapt), 1.0 of it if left out; repeatable"
    p.add_argument("--lora", dest="loras", type=lora, action="append", default=[], metavar="NAME[:SCALE]", help=named)
    _controls(p)
    _plan(p)
    _size(p)
    p.add_argument("--num-images", type=count, default=1, metavar="N", help="of each prompt")
    p.add_argument("--initial-latents", type=Path, metavar="X.npy", help="standard normal noise, in place of a seed's")
    _json(p)
    p.add_argument("--save-latents", type=Path, metavar="Y.npy", help="the final latents, before decoding")
    unnoted = "leave what it was drawn from, the prompt too, out of the files"
    p.add_argument("--no-metadata", dest="metadata", action="store_false", help=unnoted)
    p.add_argument("--preview", type=Path, metavar="P.png", help="a rough picture of where it is heading, as steps go")
    p.add_argument("--preview-every", type=count, default=5, metavar="N", help="steps; 5 if left out")
    by = "what decodes the pictures: the model's own, or the small one of --preview-decoder; full if left out"
    p.add_argument("--decoder", choices=("full", "preview"), help=by)
    _engine(p)

    p = command("embed", "Encode prompts ahead of time, for bundles without a text encoder.", bundle=False)
    p.add_argument("prompt", metavar="PROMPT", nargs="+")
    p.add_argument("--model", required=True, metavar="NAME", help="as for tgate-export")
    p.add_argument(
        "--checkpoint", metavar="DIR_OR_HUB_ID", help="where the text encoder is; the model's own if left out"
    )
    p.add_argument("--output", required=True, type=Path, metavar="E.safetensors")
    p.add_argument("--negative-prompt", metavar="TEXT", help="what to steer away from")
    p.add_argument("--clip-skip", type=count_or_none, default=0, metavar="N", help="as the bundle was exported with")
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
    p.add_argument("--batch", type=count, metavar="B", help="images at once")
    p.add_argument("--repeats", type=count, default=5, metavar="N", help="measured turns")
    p.add_argument("--warm-ups", type=count_or_none, default=1, metavar="N", help="turns before that")
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
    p.add_argument("--port", type=port, default=8000, metavar="N", help="0 takes one that is free; 8000 if left out")
    p.add_argument("--api-key-file", type=Path, metavar="FILE", help="keys that requests need, one a line")
    p.add_argument("--without-api-key", action="store_true", help="let whoever reaches ADDRESS draw")
    p.add_argument("--plan", action="append", metavar="NAME", help="serve this plan alone; repeatable")
    p.add_argument(
        "--size", action="append", type=size_name, metavar="WIDTHxHEIGHT", help="this size alone; repeatable"
    )
    p.add_argument("--rows", type=count, metavar="N", help="images of each size in flight; two calls' if left out")
    p.add_argument("--queue", type=count, default=64, metavar="N", help="images that may wait; 64 if left out")
    patience = "calls that may pass over the oldest image, for each of its steps; 8 if left out"
    p.add_argument("--patience", type=count_or_none, default=8, metavar="N", help=patience)
    combined = "combinations of adapters that are drawn at once, beside requests without; 1 if left out"
    p.add_argument("--adapted", type=count, default=1, metavar="N", help=combined)
    p.add_argument("--memory-limit", type=amount, metavar="SIZE", help="all that is planned must fit, such as 8GiB")
    p.add_argument("--most-images", type=count, default=10, metavar="N", help="of a request; 10 if left out")
    drain = "requests may go on for so long after SIGTERM; 60 if left out"
    p.add_argument("--drain-seconds", type=count_or_none, default=60, metavar="N", help=drain)
    _engine(p)

    p = command("plan", "Add a plan to a bundle, over the graphs it has, with its baselines; or take some out.")
    p.add_argument("--name", type=plan_name, help="what it is called; a plan that is added needs it")
    p.add_argument("--m", type=steps, help="the gate step; a plan that is added needs it, unless its method has none")
    p.add_argument("--k", type=steps, help="the self-attention interval before the gate; 1, no reuse, if left out")
    p.add_argument("--steps", type=steps, metavar="N", help="the default plan's if left out, as the next two")
    p.add_argument("--sampler", metavar="NAME")
    _method(p)
    p.add_argument("--force", action="store_true", help="replace a plan of that name, or the file of --output")
    p.add_argument(
        "--remove",
        type=plan_name,
        action="append",
        metavar="NAME",
        help="take a plan out, and add none; repeatable",
    )
    _json(p)
    p.add_argument(
        "--output", type=plan_file, metavar="FILE.json", help="write the plan to a file, and leave the bundle as it is"
    )

    p = command("adapt", "Keep a LoRA in a bundle, for requests to name; or take some out.")
    what = "a .safetensors file, of this bundle's model; left out with --remove"
    p.add_argument("lora", type=Path, metavar="LORA", nargs="?", help=what)
    p.add_argument("--name", type=adapter_name, help="what requests call it; the file's name if left out")
    p.add_argument("--force", action="store_true", help="replace an adapter of that name")
    p.add_argument(
        "--remove",
        type=adapter_name,
        action="append",
        metavar="NAME",
        help="take an adapter out, and add none; repeatable",
    )
    _json(p)

    p = command("tune", "Find the plan to take, by what it costs here in pictures and in time, and add it.")
    add_tune(p)
    p.add_argument("--seed", type=seed, default=0, metavar="S", help="image j has seed S + j; 0 if left out")
    p.add_argument("--steps", type=steps, metavar="N", help="the default plan's if left out")
    p.add_argument("--name", type=plan_name, default="tuned", help="of the plan that is added; tuned if left out")
    p.add_argument(
        "--force", action="store_true", help="replace a plan of that name, and the files of --html and --markdown"
    )
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
        help="of text, image, denoiser, decoder, encoder, reference; all, or without weights the denoiser",
    )
    small = "a small decoder for previews: a directory of diffusers' AutoencoderTiny"
    add("--preview-decoder", type=Path, metavar="DIR", help=small)
    add("--lora", action="append", default=[], metavar="FILE[:SCALE]", help="fuse a LoRA into the weights; repeatable")
    add(
        "--controlnet",
        action="append",
        default=[],
        metavar="NAME=DIR",
        help="export a ControlNet (SD, SDXL) beside the denoiser, for requests to name; repeatable",
    )
    add(
        "--clip-skip",
        type=count_or_none,
        default=0,
        metavar="N",
        help="last layers of CLIP's text encoders to leave out",
    )
    add("--method", metavar="NAME", help="tgate, guidance_delta, deepcache, …; the model's own if left out")
    add("--m", type=steps, help="the gate step; the model's own if left out")
    add("--k", type=steps, help="the self-attention interval before the gate; 1: no reuse")
    add("--steps", type=steps, metavar="N", help="inference steps")
    add("--sampler", metavar="NAME", help="dpmpp_2m, ddim, euler, …")
    _method(parser)
    add(
        "--cache-branch",
        type=count_or_none,
        default=0,
        metavar="B",
        help="of deepcache: how many layers beside the last one a shallow call computes; 0 if left out",
    )
    add(
        "--merge-ratio",
        type=number,
        metavar="R",
        help="of tome: the share of the finest grid's tokens that are merged for self-attention; 0.5 if left out",
    )
    second = "of a second network, for late steps (Wan 2.2); the model's own if left out"
    add("--guidance-scale-2", type=number, metavar="S", help=second)
    rescaled = "bring guided outputs back to the prompt's deviation: 0 not at all, 1 wholly; 0.7 is usual"
    add("--guidance-rescale", type=number, default=0.0, metavar="R", help=rescaled)
    sizes = "in pixels, such as 1024x1024; repeatable, the first one is the default"
    add("--size", type=pixels, action="append", metavar="WIDTHxHEIGHT", help=sizes)
    add("--height", type=side, metavar="PIXELS", help="of the only size, as the next one")
    add("--width", type=side, metavar="PIXELS")
    add("--frames", type=count, metavar="F", help="of a video model")
    batches = "images at once, such as 1 or 1:4; repeatable; the model's own if left out"
    add("--batch", type=batch, action="append", metavar="N|LEAST:MOST", help=batches)
    add("--dtype", choices=("fp32", "fp16", "bf16"), default="fp32")
    add("--output", type=Path, metavar="DIR", help="bundles/<model> if left out")
    add("--force", action="store_true", help="replace a bundle that is there")
    _json(parser)
    beside = "an IP-Adapter's .safetensors file: requests may then have a picture beside their prompt"
    add("--ip-adapter", type=Path, metavar="FILE", help=beside)
    encoder = "its pictures' encoder, a directory of CLIP's vision model; image_encoder beside FILE if left out"
    add("--image-encoder", type=Path, metavar="DIR", help=encoder)
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
    parser.add_argument("--warm-up", type=steps_or_none, metavar="W", help="steps that reuse nothing")
    parser.add_argument("--fidelity-interval", type=steps, metavar="F", help="k after the gate; 1 if left out")
    parser.add_argument(
        "--forecast", type=steps, metavar="R", help="from step M on, compute every R-th step and forecast the others"
    )
    parser.add_argument(
        "--cache-interval", type=steps, metavar="C", help="of deepcache: every C-th call is a full one; 3 if left out"
    )
    parser.add_argument(
        "--refresh", type=steps, metavar="G", help="of guidance_delta: from step M on, every G-th step is a full one"
    )
    parser.add_argument("--guidance-scale", type=number, metavar="S", help="of classifier-free guidance: 1 is without")


def _controls(parser: argparse.ArgumentParser) -> None:
    """What each names, one of them does; several name several."""
    looked = "the picture that a ControlNet of the bundle's looks at; repeatable"
    parser.add_argument(
        "--control",
        dest="controls",
        type=control_picture,
        action="append",
        default=[],
        metavar="NAME=IN.png",
        help=looked,
    )
    more: list[tuple[str, Callable[[str], object], str, str]] = [
        ("scale", control_scale, "NAME=SCALE", "what a ControlNet adds is multiplied with this; 1 if left out"),
        ("span", control_span, "NAME=START:END", "the part of the network calls at which it runs; 0:1 if left out"),
        ("until-gate", control_name, "NAME", "it stops where the plan's gate closes, and does not go on after it"),
    ]
    for name, kind, form, text in more:
        parser.add_argument(
            f"--control-{name}",
            dest=f"control_{name.replace('-', '_')}",
            type=kind,
            action="append",
            default=[],
            metavar=form,
            help=f"{text}; repeatable",
        )


def check_generate(args: argparse.Namespace) -> None:
    """Ends as a wrong command line does where options of ``tgate generate`` do not go together."""
    if args.bundle is None and args.source is None:
        args.parser.error("the following arguments are required: BUNDLE")
    if args.json and args.output == Path("-"):
        args.parser.error("--json and --output - both write to standard output; give one of them")
    names = [name for name, _ in args.loras]
    if twice := [name for name in names if names.count(name) > 1]:
        args.parser.error(f"--lora {twice[0]} is there {names.count(twice[0])} times; give one scale")
    _check_controls(args)


def _check_controls(args: argparse.Namespace) -> None:
    named = [name for name, _ in args.controls]
    several = {
        "--control": named,
        "--control-scale": [name for name, _ in args.control_scale],
        "--control-span": [name for name, _ in args.control_span],
        "--control-until-gate": list(args.control_until_gate),
    }
    for option, names in several.items():
        if twice := [name for name in names if names.count(name) > 1]:
            args.parser.error(f"{option} names {twice[0]} {names.count(twice[0])} times; give it once")
        if odd := [name for name in names if name not in named]:
            args.parser.error(
                f"{option} names {odd[0]}, which no --control gives a picture; give --control {odd[0]}=FILE"
            )


def check_plan(args: argparse.Namespace) -> None:
    """Ends as a wrong command line does where ``tgate plan`` is told to add a plan without saying which, or to take
    some out and more beside."""
    intervals = ("fidelity_interval", "forecast", "cache_interval", "refresh")
    settings = ("m", "k", "steps", "sampler", "warm_up", *intervals)
    given = [
        f"--{name.replace('_', '-')}"
        for name in ("name", *settings, "guidance_scale", "output", "force")
        if getattr(args, name) is not None and getattr(args, name) is not False  # 0 is given
    ]
    if args.remove and given:
        args.parser.error(f"--remove takes plans out and adds none; leave out {', '.join(given)}")
    if not args.remove and "--name" not in given:
        args.parser.error("the following arguments are required: --name; or --remove NAME")


def check_adapt(args: argparse.Namespace) -> None:
    """Ends as a wrong command line does where ``tgate adapt`` is told neither what to keep nor what to take out, or
    both."""
    given = {"LORA": args.lora, "--name": args.name, "--force": args.force or None}
    named = [name for name, value in given.items() if value is not None]
    if args.remove and named:
        args.parser.error(f"--remove takes adapters out and adds none; leave out {', '.join(named)}")
    if not args.remove and args.lora is None:
        args.parser.error("the following arguments are required: LORA; or --remove NAME")


CHECKS: Mapping[str, Callable[[argparse.Namespace], None]] = {
    "generate": check_generate,
    "plan": check_plan,
    "adapt": check_adapt,
    "tune": check_tune,
}
"""What goes together, by the command."""


def _plan(parser: argparse.ArgumentParser, *, help: str | None = None) -> None:
    parser.add_argument("--plan", metavar="NAME|FILE.json", help=help or "the bundle's, or a file")


def _size(parser: argparse.ArgumentParser, *, help: str = "one of the bundle's; its first if left out") -> None:
    parser.add_argument("--size", type=size_name, metavar="WIDTHxHEIGHT", help=help)


def _json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as data")


def _common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", action="store_true", help="no progress; warnings and errors only")
    parser.add_argument("--traceback", action="store_true", help="show where an error came from")


def _engine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--engine", default="ort-cpu", metavar="NAME", help="one of `tgate engines`; ort-cpu if left out")
    add("--threads", type=count, metavar="N", help="of one graph; the engine's choice if left out")
    add("--device", type=count_or_none, default=0, metavar="N", help="the GPU's number")
    add("--architecture", metavar="sm_NN", help="the GPU to compile for, where there is none")
    add("--precision", choices=("f32", "bf16", "f16"), help="what the engine computes in; its choice if left out")
    layouts = "one copy of the weights, or private ones in faster layouts"
    defaults = "fast on ort-cpu, openvino and TensorRT, shared on ort-cuda, aoti and TensorRT-RTX"
    add("--memory", choices=("shared", "fast"), help=f"{layouts}; if left out {defaults}")
