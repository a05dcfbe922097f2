"""Plans measured on an engine: how long a picture takes, told ahead from its graphs, and how near it is to the ungated
one of the same seed."""

from __future__ import annotations

import logging
import math
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from tgate_engine.bundle import Bundle
from tgate_engine.errors import RequestError, shown
from tgate_engine.graph import DECODE, TEXT
from tgate_engine.manifest import Manifest
from tgate_engine.plan import Plan
from tgate_engine.plan_report import Estimate, program_digest
from tgate_runtime.benchmark import bench
from tgate_runtime.encoder import Encoder, Row
from tgate_runtime.engines.protocol import Engine
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.tuning.kept import Kept
from tgate_runtime.tuning.quality import METRICS, Metric, Pixels

log = logging.getLogger("tgate")

OTHER_SEEDS = 1 << 20
"""How far the seeds of unrelated pictures are from those of the ones they are compared with."""
_MEASURED = {"plan": "tune.plan", "ungated": "tune.ungated"}
"""What plans are called while they are timed."""

OnRun = Callable[[int, int, str], None]


def check_drawable(manifest: Manifest) -> None:
    """Raises :class:`RequestError` for a bundle that draws no pictures from prompts."""
    missing = "decoder" if manifest.graph(DECODE) is None else "text encoder" if manifest.graph(TEXT) is None else ""
    if missing:
        raise RequestError(
            f"the bundle has no {missing}, without which no prompt becomes a picture to compare; export it with "
            "--components text,denoiser,decoder"
        )


@dataclass(frozen=True, kw_only=True)
class Times:
    """Medians in milliseconds, of one picture. ``graphs``: a call of each denoising graph, inside the engine.
    ``host``: what a step takes beside that. ``around``: a text and a decoder call."""

    graphs: Mapping[str, float]
    host: float
    around: float

    def of(self, plan: Plan) -> float:
        """What a picture of ``plan`` will take: the sum over its steps, and what is around them."""
        return math.fsum(self.graphs[step.graph] + self.host for step in plan.steps) + self.around

    def to_json(self) -> dict[str, Any]:
        """As JSON values, which are the arguments again."""
        return asdict(self)


def measure_graphs(
    bundle: Bundle, plans: Collection[Plan], *, engine: Engine, size: str | None, repeats: int, on_run: OnRun | None
) -> Times:
    """The times of all graphs that ``plans`` run, from as few of them as run all, in turns."""
    cover: dict[str, Plan] = {}
    known: set[str] = set()
    for plan in plans:
        if not known >= set(plan.graphs()):
            known |= set(plan.graphs())
            cover[f"tune.{len(cover)}"] = plan
    data = _bench(bundle, cover, engine=engine, size=size, repeats=repeats, on_run=on_run)
    measured, images = data["plans"].values(), data["settings"]["batch"]
    return Times(
        graphs={name: data["graphs"][name]["ms"] / images for name in sorted(known)},
        host=statistics.median(plan["outside_engine_ms_per_step"] for plan in measured) / images,
        around=next(plan["picture_ms"] - plan["ms"] for plan in measured) / images,
    )


def measure_plan(
    bundle: Bundle, plan: Plan, ungated: Plan, *, engine: Engine, size: str | None, repeats: int, on_run: OnRun | None
) -> dict[str, float]:
    """Milliseconds of a picture of ``"plan"`` and ``"ungated"``, in turns."""
    named = {_MEASURED["plan"]: plan, _MEASURED["ungated"]: ungated}
    data = _bench(bundle, named, engine=engine, size=size, repeats=repeats, on_run=on_run)
    images = data["settings"]["batch"]
    return {what: data["plans"][name]["picture_ms"] / images for what, name in _MEASURED.items()}


def _bench(
    bundle: Bundle, plans: Mapping[str, Plan], *, engine: Engine, size: str | None, repeats: int, on_run: OnRun | None
) -> dict[str, Any]:
    named = {name: replace(plan, name=name, baselines=()) for name, plan in plans.items()}
    first, *others = named
    return bench(
        bundle.with_plans(named), plan=first, against=others, size=size, engine=engine, repeats=repeats, on_run=on_run
    )


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Pictures of one prompt and seed, the ``image``-th of a run, and what the plan's is worth; see :class:`Metric`."""

    image: int
    prompt: str
    seed: int
    value: float
    ungated: Pixels
    tuned: Pixels


