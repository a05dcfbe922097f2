"""What each further image adds to a call, learned from the calls that are made."""

from __future__ import annotations

from collections import deque
from statistics import fmean

GUESS = 0.5
"""What an image is taken to add before that was measured. It is low enough for two images to go together wherever they
meet, so that it soon is."""
LEAST = 0.05
"""What one is taken to add at least, however short a call was."""
TRIES = 500
"""From 1 on everybody goes alone and nothing more is learned: after so many calls in a row for one image, the guess
holds again until some go together."""
_KEPT = 15
"""Of so many calls of late the shortest counts: whatever makes one longer, a busy machine or a row that was not in its
cache, is none of its company's doing."""


class Added:
    """The calls of one size by graph and images. Not thread-safe."""

    def __init__(self) -> None:
        self._calls: dict[tuple[str, int], deque[float]] = {}
        self._alone = 0  # calls in a row

    def saw(self, graph: str, images: int, ms: float) -> float:
        """A call was made. What each further image adds to a call for one, as a share of it: the mean of the graphs and
        numbers of images that were seen; :data:`GUESS` until a graph was called for one and for several."""
        key = (graph, images)
        self._alone = self._alone + 1 if images == 1 else 0
        if key not in self._calls:  # the first is made ready as well as made
            self._calls[key] = deque(maxlen=_KEPT)
        else:
            self._calls[key].append(ms)
        alone = {of: min(calls) for (of, many), calls in self._calls.items() if many == 1 and calls}
        shares = [
            (min(calls) / alone[of] - 1) / (many - 1)
            for (of, many), calls in self._calls.items()
            if many > 1 and calls and alone.get(of)
        ]
        return max(LEAST, fmean(shares)) if shares and self._alone < TRIES else GUESS
