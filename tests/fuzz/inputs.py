"""Inputs of a target as hypothesis draws them: a file that is sound, with a few changes."""

from __future__ import annotations

from hypothesis import strategies
from hypothesis.strategies import SearchStrategy

from tests.fuzz.target import Target


def inputs(target: Target) -> SearchStrategy[bytes]:
    """What is drawn is the file and each choice of its changes, so that a fault is told with as few as will do."""
    seeds = strategies.sampled_from(target.sound())
    return strategies.builds(target.mutate, seeds, strategies.randoms(use_true_random=False))
