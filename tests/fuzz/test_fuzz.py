"""A short run over all targets, the same each time, and all that was a fault once. ``make fuzz`` is a long one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings

from tests.fuzz.child import Child
from tests.fuzz.inputs import inputs
from tests.fuzz.judging import ACCEPTED, FAULT, REFUSED, Outcome, bounded_memory, judge
from tests.fuzz.target import CORPUS, Target
from tests.fuzz.targets import every_target

TARGETS = every_target()
KEPT = [pytest.param(target, name, id=f"{target.name}-{name}") for target in TARGETS for name in target.corpus()]
SIZE_BYTES = 300_000


Judge = Callable[[Target, bytes], Outcome]


@pytest.fixture(scope="module")
def judged() -> Iterator[Judge]:
    """Judges an input in a process of its own, or here, by what its target says."""

    def found(target: Target, data: bytes) -> Outcome:
        if target.native:
            return child.judge(target, data)
        with bounded_memory():
            return judge(target.run, data)

    with Child() as child:
        yield found


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_what_is_sound_is_taken(judged: Judge, target: Target) -> None:
    """Else nothing beyond the first check would ever be reached."""
    assert [judged(target, data).says for data in target.sound()] == [""] * len(target.sound())


@pytest.mark.parametrize(("target", "name"), KEPT)
def test_what_was_a_fault_is_none_any_more(judged: Judge, target: Target, name: str) -> None:
    outcome = judged(target, target.corpus()[name])
    assert outcome.kind != FAULT, outcome


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_whatever_is_made_up_is_taken_or_refused_in_a_line(judged: Judge, target: Target, tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()

    @settings(
        max_examples=target.examples,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs(target))
    def short_run(data: bytes) -> None:
        outcome = judged(target, data)
        outcomes[outcome.kind] += 1
        if outcome.kind == FAULT:
            (tmp_path / "fault").write_bytes(data)
        assert outcome.kind != FAULT, f"{outcome}; mend it, and keep {tmp_path / 'fault'} in {CORPUS / target.name}"

    short_run()
    assert min(outcomes[ACCEPTED], outcomes[REFUSED]) > 0, outcomes  # both sides of what is checked were reached


def test_the_corpus_is_small_and_every_folder_somebodys() -> None:
    assert {path.name for path in CORPUS.iterdir()} <= {target.name for target in TARGETS}
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < SIZE_BYTES