class Judge:
    """Draws plans' pictures and says how near they are to the ungated ones, keeping what it finds. One thread's.

    Picture i is of prompt i, counted round, from seed ``seed + i``. ``drawn`` and ``drawn_s``: pictures so far, and the
    seconds that they took.
    """

    def __init__(
        self, pipe: Pipeline, ungated: Plan, prompts: Sequence[str], *, metric: Metric, seed: int, size: str, kept: Kept
    ) -> None:
        self._pipe, self._ungated, self._prompts = pipe, ungated, tuple(prompts)
        self._metric, self._seed, self._size, self._kept = metric, seed, size, kept
        self._most = pipe.session.shapes(size)[-1].batch[1]
        self._encoder = Encoder(pipe.session)
        self._rows: dict[int, Row] = {}
        self._references: dict[int, Pixels] = {}
        self._last: Plan | None = None
        self.drawn, self.drawn_s = 0, 0.0

    def scores(self, plan: Plan, count: int, name: str = "") -> tuple[float, ...]:
        """The values of that name, the metric's own if left out, of the first ``count`` pictures of a plan; what is not
        known is drawn."""
        return self._scores(program_digest(plan), count, name, lambda images: self._draw(plan, images))

    def unrelated(self, count: int) -> tuple[float, ...]:
        """The same of ungated pictures of the same prompts from other seeds: what nothing in common but the prompt
        comes to."""
        known = f"unrelated {program_digest(self._ungated)}"
        return self._scores(known, count, "", lambda images: self._draw(self._ungated, images, OTHER_SEEDS))

    def elsewhere(self, other: Pipeline, count: int) -> tuple[float, ...]:
        """The same of ungated pictures of the same seeds from ``other``, the same bundle on another engine: what an
        engine's own arithmetic comes to."""
        engine = other.session.engine
        known = f"{engine.name} {engine.version} {program_digest(self._ungated)}"
        there = Judge(
            other, self._ungated, self._prompts, metric=self._metric, seed=self._seed, size=self._size, kept=self._kept
        )
        return self._scores(known, count, "", lambda images: there._draw(self._ungated, images))

    def together(self, plan: Plan, count: int) -> Mapping[str, Estimate]:
        """What the metric tells of the first ``count`` pictures of a plan as a whole; they are drawn once more."""
        tell = self._metric.together
        if tell is None:
            return {}

        def make() -> dict[str, Any]:
            own, other = [], []
            for images in self._calls(0, count):
                own += self._draw(plan, images)
                other += self._ungated_ones(images)
            return {name: asdict(value) for name, value in tell(own, other).items()}

        known = self._kept.fact(f"together {count} {program_digest(plan)} {self._metric.judge[:16]}", make)
        return {name: Estimate(**value) for name, value in known.items()}

    def worst(self, plan: Plan, values: Sequence[float], most: int) -> list[Pair]:
        """Pictures of a plan beside the ungated ones, at most so many of those that ``values`` are of, the worst first;
        of equals, those that are farther from the ungated ones."""
        known = self._known("psnr", program_digest(plan))
        near = known if len(known) >= len(values) else values
        order = sorted(range(len(values)), key=lambda i: (values[i], near[i], i))[:most]
        pairs: list[Pair] = []
        for i in order:
            (tuned,) = self._draw(plan, [i])
            (ungated,) = self._ungated_ones([i])
            facts: dict[str, Any] = {"prompt": self._prompt(i), "seed": self._seed + i, "value": values[i]}
            pairs.append(Pair(image=i, **facts, ungated=ungated, tuned=tuned))
        return pairs

    def _scores(
        self, known: str, count: int, name: str, draw: Callable[[range], Sequence[Pixels]]
    ) -> tuple[float, ...]:
        name = name or self._metric.name
        for images in self._calls(len(self._known(name, known)), count):
            for told, values in self._compared(draw(images), images).items():
                # Of what one metric is told beside, another one may have had some already.
                if (had := len(self._known(told, known))) in images:
                    self._kept.add(self._key(told), known, values[had - images.start :])
        return self._known(name, known)[:count]

    def _known(self, name: str, known: str) -> tuple[float, ...]:
        return self._kept.scores(self._key(name), known)

    def _key(self, name: str) -> str:
        """What values are kept under: those of a judge are its alone."""
        return name if name in METRICS else f"{name} {self._metric.judge[:16]}".strip()

    def _calls(self, first: int, count: int) -> list[range]:
        """The pictures from ``first`` to ``count``, as many in a call as the bundle takes."""
        return [range(i, min(i + self._most, count)) for i in range(first, count, self._most)]

    def _compared(self, pictures: Sequence[Pixels], images: range) -> Mapping[str, Sequence[float]]:
        return self._metric.compare(pictures, self._ungated_ones(images), [self._prompt(i) for i in images])

    def _ungated_ones(self, images: Sequence[int]) -> list[Pixels]:
        if missing := [i for i in images if i not in self._references]:
            self._references.update(zip(missing, self._draw(self._ungated, missing), strict=True))
        return [self._references[i] for i in images]

    def _prompt(self, i: int) -> str:
        return self._prompts[i % len(self._prompts)]

    def _draw(self, plan: Plan, images: Sequence[int], away: int = 0) -> list[Pixels]:
        begin = time.perf_counter()
        if plan is not self._last:  # whose buffers would wait for requests that never come, and there are many plans
            self._pipe.session.trim()
            self._last = plan
        rows = [self._row(i % len(self._prompts)) for i in images]
        result = self._pipe(
            prompt_embeds={name: np.concatenate([row[name] for row in rows]) for name in rows[0]},
            seed=[self._seed + away + i for i in images],
            plan=plan,
            size=self._size,
        )
        self.drawn += len(images)
        self.drawn_s += time.perf_counter() - begin
        return [
            *map(np.asarray, result.images),
            *(np.stack([np.asarray(frame) for frame in video]) for video in result.videos),
        ]

    def _row(self, i: int) -> Row:
        """What conditions a picture of a prompt, encoded once."""
        if i not in self._rows:
            (self._rows[i],), cuts = self._encoder.of_texts([(self._prompts[i], None)], self._size)
            for cut in cuts:
                log.warning('a prompt is longer than the model takes; left out: "%s"', shown(cut, 500))
        return self._rows[i]
