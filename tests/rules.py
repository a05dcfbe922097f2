"""The method's table (shared by tests): what step i does, in the words of the paper, written once more.

| step | guidance | cross-attention | self-attention |
|---|---|---|---|
| i < m-1 | on | compute | i < w: compute; i = w: store; i > w: store if i mod k = 0, else reuse |
| i = m-1 | on | store the mean | store (the mean) |
| i >= m | off | reuse | store if i mod f = 0, else reuse |
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    guided: bool
    cross: str
    self_: str
    gate: bool = False


def step_rule(i: int, n: int, m: int, k: int, w: int, f: int, *, reuse: bool = True) -> Rule:
    """The rule of step ``i``; negative for a sampler's calls before the first step."""
    assert i < n
    if i < 0:
        return Rule(True, "compute", "compute")
    if not reuse:
        return Rule(i < m, "compute", "compute")
    if i >= m:
        return Rule(False, "reuse", "store" if i % f == 0 else "reuse")
    if i == m - 1:
        return Rule(True, "store", "store", gate=True)
    if i < w:
        return Rule(True, "compute", "compute")
    return Rule(True, "compute", "store" if i == w or i % k == 0 else "reuse")
