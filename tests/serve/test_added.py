"""What an image adds: learned from calls whose times are known."""

from __future__ import annotations

import numpy as np
import pytest

from tgate_serve.added import GUESS, LEAST, TRIES, Added


@pytest.mark.parametrize("share", [0.2, 0.9, 1.0, 1.6])
@pytest.mark.parametrize("busy", [1 / 8, 1 / 2])
def test_what_is_learned_is_what_the_calls_take(share: float, busy: float) -> None:
    """Two graphs, one twice as long; times that vary by a tenth, and some that had to wait."""
    rng = np.random.default_rng(1)
    added, learned = Added(), 0.0
    for _ in range(400):
        graph, images = str(rng.choice(["long", "short"])), int(rng.integers(1, 5))
        ms = (20.0 if graph == "long" else 10.0) * (1 + share * (images - 1)) * rng.uniform(0.95, 1.05)
        learned = added.saw(graph, images, ms * (9 if rng.random() < busy else 1))
    assert learned == pytest.approx(share, abs=0.06)


def test_it_is_a_guess_until_one_graph_was_called_for_one_and_for_several() -> None:
    added = Added()
    for graph, images in (("f", 1), ("f", 1), ("c", 2), ("c", 2), ("f", 2)):
        assert added.saw(graph, images, 10.0 * images) == GUESS
    assert added.saw("f", 2, 20.0) == 1.0


def test_the_first_call_of_a_kind_does_not_count() -> None:
    added = Added()
    for images, ms in ((1, 500.0), (2, 900.0), (1, 10.0)):
        added.saw("f", images, ms)
    assert added.saw("f", 2, 15.0) == pytest.approx(0.5)


def test_what_has_changed_is_learned_again() -> None:
    added, learned = Added(), 0.0
    for share in (1.0, 0.25):
        for images in [1, 2] * 20:
            learned = added.saw("f", images, 10.0 * (1 + share * (images - 1)))
        assert learned == pytest.approx(share)


def test_company_is_tried_again_now_and_then() -> None:
    """A server where nobody goes together would never learn that this has become worth it."""
    added = Added()
    for images in (1, 1, 2, 2):
        learned = added.saw("f", images, 10.0 * images)
    assert learned == 1.0
    assert [added.saw("f", 1, 10.0) for _ in range(TRIES)] == [1.0] * (TRIES - 1) + [GUESS]
    assert added.saw("f", 2, 20.0) == 1.0


@pytest.mark.parametrize("ms", [0.0, 5.0, 10.0])
def test_an_image_adds_something(ms: float) -> None:
    """Also where a call for two seemed no longer than one for one, or a clock stood still."""
    added = Added()
    for images in (1, 2, 1):
        added.saw("f", images, 10.0)
    assert added.saw("f", 2, ms) == LEAST
    still = Added()
    assert {still.saw("f", images, 0.0) for images in (1, 2, 1, 2)} == {GUESS}
