"""``tgate tune``: the plan to take, by what it costs in pictures and in time here, stored with its report."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tgate_cli import views
from tgate_cli.command import ADVICE, Show, asked_engine, bundle_asked, engine_advice, needs, print_json
from tgate_cli.generate import prompts_of
from tgate_cli.tune_data import PAIRS, data_of
from tgate_cli.values import MOST
from tgate_engine.atomic import check_place, write_atomically
from tgate_engine.bundle import DEFAULT, Bundle
from tgate_engine.errors import EngineError, PlanError, RequestError
from tgate_engine.manifest import MANIFEST_FILE
from tgate_engine.plan_report import save_report
from tgate_engine.report import Reporter

if TYPE_CHECKING:
    from tgate_runtime.engines.protocol import Engine
    from tgate_runtime.tuning.quality import Metric

IMAGES = 32
"""Of each plan, where the command line says nothing and a few tell something."""
IMAGES_JUDGED = 128
"""The same where plans are ranked by a share of pictures that are right."""


def tune(args: argparse.Namespace, report: Reporter) -> Show:
    """``tgate tune``."""
    bundle = bundle_asked(args)
    manifest = bundle.manifest
    with needs("tuning", engine_advice(args)):
        from tgate_runtime.session import graphs_of
        from tgate_runtime.tuning.measure import check_drawable
        from tgate_runtime.tuning.run import Asked, begin
        from tgate_runtime.tuning.run import tune as choose
    from tgate_export.candidates import candidates

    _check_name(args, bundle)
    _check_files(args)
    check_drawable(manifest)
    prompts = _prompts(args, bundle)
    shape = manifest.shapes_of(args.size)[0]
    metric = _metric(args, bundle, shape.size, prompts)
    asked = Asked(
        metric=metric,
        least=None if args.budget is None else args.budget[1],
        speedup=args.speedup,
        prompts=prompts,
        images=_images(args),
        seed=args.seed,
        size=shape.size,
        pairs=0 if args.html is None else PAIRS,
    )
    # The default plan says of which method further plans are, and stopping guidance is none.
    choices = candidates(bundle, steps=args.steps, others=args.name != DEFAULT)
    graphs_of(bundle, [choices.ungated], [shape.size])
    if args.prompts is not None and len(prompts) > asked.images:
        report.note(f"of {len(prompts)} prompts the first {asked.images} are drawn; --images {len(prompts)} takes all")
    report.stage(f"loading {args.engine}")
    engine = asked_engine(args)
    floor_engine = None if args.floor_engine is None else _floor_engine(args)
    kept = begin(args.state, bundle, choices.ungated, asked, engine)
    report.stage(f"opening {args.bundle}")
    bundle = bundle.checked()
    tuned = choose(
        bundle,
        ungated=choices.ungated,
        plans=choices.plans,
        start=choices.start,
        near=choices.near,
        kind=choices.kind,
        asked=asked,
        engine=engine,
        kept=kept,
        report=report,
        floor_engine=floor_engine,
    )
    plans = choices.named(bundle, tuned.chosen, args.name)
    data = data_of(args, bundle, tuned, choices)
    told = _told(args, data, tuned.pairs)
    bundle.save_plans(plans, force=args.force)
    written = save_report(bundle, tuned.report)
    for path, text in told.items():
        write_atomically(path, text.encode())
    first = {"bundle": args.bundle, "plan": args.name, "added": [name for name in plans if name != args.name]}
    data = {**first, "report_file": written, **data}
    return lambda: print_json(data) if args.json else views.tuning(data)


def _floor_engine(args: argparse.Namespace) -> Engine:
    """The other engine, in float32 where it may choose: what is told of it is then the engine's and no precision's."""
    from tgate_runtime.engines import open_engine

    try:
        return open_engine(args.floor_engine, threads=args.threads, precision="f32")
    except EngineError:
        return open_engine(args.floor_engine, threads=args.threads)


def _told(args: argparse.Namespace, data: dict[str, Any], pairs: Sequence[Any]) -> dict[Path, str]:
    """What is written for people to look at, by the file it goes into."""
    from tgate_cli.tune_markdown import markdown

    told: dict[Path, str] = {}
    if args.html is not None:
        from tgate_cli.tune_page import page

        told[args.html] = page(data, pairs)
    if args.markdown is not None:
        told[args.markdown] = markdown(data)
    return told


def _metric(args: argparse.Namespace, bundle: Bundle, size: str, prompts: Sequence[str]) -> Metric:
    """What the command line names, ready to compare; a library that it needs is there."""
    from tgate_runtime.tuning.quality import nearness

    if args.metric == "accuracy":
        from tgate_runtime.tuning.accuracy import accuracy

        return accuracy(bundle.manifest, size, prompts)
    if args.metric == "clip":
        from tgate_runtime.tuning.clip import clip

        with needs("clip", ADVICE.format("clip")):
            return clip(args.clip_model)
    if args.metric == "lpips":
        from tgate_runtime.tuning.lpips import lpips

        with needs("lpips", ADVICE.format("lpips")):
            return lpips(args.lpips_model)
    if args.metric == "reward":
        from tgate_runtime.tuning.reward import reward

        with needs("reward", ADVICE.format("reward")):
            return reward(args.reward_model)
    if args.metric == "ssim":
        with needs("ssim", ADVICE.format("tune")):
            import skimage.metrics  # noqa: F401
    return nearness(args.metric, frames=bundle.manifest.frames)


def _images(args: argparse.Namespace) -> int:
    """How many are drawn of each plan. Raises :class:`RequestError` for fewer than a budget in points can be met by."""
    from tgate_runtime.tuning.accuracy import least_images

    if args.metric != "accuracy":
        return int(args.images or IMAGES)
    if args.budget is None:
        return int(args.images or IMAGES_JUDGED)
    least = least_images(args.budget[1])
    if least > MOST:
        raise RequestError(
            f"accuracy={args.budget[1]:g} takes at least {least} pictures, and at most {MOST} are drawn; allow a "
            "larger loss"
        )
    if args.images is not None and args.images < least:
        raise RequestError(
            f"accuracy={args.budget[1]:g} takes at least {least} pictures, got --images {args.images}: where none of "
            "fewer is worse, more than that may still be; give more, or allow a larger loss"
        )
    return int(args.images or max(least, IMAGES))


def _check_name(args: argparse.Namespace, bundle: Bundle) -> None:
    """Before hours of work: the plan's name can be written. Raises as ``tgate plan`` does."""
    users = [label for label, plan in bundle.manifest.plans.items() if args.name in plan.baselines]
    if users:
        raise PlanError(f"plan {args.name!r} is what {', '.join(users)} is measured against; use another --name")
    if not args.force:
        bundle.check_free([args.name])


