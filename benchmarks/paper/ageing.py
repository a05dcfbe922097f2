"""How the kept difference of guidance is best aged: what `guidance_delta` adds to the prompt's half after its gate.

From step m on the prompt's half alone is computed, and e_positive + (s - 1) D_i taken for the output. D is the last
difference of both halves; what D_i is made of is the question, and how often both halves are computed again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.paper.eager import NULL, PROMPT, Rule, Step


@dataclass(frozen=True, kw_only=True)
class Age:
    """What an ageing rule sees: D, the difference before it, steps since, and sigma over alpha, now and then."""

    last: torch.Tensor
    before: torch.Tensor
    steps: int
    level: float
    level_then: float


Ageing = Callable[[Age], torch.Tensor]

WAYS: dict[str, Ageing] = {
    "constant in noise": lambda age: age.last,
    "constant in x0": lambda age: age.last * (age.level_then / age.level),
    "fading with the noise": lambda age: age.last * (age.level / age.level_then),
    "extrapolated": lambda age: age.last + age.steps * (age.last - age.before),
}
REFRESHES = (8, 5, 3)


def guidance_stopped(m: int) -> Rule:
    """Guidance until step m, then the prompt's half itself."""
    return lambda step: step.guided() if step.i < m else step.half(PROMPT)


class Aged:
    """The rule of one way of ageing from step m on; every ``refresh``-th step after it both halves are computed."""

    def __init__(self, m: int, age: Ageing, refresh: int = 0) -> None:
        self._m, self._age, self._refresh = m, age, refresh
        self._kept: list[torch.Tensor] = []

    def computes_both(self, i: int) -> bool:
        """Whether step ``i`` runs the negative half too."""
        return i < self._m or (self._refresh > 0 and (i - self._m) % self._refresh == self._refresh - 1)

    def __call__(self, step: Step) -> torch.Tensor:
        if step.i == 0:
            self._kept.clear()
        prompt = step.half(PROMPT)
        if self.computes_both(step.i):
            self._kept = [*self._kept[-1:], prompt - step.half(NULL)]
            self._taken, self._level = step.i, step.level
            difference = self._kept[-1]
        else:
            difference = self._age(
                Age(
                    last=self._kept[-1],
                    before=self._kept[0],
                    steps=step.i - self._taken,
                    level=step.level,
                    level_then=self._level,
                )
            )
        return prompt + (step.scale - 1) * difference
