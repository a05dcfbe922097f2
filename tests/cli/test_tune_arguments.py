"""The options of ``tgate tune``: what a budget is, and which options go together."""

from __future__ import annotations

import argparse

import pytest

from tests.cli.running import Run, fails
from tgate_cli.arguments import tgate_parser
from tgate_cli.tune_arguments import METRICS, budget, check_tune, speedup
from tgate_engine.plan_report import DIFFERENCES, NEARNESS


def parsed(*words: str) -> argparse.Namespace:
    args = tgate_parser().parse_args(["tune", "b", *words])
    check_tune(args)
    return args


def test_metrics_are_those_that_a_report_may_have() -> None:
    assert (*NEARNESS, *DIFFERENCES) == METRICS


@pytest.mark.parametrize(
    ("text", "meant"),
    [("psnr=30", ("psnr", 30.0)), ("ssim=1", ("ssim", 1.0)), ("accuracy=-0.5", ("accuracy", -0.5))],
)
def test_a_budget_is_a_metric_and_a_number(text: str, meant: tuple[str, float]) -> None:
    assert budget(text) == meant


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("accuracy=1", "expected accuracy below 0, the points that may be lost, and above -100, got '1'"),
        ("accuracy=0", "expected accuracy below 0"),
        ("clip=-100", "and above -100, got '-100'"),
        ("lpips=0.1", "expected lpips below 0, minus the distance that may be, and above -100"),
        ("reward=0", "expected reward below 0, what the score may lose, and above -100, got '0'"),
        ("ssim=95", "expected ssim above 0 and at most 1"),
        ("psnr=nan", "expected a finite number"),
        ("fid=0.1", "expected psnr=NUMBER"),
    ],
)
def test_a_budget_that_is_none(text: str, says: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match=says):
        budget(text)


def test_a_speed_is_more_than_that_of_the_ungated_plan() -> None:
    assert speedup("1.5") == 1.5
    with pytest.raises(argparse.ArgumentTypeError, match="expected a number above 1"):
        speedup("0.9")


def test_the_metric_is_the_budgets_or_the_one_that_is_named() -> None:
    assert parsed("--budget", "ssim=0.9").metric == "ssim"
    assert parsed("--speedup", "2").metric == "psnr"
    assert parsed("--speedup", "2", "--metric", "accuracy").metric == "accuracy"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--budget", "psnr=30", "--metric", "ssim"), "--budget psnr=… names its metric; leave out --metric"),
        (("--speedup", "2", "--metric", "beauty"), "expected one of psnr, ssim, lpips, accuracy, clip, reward"),
        (("--speedup", "2", "--metric", "clip"), "clip needs a CLIP model of yours: --clip-model DIR"),
        (("--speedup", "2", "--clip-model", "d"), "--clip-model is for clip, and psnr is asked for"),
        (("--speedup", "2", "--metric", "lpips"), "lpips needs the weights of an AlexNet: --lpips-model FILE"),
        (("--budget", "psnr=30", "--lpips-model", "f"), "--lpips-model is for lpips, and psnr is asked for"),
        (("--speedup", "2", "--metric", "reward"), "reward needs the files of ImageReward: --reward-model DIR"),
        (("--budget", "psnr=30", "--reward-model", "d"), "--reward-model is for reward, and psnr is asked for"),
        (("--speedup", "2", "--floor-engine", "ort-cpu"), "is to be another engine, and ort-cpu draws already"),
        (("--speedup", "2", "--html", "a.md"), "a page's name ends in .html, got 'a.md'"),
        (("--speedup", "2", "--markdown", "-"), "a report's name ends in .md, got '-'"),
        (("--speedup", "2", "--html", "a.html", "--state", "a.html"), "give them files that differ"),
    ],
)
def test_options_that_do_not_go_together(run: Run, words: tuple[str, ...], says: str) -> None:
    fails(run("tune", "b", *words), says, status=2)
