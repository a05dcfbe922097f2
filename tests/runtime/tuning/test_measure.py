"""What a plan takes and what it draws, measured on the toy bundle: against pipelines and benchmarks asked directly."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from tests.toy_bundle import Toy, build, edit_manifest
from tgate_engine.bundle import Bundle
from tgate_engine.errors import RequestError
from tgate_export.methods.base import Settings
from tgate_runtime.engines import open_engine
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.tuning.kept import Kept
from tgate_runtime.tuning.measure import OTHER_SEEDS, Judge, Times, check_drawable, measure_graphs, measure_plan
from tgate_runtime.tuning.quality import nearness, psnr

PROMPTS = ("a large red circle", "a small blue square", "a circle")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Read only."""
    settings = {"default": Settings(steps=8, gate=5, self_interval=2), "fast": Settings(steps=8, gate=1)}
    return Bundle.open(build(tmp_path_factory.mktemp("measure") / "toy", Toy(settings=settings), goldens=False))


@pytest.fixture
def pipe(bundle: Bundle) -> Iterator[Pipeline]:
    with Pipeline.open(bundle, threads=1) as pipe:
        yield pipe


def judge(pipe: Pipeline, kept: Kept | None = None) -> Judge:
    manifest = pipe.session.manifest
    asked = {"metric": nearness("psnr"), "seed": 5, "size": manifest.sizes[0]}
    return Judge(pipe, manifest.plan("ungated"), PROMPTS, kept=kept or Kept(None, {}), **asked)  # type: ignore[arg-type]


def picture(pipe: Pipeline, plan: str, i: int, away: int = 0) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
    return np.asarray(pipe(PROMPTS[i % 3], seed=5 + away + i, plan=plan).images[0])


def test_scores_are_of_the_pictures_that_a_pipeline_draws(pipe: Pipeline) -> None:
    scores = judge(pipe).scores(pipe.session.plan("fast"), 6)
    alone = [psnr(picture(pipe, "fast", i), picture(pipe, "ungated", i)) for i in range(6)]
    assert scores == pytest.approx(alone, abs=0.2)  # in a batch a value may round to the next byte
    assert max(scores) < 40
    assert len(set(scores)) == 6


def test_the_ungated_plan_is_as_near_as_can_be_and_other_seeds_are_far(pipe: Pipeline) -> None:
    asked = judge(pipe)
    assert set(asked.scores(pipe.session.plan("ungated"), 4)) == {
        psnr(picture(pipe, "fast", 0), picture(pipe, "fast", 0))
    }
    unrelated = asked.unrelated(4)
    alone = [psnr(picture(pipe, "ungated", i, OTHER_SEEDS), picture(pipe, "ungated", i)) for i in range(4)]
    assert unrelated == pytest.approx(alone, abs=0.2)


def test_what_is_known_is_not_drawn_again(pipe: Pipeline) -> None:
    kept, plan = Kept(None, {}), pipe.session.plan("fast")
    first = judge(pipe, kept)
    four = first.scores(plan, 4)
    assert first.drawn == 8  # and the ungated ones
    assert first.scores(plan, 3) == four[:3]
    assert first.drawn == 8
    again = judge(pipe, kept)
    assert again.scores(plan, 4) == four
    assert again.drawn == 0
    whole = judge(pipe).scores(plan, 8)
    assert again.scores(plan, 8) == whole
    assert again.drawn == 8


def test_a_time_is_the_sum_over_the_steps(bundle: Bundle) -> None:
    plan = bundle.manifest.plan("default")  # 4 full, 1 reuse_self, 3 reuse_cross
    times = Times(graphs={"full": 10.0, "reuse_self": 7.0, "reuse_cross": 4.0}, host=0.5, around=3.0)
    assert times.of(plan) == pytest.approx(4 * 10 + 7 + 3 * 4 + 8 * 0.5 + 3)
    assert Times(**times.to_json()) == times


def test_every_graph_is_timed_and_nothing_else(bundle: Bundle) -> None:
    plans = [bundle.manifest.plan(name) for name in ("ungated", "default", "fast", "guidance_stopped")]
    told: list[str] = []
    times = measure_graphs(
        bundle,
        plans,
        engine=open_engine("ort-cpu", threads=1),
        size=None,
        repeats=2,
        on_run=lambda done, total, name: told.append(name),
    )
    assert set(times.graphs) == {"full", "reuse_self", "reuse_cross", "unguided"}
    assert min(times.graphs.values()) > 0
    assert times.host > 0
    assert times.around > 0
    assert len(set(told)) == 3  # fast runs what the default has


def test_a_plan_and_the_ungated_one_are_timed_in_turns(bundle: Bundle) -> None:
    told: list[str] = []
    measured = measure_plan(
        bundle,
        bundle.manifest.plan("fast"),
        bundle.manifest.plan("ungated"),
        engine=open_engine("ort-cpu", threads=1),
        size=None,
        repeats=2,
        on_run=lambda done, total, name: told.append(name),
    )
    assert set(measured) == {"plan", "ungated"}
    assert all(ms > 0 for ms in measured.values())
    assert told == told[:2] * 3  # a warm-up and two turns


def test_a_bundle_that_draws_no_pictures_from_prompts_is_refused(tmp_path: Path) -> None:
    path = build(tmp_path / "toy", goldens=False)
    check_drawable(Bundle.open(path).manifest)
    edit_manifest(path, lambda data: data["shapes"][0]["graphs"].pop("decoder"))
    with pytest.raises(RequestError, match="has no decoder"):
        check_drawable(Bundle.open(path).manifest)
    pictured = build(tmp_path / "pictured", Toy(pictured=True), goldens=False)
    with pytest.raises(RequestError, match="has no text encoder"):
        check_drawable(Bundle.open(pictured).manifest)