def _check_files(args: argparse.Namespace) -> None:
    """The same of the files for people, and that there is what writes them."""
    for option, path in (("--html", args.html), ("--markdown", args.markdown)):
        if path is None:
            continue
        check_place(path, RequestError)
        if any((folder / MANIFEST_FILE).exists() for folder in path.resolve().parents):
            raise RequestError(f"{path} lies in a bundle, whose files are its own; name another place")
        for other in (args.prompts, args.state, args.clip_model, args.lpips_model, args.reward_model):
            if other is not None and other.exists() and path.exists() and other.samefile(path):
                raise RequestError(f"{option} {path} is a file that is read or kept too; choose another")
        if os.path.lexists(path) and not args.force:
            raise RequestError(f"{path} exists already; choose another {option}, or --force to replace it")
    if args.html is not None:
        with needs("--html", ADVICE.format("tune")):
            import jinja2  # noqa: F401


def _prompts(args: argparse.Namespace, bundle: Bundle) -> Sequence[str]:
    """Those of --prompts, or for an embedded model captions of the kind that it knows."""
    from tgate_runtime.mini import MODELS, is_embedded

    if args.prompts is not None:
        return prompts_of(args.prompts)
    if is_embedded(bundle.manifest.model):
        return prompts_of(MODELS / "prompts.txt")
    raise RequestError(
        "what a plan costs depends on what is drawn: name a file of your prompts, one a line, with --prompts FILE"
    )
