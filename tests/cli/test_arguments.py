"""A command line that is wrong: one line, and exit status 2."""

from __future__ import annotations

from pathlib import Path

import pytest

import tgate_engine
from tests.cli.running import Run, fails
from tgate_cli.arguments import export_parser, tgate_parser
from tgate_cli.main import export_main


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"tgate {tgate_engine.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
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
    fails(run(*arguments, main=export_main), "(see tgate-export --help)", status=2)


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
