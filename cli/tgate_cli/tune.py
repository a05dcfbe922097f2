"""``tgate tune``: the plan to take, by what it costs in pictures and in time here, stored with its report."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from tgate_cli import views
from tgate_cli.command import ADVICE, Show, asked_engine, bundle_asked, engine_advice, needs, print_json
from tgate_cli.generate import prompts_of
from tgate_engine.bundle import DEFAULT, Bundle
from tgate_engine.errors import PlanError, RequestError
from tgate_engine.plan_report import save_report
from tgate_engine.report import Reporter


def tune(args: argparse.Namespace, report: Reporter) -> Show:
    """``tgate tune``."""
    bundle = bundle_asked(args)
    manifest = bundle.manifest
    with needs("tuning", engine_advice(args)):
        from tgate_runtime.session import graphs_of
        from tgate_runtime.tuning.measure import check_drawable
        from tgate_runtime.tuning.run import Asked, begin
        from tgate_runtime.tuning.run import tune as choose
    metric, least = args.budget or ("psnr", None)
    if metric == "ssim":
        with needs("ssim", ADVICE.format("tune")):
            import skimage.metrics  # noqa: F401
    from tgate_export.candidates import candidates

    _check_name(args, bundle)
    check_drawable(manifest)
    prompts = _prompts(args, bundle)
    shape = manifest.shapes_of(args.size)[0]
    asked = Asked(
        metric=metric,
        least=least,
        speedup=args.speedup,
        prompts=prompts,
        images=args.images,
        seed=args.seed,
        size=shape.size,
    )
    # The default plan says of which method further plans are, and stopping guidance is none.
    choices = candidates(bundle, steps=args.steps, stopped=args.name != DEFAULT)
    graphs_of(bundle, [choices.ungated], [shape.size])
    if len(prompts) > args.images:
        report.note(f"of {len(prompts)} prompts the first {args.images} are drawn; --images {len(prompts)} takes all")
    report.stage(f"loading {args.engine}")
    engine = asked_engine(args)
    kept = begin(args.state, bundle, choices.ungated, asked, engine)
    report.stage(f"opening {args.bundle}")
    bundle = bundle.checked()
    tuned = choose(
        bundle,
        ungated=choices.ungated,
        plans=choices.plans,
        start=choices.start,
        near=choices.near,
        asked=asked,
        engine=engine,
        kept=kept,
        report=report,
    )
    plans = choices.named(bundle, tuned.chosen, args.name)
    bundle.save_plans(plans, force=args.force)
    written = save_report(bundle, tuned.report)
    data = {"bundle": args.bundle, "plan": args.name, "added": [name for name in plans if name != args.name]}
    data |= {"report_file": written, **_data(tuned, choices)}
    return lambda: print_json(data) if args.json else views.tuning(data)


def _data(tuned: Any, choices: Any) -> dict[str, Any]:
    """What was found, as JSON values."""
    return {
        "chosen": tuned.chosen,
        "plans": len(choices.plans),
        "tried": tuned.tried,
        "front": [
            {
                "plan": point.name,
                "settings": dict(choices.plans[point.name].settings),
                "predicted_ms": point.ms,
                "faster": tuned.ungated_ms / point.ms,
                "quality": {"mean": point.mean, "low": point.bounds[0], "high": point.bounds[1]},
            }
            for point in tuned.front
        ],
        "ungated_ms": tuned.ungated_ms,
        "prediction_error": {"plan": tuned.prediction_error, "ungated": tuned.ungated_error},
        "report": tuned.report.to_json(),
    }


def _check_name(args: argparse.Namespace, bundle: Bundle) -> None:
    """Before hours of work: the plan's name can be written. Raises as ``tgate plan`` does."""
    users = [label for label, plan in bundle.manifest.plans.items() if args.name in plan.baselines]
    if users:
        raise PlanError(f"plan {args.name!r} is what {', '.join(users)} is measured against; use another --name")
    if not args.force:
        bundle.check_free([args.name])


def _prompts(args: argparse.Namespace, bundle: Bundle) -> Sequence[str]:
    """Those of --prompts, or for an embedded model captions of the kind that it knows."""
    from tgate_runtime.mini import MODELS

    if args.prompts is not None:
        return prompts_of(args.prompts)
    if bundle.manifest.model in [path.name for path in MODELS.iterdir() if path.is_dir()]:
        return prompts_of(MODELS / "prompts.txt")
    raise RequestError(
        "what a plan costs depends on what is drawn: name a file of your prompts, one a line, with --prompts FILE"
    )
