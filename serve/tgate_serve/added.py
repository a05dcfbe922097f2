"""What each further image adds to a call, learned from the calls that are made."""

from __future__ import annotations

from collections import deque
from statistics import fmean

GUESS = 0.5
"""What an image is taken to add before that was measured. It is low enough for two images to go together wherever they
meet, so that it soon is."""
LEAST = 0.05
"""What one is taken to add at least, however short a call was."""
ENOUGH = 5
"""So many calls of a kind are made before it counts."""
TRIES = 100
"""From 1 on everybody goes alone and nothing more is learned: after so many calls in a row for one image, the guess
holds again until some go together."""
_KEPT = 15
"""Of so many calls of late the shortest counts: whatever makes one longer, a busy machine or a row that was not in its
cache, is none of its company's doing."""


class Added:
    """The calls of one size by graph and images. Not thread-safe."""

    def __init__(self) -> None:
        self._ready: set[tuple[str, range]] = set()
        self._calls: dict[tuple[str, int], deque[float]] = {}
        self._alone = 0  # calls in a row

    def saw(self, graph: str, rows: range, ms: float) -> float:
        """A call was made for the images of those rows, and took so long with all that a call takes, inside the engine
        and around it.

        Returns what each further image adds to a call for one, as a share of it: the mean of the graphs and numbers of
        images that were seen; :data:`GUESS` until a graph was called for one and for several.
        """
        self._alone = self._alone + 1 if len(rows) == 1 else 0
        if (graph, rows) in self._ready:
            self._calls.setdefault((graph, len(rows)), deque(maxlen=_KEPT)).append(ms)
        self._ready.add((graph, rows))  # the first call of those rows is made ready as well as made
        least = {kind: min(calls) for kind, calls in self._calls.items() if len(calls) >= ENOUGH}
        shares = [
            (ms / alone - 1) / (images - 1)
            for (of, images), ms in least.items()
            if images > 1 and (alone := least.get((of, 1)))
        ]
        return max(LEAST, fmean(shares)) if shares and self._alone < TRIES else GUESS
