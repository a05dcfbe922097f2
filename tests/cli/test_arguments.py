"""A command line that is wrong: one line, and exit status 2."""

from __future__ import annotations

import argparse
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import tgate_engine
from tests.cli.running import Run, fails
from tgate_cli.arguments import export_parser, tgate_parser
from tgate_cli.main import export_main
from tgate_cli.main import main as tgate_main
from tgate_engine.errors import MethodError
from tgate_engine.sampler import MOST_STEPS
from tgate_export.methods.base import Settings


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"tgate {tgate_engine.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        ["paint"],
        ["generate"],
        ["generate", "b", "p", "--output", "x.png", "--seed", "seven"],
        ["generate", "b", "p", "--output", "x.png", "--num-images", "0"],
        ["generate", "b", "p", "--output", "x.png", "--threads", "-1"],
        ["generate", "b", "p", "--output", "x.png", "--size", "1024"],
        ["inspect", "b", "--size", "1024*1024"],
        ["bench", "b", "--size", "x1024"],
        ["build", "b", "--size", ""],
        ["bench", "b", "--without-stopped"],
        ["plan", "b", "--m", "5", "--name", ""],
        ["plan", "b", "--m", "5", "--name", "x", "--output", "plan.txt"],
        ["inspect", "b", "--what"],
        ["engines", "b"],
        ["bench", "b", "--repeats", "0"],
        ["plan", "b", "--m", "5"],
    ],
)
def test_a_command_line_that_is_wrong(run: Run, arguments: list[str]) -> None:
    result = run(*arguments)
    known = arguments[:1] if arguments[:1] != ["paint"] else []
    fails(result, f"(see {' '.join(['tgate', *known])} --help)", status=2)
    assert len(result[2].splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--model", "mini-sdxl", "--m", "ten"],
        ["--model", "mini-sdxl", "--batch", "1:x"],
        ["--model", "mini-sdxl", "--batch", "0"],
        ["--model", "mini-sdxl", "--batch", "1:"],
        ["--model", "mini-sdxl", "--size", "1024*1024"],
        ["--model", "mini-sdxl", "--size", "0x5"],
        ["--model", "mini-sdxl", "--dtype", "int4"],
        ["--model", "mini-sdxl", "--what"],
    ],
)
def test_an_export_command_line_that_is_wrong(run: Run, arguments: list[str]) -> None:
    result = run(*arguments, main=export_main)
    fails(result, "(see tgate-export --help)", status=2)
    assert result[2].startswith("tgate-export: error: ")


@pytest.mark.parametrize(
    "text", ["", "x", "1024", "1024x", "x1024", "0x5", "5x0", "-1x5", "1024*1024", "1024X1024", "1e3x5", "1_0x5", "٣x٣"]
)
def test_what_is_no_size(run: Run, text: str) -> None:
    result = run("--model", "sdxl", f"--size={text}", main=export_main)
    fails(result, f"argument --size: expected WIDTHxHEIGHT in pixels, such as 1024x768, got {text!r}", status=2)


def test_sizes_and_batches_are_repeatable() -> None:
    parse = export_parser(lambda: 0).parse_args
    args = parse(["--model", "sdxl", "--size", "1024x768", "--size", "64x64", "--batch", "2", "--batch", "4:8"])
    assert args.size == [(1024, 768), (64, 64)]
    assert args.batch == [(2, 2), (4, 8)]
    args = parse(["--model", "sdxl"])
    assert (args.size, args.batch) == (None, None)


def test_what_a_bundle_is_asked_for() -> None:
    parse = tgate_parser().parse_args
    assert parse(["inspect", "b", "--size", "1024x768"]).size == "1024x768"
    assert parse(["bench", "b", "--against", "ungated", "--against", "fast"]).against == ["ungated", "fast"]
    assert parse(["bench", "b"]).against is None
    assert parse(["plan", "b", "--name", "x", "--m", "5", "--output", "d/x.json"]).output == Path("d/x.json")


def test_the_help_says_which_seed_an_image_has(run: Run) -> None:
    status, out, _ = run("generate", "--help")
    assert status == 0
    assert "image j has seed S + j" in " ".join(out.split())


ABSURD = (str(10**400), str(2**63), str(10**9), "-1", "nan", "inf", "1e3", "1_0", "\u0663", "\x1b[2J", "")


