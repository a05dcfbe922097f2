"""The whole of it: graphs timed, plans searched, the one that is taken timed for real, and its report."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tgate_engine
from tgate_engine.bundle import Bundle
from tgate_engine.errors import RequestError
from tgate_engine.manifest_json import bundle_digest
from tgate_engine.plan import Plan
from tgate_engine.plan_report import DIFFERENCES, Estimate, PlanReport, files_of, program_digest
from tgate_engine.report import Reporter
from tgate_runtime.benchmark import cpu_model
from tgate_runtime.engines.protocol import Engine
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.tuning.kept import Kept
from tgate_runtime.tuning.measure import Judge, Pair, Times, measure_graphs, measure_plan
from tgate_runtime.tuning.quality import Metric, interval
from tgate_runtime.tuning.search import Goal, Point, front, guided, search

REPEATS = 5
DISTURBED = 0.15
"""How far a predicted time may be from the measured one before a warning says so."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """``metric``: what the plans' pictures are worth by. Either ``least``, the quality that the plan must be known to
    have, or ``speedup``, how many times as fast as ungated a picture must be. ``images``: pictures of each plan that
    comes to the end; picture i is of prompt i, counted round, from seed ``seed`` + i. ``pairs``: of how many of them
    the result holds the pictures."""

    metric: Metric
    least: float | None = None
    speedup: float | None = None
    prompts: Sequence[str]
    images: int
    seed: int
    size: str
    pairs: int = 0


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """``chosen``: the plan's label; ``point``: what was found of it. ``front``: Pareto's, of the ``tried`` plans that
    were drawn on all pictures, the fastest first. ``times``: what its times were predicted from, and ``ungated_ms``.
    ``prediction_error``: of the chosen plan's time, over what was measured, less 1; ``ungated_error``: of the ungated
    one's. ``pairs``: the chosen plan's pictures beside the ungated ones, the worst first."""

    chosen: str
    point: Point
    front: Sequence[Point]
    times: Times
    pairs: Sequence[Pair]
    tried: int
    ungated_ms: float
    prediction_error: float
    ungated_error: float
    report: PlanReport


def begin(path: Path | None, bundle: Bundle, ungated: Plan, asked: Asked, engine: Engine) -> Kept:
    """What is known of such measurements, from a file if there is one; see :class:`Kept`."""
    options = engine.options
    return Kept(
        path,
        {
            "bundle": bundle_digest(bundle.manifest),
            "engine": f"{engine.name} {engine.version}",
            "precision": options.precision or "",
            "memory": options.memory or "",
            "threads": options.threads or 0,
            "machine": cpu_model(),
            "ungated plan": program_digest(ungated),
            "size": asked.size,
            "seed": asked.seed,
            "prompts": _digest(asked.prompts),
        },
    )


def tune(
    bundle: Bundle,
    *,
    ungated: Plan,
    plans: Mapping[str, Plan],
    start: Collection[str],
    near: Callable[[str], Iterable[str]],
    kind: Callable[[str], Hashable] = lambda name: None,
    asked: Asked,
    engine: Engine,
    kept: Kept,
    report: Reporter,
    floor_engine: Engine | None = None,
) -> Tuned:
    """Choose one of ``plans`` by what it costs against ``ungated``; see :mod:`tgate_runtime.tuning.search`.

    ``kept``: of :func:`begin`. ``floor_engine``: another one, whose ungated pictures are compared as well. Raises
    :class:`RequestError` where no plan will do, with the best that was found.
    """
    size, metric = asked.size, asked.metric
    timed: dict[str, Any] = {"engine": engine, "size": size, "repeats": REPEATS, "on_run": report.progress}
    report.stage("timing the graphs")
    cover = [ungated, *plans.values()]
    times = Times(**kept.fact("times", lambda: measure_graphs(bundle, cover, **timed).to_json()))
    predicted = {name: times.of(plan) for name, plan in plans.items()}
    ungated_ms = times.of(ungated)
    goal = _goal(asked, ungated_ms, predicted)
    allowed = [name for name in predicted if goal.allows(predicted[name])]
    begins = [name for name in allowed if name in start] or allowed
    report.stage(f"drawing with {len(plans)} plans to choose from")
    with Pipeline.open(bundle, engine=engine, plans=[ungated, *plans.values()], sizes=[size]) as pipe:
        judge = Judge(pipe, ungated, asked.prompts, metric=metric, seed=asked.seed, size=size, kept=kept)

        def tell(done: int, total: int, name: str) -> None:
            each_s = judge.drawn_s / judge.drawn if judge.drawn else 0.0
            report.progress(done, total, f"{name}, about {_duration((total - done) * each_s)} left")

        def measure(name: str, count: int, told: str = "") -> Sequence[float]:
            return judge.scores(plans[name], count, told)

        def nearness(name: str, count: int) -> Sequence[float]:
            return measure(name, count, "psnr")

        options: dict[str, Any] = {"images": asked.images, "start": begins, "near": near, "on_picture": tell}
        if metric.judge:
            points = guided(predicted, nearness, measure, goal, kind=kind, **options)
        else:
            points = search(predicted, measure, goal, **options)
        best = goal.chosen(points)
        if best is None:
            raise RequestError(_unmet(asked, points))
        report.stage("drawing the same prompts from other seeds")
        unrelated = judge.unrelated(asked.images)
        elsewhere: dict[str, Estimate] = {}
        if floor_engine is not None:
            report.stage(f"drawing the same pictures on {floor_engine.name}")
            with Pipeline.open(bundle, engine=floor_engine, plans=[ungated], sizes=[size]) as other:
                told = " ".join(filter(None, (floor_engine.name, floor_engine.version, floor_engine.options.precision)))
                elsewhere[told] = _estimate(judge.elsewhere(other, asked.images))
        plan = plans[best.name]
        beside = {name: _estimate(judge.scores(plan, asked.images, name)) for name in metric.beside}
        if metric.together is not None:
            report.stage(f"looking at the pictures of {best.name} as a whole")
            beside |= judge.together(plan, asked.images)
        pairs = judge.worst(plan, best.values, asked.pairs)
    if metric.name not in DIFFERENCES and best.bounds[0] <= interval(unrelated)[1]:
        report.warn(f"pictures of {best.name} are not surely nearer to the ungated ones than those of other seeds are")
    report.stage(f"timing {best.name} and ungated, in turns")
    measured = kept.fact(f"ms {program_digest(plan)}", lambda: measure_plan(bundle, plan, ungated, **timed))
    errors = best.ms / measured["plan"] - 1, ungated_ms / measured["ungated"] - 1
    if max(map(abs, errors)) > DISTURBED:
        report.warn("times that were predicted and measured differ: the machine had other work; they tell little")
    return Tuned(
        chosen=best.name,
        point=best,
        front=front(points),
        times=times,
        pairs=pairs,
        tried=len(points),
        ungated_ms=ungated_ms,
        prediction_error=errors[0],
        ungated_error=errors[1],
        report=replace(
            _report(bundle, plan, ungated, asked, engine, best, unrelated, measured),
            beside=beside,
            elsewhere=elsewhere,
        ),
    )


def _goal(asked: Asked, ungated_ms: float, predicted: Mapping[str, float]) -> Goal:
    if asked.speedup is None:
        return Goal(least=asked.least)
    most_ms = ungated_ms / asked.speedup
    fastest = min(predicted, key=lambda name: predicted[name])
    if predicted[fastest] > most_ms:
        raise RequestError(
            f"no plan over the bundle's graphs is {asked.speedup:g} times as fast as ungated here: the fastest, "
            f"{fastest}, is {ungated_ms / predicted[fastest]:.2f} times by prediction; ask for less"
        )
    return Goal(most_ms=most_ms)


def _unmet(asked: Asked, points: Sequence[Point]) -> str:
    best, metric = max(points, key=lambda p: p.bounds[0]), asked.metric.name
    return (
        f"no plan is known to keep {metric} {asked.least:g} on {asked.images} pictures: the "
        f"best of {len(points)} drawn to the end, {best.name}, has {_estimate(best.values).told(metric)}; ask "
        "for less, or give more --images, which narrow the bounds"
    )


def _report(
    bundle: Bundle,
    plan: Plan,
    ungated: Plan,
    asked: Asked,
    engine: Engine,
    best: Point,
    unrelated: Sequence[float],
    measured: Mapping[str, float],
) -> PlanReport:
    manifest = bundle.manifest
    graphs = manifest.shapes_of(asked.size)[0].graphs
    return PlanReport(
        bundle=bundle_digest(manifest),
        program=program_digest(plan),
        settings=dict(plan.settings),
        files=files_of(manifest, plan, asked.size),
        metric=asked.metric.name,
        judge=asked.metric.judge,
        quality=_estimate(best.values),
        unrelated=_estimate(unrelated),
        images=asked.images,
        prompts=min(len(asked.prompts), asked.images),
        prompts_sha256=_digest(asked.prompts),
        seed=asked.seed,
        size=asked.size,
        predicted_ms=best.ms,
        measured_ms=measured["plan"],
        ungated_ms=measured["ungated"],
        macs=plan.macs(graphs)[1],
        ungated_macs=ungated.macs(graphs)[1],
        engine=engine.name,
        engine_version=engine.version,
        precision=engine.options.precision or "",
        threads=engine.options.threads or 0,
        machine=cpu_model(),
        version=tgate_engine.__version__,
    )


def _estimate(values: Sequence[float]) -> Estimate:
    low, high = interval(values)
    return Estimate(mean=Point("", 0.0, tuple(values)).mean, low=low, high=high)


def _digest(prompts: Sequence[str]) -> str:
    return hashlib.sha256("".join(f"{prompt}\n" for prompt in prompts).encode()).hexdigest()


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
