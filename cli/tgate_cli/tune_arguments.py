"""The options of ``tgate tune`` that are its own, and which of them go together."""

from __future__ import annotations

import argparse
from pathlib import Path

from tgate_cli.values import MOST, html_file, markdown_file, number, whole
from tgate_engine.errors import shown

LEAST_IMAGES = 4
"""Of a plan that is tuned: fewer tell nothing of how surely a mean is known."""
MOST_QUALITY = {"psnr": 58.9, "ssim": 1.0}
"""What equal pictures have, by the name of a budget; as in tgate_runtime.tuning, which is not imported for it."""
MOST_LOSS = 100.0
"""Points that a judge's verdict can lose, and more than any other value can."""
LOSSES = {
    "lpips": "minus the distance that may be",
    "accuracy": "the points that may be lost",
    "clip": "the points that may be lost",
    "reward": "what the score may lose",
}
"""What the number of other budgets is, which is below 0."""
METRICS = (*MOST_QUALITY, *LOSSES)


def add_tune(parser: argparse.ArgumentParser) -> None:
    """Add what is asked for, what it is measured on, and where it is told."""
    goal = parser.add_mutually_exclusive_group(required=True)
    fastest = (
        "the fastest plan whose pictures are so near the ungated ones, psnr=30 (dB) or ssim=0.95, or so little worse "
        "by a judge, accuracy=-1 or clip=-0.3 (points), lpips=-0.1 (LPIPS' distance) or reward=-0.05 (ImageReward's)"
    )
    goal.add_argument("--budget", type=budget, metavar="NAME=NUMBER", help=fastest)
    best = "the plan whose pictures are best, of those that take a picture so many times as fast as ungated"
    goal.add_argument("--speedup", type=speedup, metavar="X", help=best)
    which = "what --speedup goes by: psnr, if left out, ssim, accuracy, clip, lpips or reward"
    parser.add_argument("--metric", choices=METRICS, metavar="NAME", help=which)
    judge = "a CLIP model in a directory, as transformers saves it, for clip; needs [clip]"
    parser.add_argument("--clip-model", type=Path, metavar="DIR", help=judge)
    trunk = "the weights of AlexNet as torchvision has them, .pth or .safetensors, for lpips; needs [lpips]"
    parser.add_argument("--lpips-model", type=Path, metavar="FILE", help=trunk)
    people = "ImageReward.pt, med_config.json and BERT's vocab.txt in a directory, for reward; needs [reward]"
    parser.add_argument("--reward-model", type=Path, metavar="DIR", help=people)
    yours = "yours, one a line, as for tgate generate; an embedded model has its own if left out"
    parser.add_argument("--prompts", type=Path, metavar="FILE", help=yours)
    several = "of each plan in the end; if left out 32, and for accuracy as many as can tell"
    parser.add_argument("--images", type=_images, metavar="N", help=several)
    going_on = "keep what is measured in this file, and go on with what it holds"
    parser.add_argument("--state", type=Path, metavar="FILE", help=going_on)
    floor = "draw the ungated pictures on that engine too, and say how far they are from these"
    parser.add_argument("--floor-engine", metavar="NAME", help=floor)
    page = "tell it on a page of one file, with pictures; needs [tune]"
    parser.add_argument("--html", type=html_file, metavar="FILE.html", help=page)
    parser.add_argument(
        "--markdown", type=markdown_file, metavar="FILE.md", help="tell it in Markdown, for a pull request"
    )


def check_tune(args: argparse.Namespace) -> None:
    """Ends as a wrong command line does where options do not go together. ``metric`` then is the one that is meant."""
    error = args.parser.error
    if args.budget is not None and args.metric is not None:
        error(f"--budget {args.budget[0]}=… names its metric; leave out --metric")
    args.metric = args.budget[0] if args.budget is not None else args.metric or "psnr"
    if args.metric == "clip" and args.clip_model is None:
        error("clip needs a CLIP model of yours: --clip-model DIR")
    if args.metric != "clip" and args.clip_model is not None:
        error(f"--clip-model is for clip, and {args.metric} is asked for; leave it out")
    if args.metric == "lpips" and args.lpips_model is None:
        error("lpips needs the weights of an AlexNet: --lpips-model FILE")
    if args.metric != "lpips" and args.lpips_model is not None:
        error(f"--lpips-model is for lpips, and {args.metric} is asked for; leave it out")
    if args.metric == "reward" and args.reward_model is None:
        error("reward needs the files of ImageReward: --reward-model DIR")
    if args.metric != "reward" and args.reward_model is not None:
        error(f"--reward-model is for reward, and {args.metric} is asked for; leave it out")
    if args.floor_engine == args.engine:
        error(f"--floor-engine is to be another engine, and {args.engine} draws already; leave it out")
    written = [path for path in (args.state, args.html, args.markdown) if path is not None]
    if len(set(written)) < len(written):
        error("--state, --html and --markdown are written each; give them files that differ")


def budget(text: str) -> tuple[str, float]:
    """(metric, least) of ``psnr=30`` or ``accuracy=-1``."""
    metric, equals, least = text.partition("=")
    if not equals or metric not in METRICS:
        raise argparse.ArgumentTypeError(
            f"expected psnr=NUMBER, in dB, ssim=NUMBER, up to 1, accuracy=-NUMBER or clip=-NUMBER, in points, "
            f"lpips=-NUMBER or reward=-NUMBER, got '{shown(text, 40)}'"
        )
    quality = number(least)
    if metric in LOSSES and not -MOST_LOSS < quality < 0:
        raise argparse.ArgumentTypeError(
            f"expected {metric} below 0, {LOSSES[metric]}, and above {-MOST_LOSS:g}, got '{shown(least, 40)}'"
        )
    if metric in MOST_QUALITY and not 0 < quality <= MOST_QUALITY[metric]:
        most = MOST_QUALITY[metric]
        raise argparse.ArgumentTypeError(f"expected {metric} above 0 and at most {most:g}, got '{shown(least, 40)}'")
    return metric, quality


def speedup(text: str) -> float:
    """How many times as fast as ungated."""
    factor = number(text)
    if not 1 < factor <= MOST:
        raise argparse.ArgumentTypeError(f"expected a number above 1, times as fast, got '{shown(text, 40)}'")
    return factor


def _images(text: str) -> int:
    return whole(text, LEAST_IMAGES, MOST)
