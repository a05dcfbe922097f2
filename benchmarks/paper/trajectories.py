"""The trajectories S, S^F and S^L: the prompt only before a step or only after it (equations 4 and 5, tables A1 to A4),
and self-attention cached only after it or only before it (appendix B, table A5)."""

from __future__ import annotations

from collections.abc import Callable

import torch

from benchmarks.paper.eager import NULL, PROMPT, Kept, Rule, Step

WARM_UP = 2


def standard(step: Step) -> torch.Tensor:
    """S."""
    return step.guided()


def without_guidance(step: Step) -> torch.Tensor:
    """The prompt's half alone."""
    return step.half(PROMPT)


def prompt_first(m: int) -> Rule:
    """S^F_m: the null text replaces the prompt from step m on."""
    return lambda step: step.guided() if step.i < m else step.half(NULL)


def prompt_last(m: int) -> Rule:
    """S^L_m: the null text replaces the prompt before step m."""
    return lambda step: step.half(NULL) if step.i < m else step.guided()


def self_cached_last(m: int, k: int, kept: Kept) -> Rule:
    """S^F of self-attention: from step m on it is computed every k-th step and else what it was."""
    return _cached(kept, lambda i: i >= m and (i - m) % k != 0)


def self_cached_first(m: int, k: int, kept: Kept) -> Rule:
    """S^L of self-attention: before step m, after the warm-up, it is computed every k-th step and else what it was."""
    return _cached(kept, lambda i: WARM_UP < i < m and i % k != 0)


def _cached(kept: Kept, reuses: Callable[[int], bool]) -> Rule:
    def rule(step: Step) -> torch.Tensor:
        kept.reuse = reuses(step.i)
        return step.guided()

    return rule
