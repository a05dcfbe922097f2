"""The paper's findings on the embedded models: the rules of its trajectories, and the page of results."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from benchmarks.paper.ageing import WAYS, Age, Aged
from benchmarks.paper.eager import NULL, PROMPT, Eager, Kept, Step
from benchmarks.paper.page import MODELS, RESULTS, ROOT, page
from benchmarks.paper.trajectories import prompt_first, prompt_last, self_cached_first, self_cached_last, standard
from training.frechet import frechet

N = 25


def _walk(rule: object) -> list[tuple[str, ...]]:
    """The halves that the rule asks for at each step."""
    asked: list[tuple[str, ...]] = []
    for i in range(N):
        names: list[str] = []

        def half(name: str, names: list[str] = names) -> torch.Tensor:
            names.append(name)
            return torch.tensor({NULL: 1.0, PROMPT: 2.0}[name])

        assert callable(rule)
        rule(Step(i=i, level=1.0, scale=5.0, half=half))
        asked.append(tuple(sorted(names)))
    return asked


def test_the_trajectories_have_the_prompt_where_the_paper_says() -> None:
    both = (NULL, PROMPT)
    assert _walk(standard) == [both] * N
    assert _walk(prompt_first(10)) == [both] * 10 + [(NULL,)] * 15
    assert _walk(prompt_last(10)) == [(NULL,)] * 10 + [both] * 15


def test_self_attention_is_cached_on_one_side_of_the_gate() -> None:
    kept = Kept.__new__(Kept)  # its model is not asked
    for rule, reused in (
        (self_cached_last(10, 3, kept), [i for i in range(10, N) if (i - 10) % 3]),
        (self_cached_first(10, 3, kept), [4, 5, 7, 8]),
    ):
        seen = []
        for i in range(N):
            rule(Step(i=i, level=1.0, scale=5.0, half=lambda name: torch.zeros(())))
            seen += [i] if kept.reuse else []
        assert seen == reused


def test_equation_2_and_what_is_kept_of_it() -> None:
    """The prompt's half is 2, the null one 1, guidance 5: 6; after the gate the difference is added to another 2."""

    def half(name: str) -> torch.Tensor:
        return torch.tensor({NULL: 1.0, PROMPT: 2.0}[name])

    assert float(Step(i=0, level=1.0, scale=5.0, half=half).guided()) == 6.0
    aged = Aged(1, WAYS["constant in noise"], refresh=2)
    got = [float(aged(Step(i=i, level=1.0, scale=5.0, half=half))) for i in range(4)]
    assert got == [6.0] * 4
    assert [aged.computes_both(i) for i in range(6)] == [True, False, True, False, True, False]


def test_the_ways_of_ageing() -> None:
    age = Age(last=torch.tensor(2.0), before=torch.tensor(1.5), steps=3, level=0.5, level_then=2.0)
    got = {name: float(way(age)) for name, way in WAYS.items()}
    assert got == {
        "constant in noise": 2.0,
        "constant in x0": 8.0,  # x0 = x/alpha - (sigma/alpha) e: a constant part of it weighs more in e as noise falls
        "fading with the noise": 0.5,
        "extrapolated": 3.5,
    }


def test_a_kept_module_gives_what_it_gave_to_its_own_half() -> None:
    eager = Eager("mini-pixart")
    kept = Kept(eager)
    name, module = next(iter(eager.attentions("self").items()))
    states = torch.randn(1, 64, 192, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), kept.attached("self"):
        given = {}
        for half in (PROMPT, NULL):
            eager.running = half
            given[half] = module(states + (half == NULL))
        kept.reuse = True
        for half in (PROMPT, NULL):
            eager.running = half
            assert torch.equal(module(states * 0), given[half]), name
    kept.reuse = False
    with torch.no_grad():
        assert not torch.equal(module(states * 0), given[NULL])


def test_the_frechet_distance_of_gaussians_is_the_formula() -> None:
    """Of N(0, 1) and N(3, 4) in each of two dimensions: 2 (9 + (2 - 1)^2)."""
    rng = np.random.default_rng(5)
    a, b = rng.standard_normal((20_000, 2)), 3 + 2 * rng.standard_normal((20_000, 2))
    assert frechet(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet(a, b) == pytest.approx(20, rel=0.03)


def test_the_page_is_that_of_the_saved_results() -> None:
    found = {model: json.loads((RESULTS / f"paper-{model}.json").read_text()) for model in MODELS}
    assert (ROOT / "docs/paper.md").read_text() == page(found)
