"""A command line that is wrong: one line, and exit status 2."""

from __future__ import annotations

import pytest

import tgate_engine
from tests.cli.running import Run, fails
from tgate_cli.main import export_main


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"tgate {tgate_engine.__version__}\n", "")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["paint"],
        ["generate"],
        ["generate", "b", "p"],
        ["generate", "b", "p", "--output", "x.png", "--seed", "seven"],
        ["generate", "b", "p", "--output", "x.png", "--num-images", "0"],
        ["generate", "b", "p", "--output", "x.png", "--threads", "-1"],
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
        ["--model", "mini-sdxl", "--dtype", "int4"],
        ["--model", "mini-sdxl", "--what"],
    ],
)
def test_an_export_command_line_that_is_wrong(run: Run, arguments: list[str]) -> None:
    fails(run(*arguments, main=export_main), "(see tgate-export --help)", status=2)
