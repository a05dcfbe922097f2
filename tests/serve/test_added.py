"""What an image adds: learned from calls whose times are known."""

from __future__ import annotations

import numpy as np
import pytest

from tgate_serve.added import ENOUGH, GUESS, LEAST, TRIES, Added


def settled(added: Added, share: float, ms: float = 10.0) -> float:
    """Enough calls for one and for two."""
    learned = 0.0
    for images in [1, 2] * (ENOUGH + 1):
        learned = added.saw("f", range(images), ms * (1 + share * (images - 1)))
    return learned


@pytest.mark.parametrize("share", [0.2, 0.9, 1.0, 1.6])
@pytest.mark.parametrize("busy", [1 / 8, 1 / 2])
def test_what_is_learned_is_what_the_calls_take(share: float, busy: float) -> None:
    """Two graphs, one twice as long; times that vary by a tenth, and some that had to wait."""
    rng = np.random.default_rng(1)
    added, learned = Added(), 0.0
    for _ in range(600):
        graph, first, images = str(rng.choice(["long", "short"])), int(rng.integers(4)), int(rng.integers(1, 5))
        ms = (20.0 if graph == "long" else 10.0) * (1 + share * (images - 1)) * rng.uniform(0.95, 1.05)
        learned = added.saw(graph, range(first, first + images), ms * (9 if rng.random() < busy else 1))
    assert learned == pytest.approx(share, abs=0.06)


def test_it_is_a_guess_until_one_graph_was_called_often_enough_for_one_and_for_several() -> None:
    added = Added()
    for _ in range(ENOUGH + 1):
        assert added.saw("f", range(1), 10.0) == GUESS
        assert added.saw("c", range(2), 20.0) == GUESS
    for _ in range(ENOUGH):
        assert added.saw("f", range(2), 20.0) == GUESS
    assert added.saw("f", range(2), 20.0) == 1.0


def test_the_first_call_of_some_rows_does_not_count() -> None:
    added = Added()
    for first in range(ENOUGH):
        added.saw("f", range(first, first + 1), 100.0)
        added.saw("f", range(first, first + 2), 900.0)
    for first in range(ENOUGH):
        added.saw("f", range(first, first + 1), 10.0)
        learned = added.saw("f", range(first, first + 2), 15.0)
    assert learned == pytest.approx(0.5)


def test_one_long_call_keeps_nobody_alone() -> None:
    """A busy machine in the first seconds of a server's life."""
    added = Added()
    for images in [1, 2] * 2:
        added.saw("f", range(images), 10.0 if images == 1 else 90.0)
    assert settled(added, 0.4) == pytest.approx(0.4)


def test_what_has_changed_is_learned_again() -> None:
    added = Added()
    for share in (1.0, 0.25):
        for _ in range(3):
            learned = settled(added, share)
        assert learned == pytest.approx(share)


def test_company_is_tried_again_now_and_then() -> None:
    """A server where nobody goes together would never learn that this has become worth it."""
    added = Added()
    assert settled(added, 1.0) == 1.0
    assert [added.saw("f", range(1), 10.0) for _ in range(TRIES)] == [1.0] * (TRIES - 1) + [GUESS]
    assert added.saw("f", range(2), 20.0) == 1.0


@pytest.mark.parametrize("ms", [0.0, 5.0, 10.0])
def test_an_image_adds_something(ms: float) -> None:
    """Also where a call for two seemed no longer than one for one, or a clock stood still."""
    added, still = Added(), Added()
    for _ in range(ENOUGH + 1):
        added.saw("f", range(1), 10.0)
        learned = added.saw("f", range(2), ms)
        assert {still.saw("f", range(images), 0.0) for images in (1, 2)} == {GUESS}
    assert learned == LEAST
