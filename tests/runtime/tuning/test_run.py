"""The whole of it on the toy bundle: what comes out, and that a run which was ended comes to the same."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.toy_bundle import build
from tgate_engine.bundle import Bundle
from tgate_engine.errors import RequestError
from tgate_engine.plan_report import Estimate, files_of, program_digest
from tgate_engine.report import Silent
from tgate_export.candidates import Candidates, candidates
from tgate_runtime.engines import open_engine
from tgate_runtime.tuning.kept import Kept
from tgate_runtime.tuning.measure import Judge
from tgate_runtime.tuning.quality import Metric, nearness, psnr
from tgate_runtime.tuning.run import Asked, Tuned, begin, tune

ASKED = Asked(
    metric=nearness("psnr"), least=22.0, prompts=("a red circle", "a blue square"), images=6, seed=1, size="4x4"
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """Read only."""
    return Bundle.open(build(tmp_path_factory.mktemp("run") / "toy", goldens=False))


@pytest.fixture(scope="module")
def choices(bundle: Bundle) -> Candidates:
    return candidates(bundle, steps=5)


def tuned(bundle: Bundle, choices: Candidates, asked: Asked = ASKED, file: Path | None = None, **more: Any) -> Tuned:
    engine = open_engine("ort-cpu", threads=1)
    kept = begin(file, bundle, choices.ungated, asked, engine)
    parts: dict[str, Any] = {"plans": choices.plans, "start": choices.start, "near": choices.near, **more}
    return tune(bundle, ungated=choices.ungated, **parts, asked=asked, engine=engine, kept=kept, report=Silent())


def test_the_plan_meets_the_budget_and_its_report_says_what_was_measured(bundle: Bundle, choices: Candidates) -> None:
    found = tuned(bundle, choices)
    report, plan = found.report, choices.plans[found.chosen]
    assert report.quality.low >= 22
    assert report.quality.low <= report.quality.mean <= report.quality.high
    assert report.unrelated.mean < report.quality.mean
    assert report.program == program_digest(plan)
    assert (report.images, report.prompts, report.seed, report.size) == (6, 2, 1, "4x4")
    graphs = bundle.manifest.shapes[0].graphs
    assert (report.macs, report.ungated_macs) == (plan.macs(graphs)[1], 5 * 2600)
    assert report.files == files_of(bundle.manifest, plan, ASKED.size)
    assert (report.engine, report.threads) == ("ort-cpu", 1)
    (point,) = (point for point in found.front if point.name == found.chosen)
    assert point.ms == report.predicted_ms
    assert found.prediction_error == pytest.approx(report.predicted_ms / report.measured_ms - 1)
    assert found.ungated_error == pytest.approx(found.ungated_ms / report.ungated_ms - 1)


def test_a_run_that_was_ended_goes_on_to_the_same(
    bundle: Bundle, choices: Candidates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, ended = tmp_path / "whole.json", tmp_path / "ended.json"
    straight = tuned(bundle, choices, file=whole)

    class Ended(Exception):
        pass

    add, added = Kept.add, list[str]()

    def interrupted(self: Kept, metric: str, program: str, values: Any) -> None:
        add(self, metric, program, values)
        added.append(program)
        if len(added) == 9:
            raise Ended

    # Times differ from run to run: the ended one begins with those of the whole one.
    times = Kept(whole, begin(None, bundle, choices.ungated, ASKED, open_engine("ort-cpu", threads=1))._of)
    begun = begin(ended, bundle, choices.ungated, ASKED, open_engine("ort-cpu", threads=1))
    begun.fact("times", lambda: times.fact("times", dict))
    monkeypatch.setattr(Kept, "add", interrupted)
    with pytest.raises(Ended):
        tuned(bundle, choices, file=ended)
    monkeypatch.undo()
    again = tuned(bundle, choices, file=ended)
    assert again.chosen == straight.chosen
    assert again.front == straight.front
    assert again.report.quality == straight.report.quality
    assert again.report.unrelated == straight.report.unrelated

    monkeypatch.setattr(Judge, "_draw", lambda *_: pytest.fail("drawn again"))
    assert tuned(bundle, choices, file=whole) == straight


def test_the_measurements_of_a_file_serve_another_question(
    bundle: Bundle, choices: Candidates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "state.json"
    first = tuned(bundle, choices, file=file)
    with pytest.raises(RequestError, match="whose seed is"):
        tuned(bundle, choices, replace(ASKED, seed=2), file)
    with pytest.raises(RequestError, match="whose prompts is"):
        tuned(bundle, choices, replace(ASKED, prompts=("a star",)), file)
    looser = tuned(bundle, choices, replace(ASKED, least=first.report.quality.low - 2), file)
    assert looser.report.predicted_ms <= first.report.predicted_ms


def test_the_pictures_to_look_at_are_the_worst_and_another_engine_tells_the_floor(
    bundle: Bundle, choices: Candidates
) -> None:
    found = tuned(bundle, choices, replace(ASKED, pairs=4), floor_engine=open_engine("openvino", threads=1))
    values = found.point.values
    assert [pair.value for pair in found.pairs] == sorted(values)[:4]
    for pair in found.pairs:
        assert pair.seed == ASKED.seed + pair.image
        assert pair.prompt == ASKED.prompts[pair.image % 2]
        assert psnr(pair.tuned, pair.ungated) == pytest.approx(pair.value, abs=0.3)  # alone, not in a call of four
    ((engine, floor),) = found.report.elsewhere.items()
    assert engine.startswith("openvino 20")
    assert floor.mean > 45 > found.report.quality.mean  # the same pictures, but for rounding


def test_a_judge_is_told_with_what_was_found_beside(bundle: Bundle, choices: Candidates, tmp_path: Path) -> None:
    def brighter(pictures: Any, references: Any, prompts: Any) -> dict[str, list[float]]:
        assert {len(pictures), len(references)} == {len(prompts)}
        pairs = list(zip(pictures, references, strict=True))
        return {
            "clip": [float(np.mean(own) - np.mean(other)) for own, other in pairs],
            "psnr": [psnr(*pair) for pair in pairs],
        }

    judged = replace(ASKED, metric=Metric(name="clip", compare=brighter, beside=("psnr",), judge="a" * 64), least=-50.0)
    found = tuned(bundle, choices, judged, tmp_path / "state.json")
    assert (found.report.metric, found.report.judge) == ("clip", "a" * 64)
    assert list(found.report.beside) == ["psnr"]
    again = tuned(bundle, choices, replace(ASKED, least=found.report.beside["psnr"].low), tmp_path / "state.json")
    assert again.report.predicted_ms <= found.report.predicted_ms  # and its psnr was known
    # Another judge's verdicts are not taken for this one's.
    other = replace(judged, metric=replace(judged.metric, compare=lambda *_: pytest.fail("asked"), judge="b" * 64))
    with pytest.raises(pytest.fail.Exception, match="asked"):
        tuned(bundle, choices, other, tmp_path / "state.json")


def test_what_is_told_of_all_pictures_as_a_whole_stands_beside(
    bundle: Bundle, choices: Candidates, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spread(pictures: Any, references: Any) -> dict[str, Estimate]:
        assert len(pictures) == len(references) == ASKED.images
        value = float(np.std(pictures) - np.std(references))
        return {"frechet": Estimate(mean=value, low=value - 1, high=value + 1)}

    whole, file = replace(ASKED, metric=replace(nearness("psnr"), together=spread)), tmp_path / "state.json"
    found = tuned(bundle, choices, whole, file).report.beside["frechet"]
    assert found.mean != 0
    monkeypatch.setattr(Judge, "_draw", lambda *_: pytest.fail("drawn again"))
    assert tuned(bundle, choices, whole, file).report.beside["frechet"] == found


def test_where_nothing_to_begin_with_is_fast_enough_what_is_is_tried(
    bundle: Bundle, choices: Candidates, tmp_path: Path
) -> None:
    file = tmp_path / "state.json"
    first = tuned(bundle, choices, file=file)
    predicted = {name: first.times.of(plan) for name, plan in choices.plans.items()}
    slowest, fastest = (by(predicted, key=lambda name: predicted[name]) for by in (max, min))
    speedup = 0.9999 * first.ungated_ms / predicted[fastest]
    for metric in (nearness("psnr"), replace(nearness("psnr"), judge="a" * 64)):
        found = tuned(
            bundle, choices, replace(ASKED, metric=metric, least=None, speedup=speedup), file, start=[slowest]
        )
        assert predicted[found.chosen] == predicted[fastest]


def test_a_budget_that_nothing_meets_says_what_there_is(bundle: Bundle, choices: Candidates) -> None:
    with pytest.raises(RequestError, match=r"no plan is known to keep psnr 58.5 on 6 pictures: the best of .* dB \("):
        tuned(bundle, choices, replace(ASKED, least=58.5))


def test_a_speed_that_nothing_has_is_told_before_anything_is_drawn(
    bundle: Bundle, choices: Candidates, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Judge, "_draw", lambda *_: pytest.fail("drawn"))
    with pytest.raises(RequestError, match=r"is 900 times as fast as ungated here: the fastest, m=1"):
        tuned(bundle, choices, replace(ASKED, least=None, speedup=900.0))