@pytest.mark.parametrize("option", ["--num-images", "--threads", "--device", "--seed", "--guidance-scale", "--size"])
@pytest.mark.parametrize("value", ABSURD)
def test_a_number_that_means_nothing(run: Run, option: str, value: str) -> None:
    """Refused where it is read, in a line that quotes little of it; but nine digits are a seed, and a scale."""
    if option in ("--seed", "--guidance-scale") and value == str(10**9):
        return
    if option == "--guidance-scale" and value in ("-1", "1e3", "1_0", "\u0663", str(2**63)):
        return  # finite numbers to Python; the bundle says which it takes
    result = run("generate", "b", "p", "--output", "x.png", f"{option}={value}")
    fails(result, f"argument {option}: expected ", status=2)
    assert len(result[2]) < 250
    assert result[2].rstrip("\n").isprintable()


@pytest.mark.parametrize("option", ["--m", "--k", "--steps", "--warm-up", "--fidelity-interval", "--cache-interval"])
@pytest.mark.parametrize("value", [str(MOST_STEPS + 1), "-1", "1" * 5000])
def test_steps_that_no_plan_has(run: Run, option: str, value: str) -> None:
    fails(run("plan", "b", "--name", "x", "--m", 2, f"{option}={value}"), f"argument {option}: expected", status=2)
    fails(run("--model", "sdxl", f"{option}={value}", main=export_main), f"argument {option}: expected", status=2)


def test_the_parsers_and_the_methods_have_one_bound_of_steps() -> None:
    most = str(MOST_STEPS)
    args = tgate_parser().parse_args(["plan", "b", "--name", "x", "--m", most, "--steps", most, "--k", most])
    made = Settings(steps=args.steps, gate=args.m, self_interval=args.k, warm_up=MOST_STEPS)
    assert made.steps == MOST_STEPS
    for name in ("steps", "self_interval", "warm_up", "fidelity_interval", "cache_interval"):
        with pytest.raises(MethodError, match=f"{MOST_STEPS}, got {MOST_STEPS + 1}"):
            replace(made, **{name: MOST_STEPS + 1})


def test_a_side_of_a_picture_is_no_kilometre(run: Run) -> None:
    for option, value in (("--size", "999999x8"), ("--height", "999999"), ("--frames", "999999")):
        fails(run("--model", "sdxl", f"{option}={value}", main=export_main), f"argument {option}: exp", status=2)


@pytest.mark.parametrize("option", ["--outpu=x.png", "--num-image=3", "--see=1"])
def test_options_are_not_abbreviated(run: Run, option: str) -> None:
    full = "--seed" if option == "--see=1" else option.partition("=")[0] + ("t" if "outpu" in option else "s")
    fails(run("generate", "b", "p", "--output", "x.png", option), f"did you mean {full}?", status=2)


def test_the_statuses_are_told(run: Run) -> None:
    for main in (tgate_main, export_main):
        told = " ".join(run("--help", main=main)[1].split())
        assert "0 done; 1 the work failed; 2 the command line is wrong; 70 a fault" in told
        assert "130 interrupted; 143 terminated" in told


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize("make", [tgate_parser, export_parser])
def test_a_shell_completes_every_command_and_option(shell: str, make: Callable[[], argparse.ArgumentParser]) -> None:
    shtab = pytest.importorskip("shtab")
    parser = make()
    script = shtab.complete(parser, shell=shell)
    commands = next((a.choices for a in parser._actions if isinstance(a, argparse._SubParsersAction)), {})
    names = [*commands, *(o for p in (parser, *commands.values()) for a in p._actions for o in a.option_strings)]
    assert {"--help", "--json" if commands else "--model"} <= set(names)
    missing = [name for name in names if (name if shell != "fish" else name.lstrip("-")) not in script]
    assert missing == []


def test_bash_completes(tmp_path: Path) -> None:
    shtab = pytest.importorskip("shtab")
    (tmp_path / "tgate").write_text(shtab.complete(tgate_parser(), shell="bash"))
    typed = "COMP_WORDS=(tgate generate --neg); COMP_CWORD=2"
    ask = f"source {tmp_path}/tgate; {typed}; _shtab_tgate; echo ${{COMPREPLY[@]}}"
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True, timeout=30)
    assert done.stdout.split() == ["--negative-prompt"]
