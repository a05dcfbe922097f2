"""What is typed by another program's name, and what is typed wrong."""

from __future__ import annotations

import re

import pytest

from tests.cli.running import Run, fails
from tgate_cli.arguments import export_parser, tgate_parser
from tgate_cli.hints import _AT_EXPORT, _AT_RUN_TIME, _OF_A_PLAN, hint
from tgate_cli.main import export_main


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--m", "5"], "`tgate plan BUNDLE --name NAME --m M`, then --plan NAME"),
        (["--num-inference-steps", "20"], "--m M --steps N`, then --plan NAME"),
        (["--num_inference_steps=20"], "--m M --steps N`, then --plan NAME"),
        (["--height", "512", "--width", "512"], "--size WIDTHxHEIGHT takes one"),
        (["--num-images-per-prompt", "2"], "--num-images N"),
        (["--num_images", "2"], "did you mean --num-images?"),
        (["--negativ-prompt", "x"], "did you mean --negative-prompt?"),
        (["--scheduler", "x", "--latents", "y"], "--initial-latents X.npy"),
    ],
)
def test_what_to_type_for_a_picture(run: Run, arguments: list[str], says: str) -> None:
    result = run("generate", "b", "p", "--output", "x.png", *arguments)
    fails(result, "unrecognized arguments: ", says, status=2)
    assert result[2].count("--size WIDTHxHEIGHT takes one") <= 1


@pytest.mark.parametrize(
    ("option", "says"),
    [("--num-inference-steps", "--steps N"), ("--seed", "tgate generate --seed"), ("--outptu", "mean --output?")],
)
def test_what_to_type_for_an_export(run: Run, option: str, says: str) -> None:
    fails(run("--model", "sdxl", option, "5", main=export_main), says, status=2)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "b", "p", "--cfg", "5"], "--cfg 5; --guidance-scale G"),
        (["generate", "b", "p", "--hei", "512"], "--size WIDTHxHEIGHT takes one"),
        (["generate", "b", "p", "--num_inference_steps", "9"], "`tgate plan BUNDLE --name NAME --m M --steps N`"),
        (["bench", "b", "--num_inf", "9"], "`tgate plan BUNDLE --name NAME --m M --steps N`"),
        (
            ["plan", "b", "--name", "x", "--m", "2", "--num_inference_steps", "9"],
            "--num_inference_steps 9; --steps N (",
        ),
        (["plan", "b", "--name", "x", "--m", "2", "--cfg", "9"], "--cfg 9; --guidance-scale G ("),
        (["tune", "b", "--speedup", "2", "--num_inference_steps", "9"], "--num_inference_steps 9; --steps N ("),
        (["tune", "b", "--speedup", "2", "--num-images", "9"], "--num-images 9; --images N ("),
        (["generete", "b", "p"], "got 'generete'; did you mean generate? (see tgate --help)"),
        (["gen", "b", "p"], "did you mean generate?"),
        (["export", "--model", "sdxl"], "tgate-export is a program of its own"),
        (["zzz"], "tune, got 'zzz' (see tgate --help)"),
        (["build", "b", "--precision", "f23"], "expected one of f32, bf16, f16, got 'f23' (see"),
        (["build", "b", "--memory", "shard"], "expected one of shared, fast, got 'shard'; did you mean shared?"),
    ],
)
def test_what_is_cut_short_or_spelled_wrong(run: Run, arguments: list[str], says: str) -> None:
    fails(run(*arguments), says, status=2)


@pytest.mark.parametrize(
    ("option", "says"), [("--cfg", "--guidance-scale G"), ("--hei", "mean --height?"), ("--num-inf", "--steps N")]
)
def test_what_is_cut_short_for_an_export(run: Run, option: str, says: str) -> None:
    fails(run("--model", "sdxl", option, "5", main=export_main), f"{option} 5; ", says, status=2)


def test_nothing_is_said_of_what_is_like_nothing() -> None:
    assert hint(["--zzz", "5"], known=["--output"], command="build") == ""
    assert hint(["-q", "--q"], known=["--quiet"], command="build") == ""
    assert hint(["stray"], known=["--output"], command="build") == ""


def test_the_program_alone_shows_its_help(run: Run) -> None:
    status, out, err = run()
    assert (status, out) == (2, "")
    assert err.startswith("usage: tgate ")
    assert "    generate " in err
    assert err.splitlines()[-1] == "tgate: error: the following arguments are required: COMMAND (see tgate --help)"
    fails(run(main=export_main), "the following arguments are required: --model", status=2)


def test_a_model_that_several_begin_with(run: Run) -> None:
    """``mini`` is none of them, but the bundle that ships."""
    says = ("unknown model 'mini'; did you mean 'mini-sdxl' or 'mini-pixart'?", "; mini is the bundle that ships")
    fails(run("--model", "mini", main=export_main), *says)
    fails(run("--model", "pixart", main=export_main), "did you mean 'pixart-alpha' or 'pixart-sigma'?")


def test_hints_name_options_that_are_there_and_stand_for_those_that_are_not() -> None:
    """The parsers are asked, so that a hint goes stale with the option that it names."""
    commands = next(a.choices for a in tgate_parser()._actions if isinstance(a.choices, dict))
    options = {name: {o for a in parser._actions for o in a.option_strings} for name, parser in commands.items()}
    options["tgate-export"] = {o for a in export_parser()._actions for o in a.option_strings}
    everywhere = set().union(*options.values())
    for table, own in (
        (_AT_RUN_TIME, options["generate"]),
        (_AT_EXPORT, options["tgate-export"]),
        (_OF_A_PLAN, options["plan"]),
    ):
        assert not table.keys() & own
        for text in table.values():
            assert set(re.findall(r"--[a-z][a-z-]+", text)) <= everywhere
            for command in re.findall(r"`(tgate[ -][a-z]+)[^`]*`", text):
                assert command.removeprefix("tgate ") in options
