"""What an image has still to do, one object for all that have the same to do; and where two of them meet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

WORTH = 4
"""Two images have to share more than so many steps for each that one of them takes first, to be where the other is."""


@dataclass(frozen=True, slots=True, eq=False)
class Left:
    """The graphs that are still to run: ``graph``, and what is left then, None after the last. ``steps``: how many.

    Made by :class:`Programs`, which gives the same object for the same graphs.
    """

    graph: str
    then: Left | None
    steps: int


class Programs:
    """All that was ever left to do. It is never forgotten: programs are those of plans, which are few."""

    def __init__(self) -> None:
        self._made: dict[tuple[str, Left | None], Left] = {}

    def left(self, graphs: Sequence[str]) -> Left | None:
        """Those graphs, in order; None where there are none."""
        left: Left | None = None
        for graph in reversed(graphs):
            key = (graph, left)
            if key not in self._made:
                self._made[key] = Left(graph, left, 1 + (left.steps if left else 0))
            left = self._made[key]
        return left


@dataclass(frozen=True, slots=True)
class Meeting:
    """``behind``: the steps that one image takes first, while another waits. ``gain``: the steps that they then take
    together, one after another, less :data:`WORTH` for each of the others."""

    behind: int
    gain: int


@lru_cache(maxsize=1 << 16)
def meeting(lead: Left, other: Left) -> Meeting | None:
    """Where an image had better meet the one in the lead, going by the gain; None where that is not worth it."""
    best: Meeting | None = None
    behind, at = 0, other
    while min(lead.steps, at.steps) - WORTH * behind > (best.gain if best else 0):  # or nothing better is to come
        gain = _together(lead, at) - WORTH * behind
        if gain > (best.gain if best else 0):
            best = Meeting(behind, gain)
        if at.then is None:
            break
        behind, at = behind + 1, at.then
    return best


def _together(one: Left | None, other: Left | None) -> int:
    """How many steps of two programs are the same, from their next on."""
    count = 0
    while one is not None and other is not None and one.graph == other.graph:
        if one is other:
            return count + one.steps
        count, one, other = count + 1, one.then, other.then
    return count
