"""A short run over all targets, the same each time, and all that was a fault once. ``make fuzz`` is a long one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

from tests.fuzz.child import Child
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
    """Not by hypothesis, as the long runs are: it draws from the constants of whatever modules are loaded, and so other
    inputs beside other tests."""
    outcomes: Counter[str] = Counter()
    for number in range(target.examples):
        rng = Random(f"{target.name} {number}")
        data = target.mutate(rng.choice(target.sound()), rng)
        outcome = judged(target, data)
        outcomes[outcome.kind] += 1
        if outcome.kind == FAULT:
            (tmp_path / "fault").write_bytes(data)
        assert outcome.kind != FAULT, f"{outcome}; mend it, and keep {tmp_path / 'fault'} in {CORPUS / target.name}"
    assert min(outcomes[ACCEPTED], outcomes[REFUSED]) > 0, outcomes  # both sides of what is checked were reached


def test_the_corpus_is_small_and_every_folder_somebodys() -> None:
    assert {path.name for path in CORPUS.iterdir()} <= {target.name for target in TARGETS}
    assert sum(path.stat().st_size for path in CORPUS.rglob("*") if path.is_file()) < SIZE_BYTES
