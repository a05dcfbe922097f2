"""Which graph each call runs, what each graph reads and stores, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tgate_engine.errors import MethodError
from tgate_export.attention import AttentionSite
from tgate_export.methods import find_method
from tgate_export.methods.base import Halves, Network, Settings

ALONE, GATED = find_method("deepcache"), find_method("tgate+deepcache")
SITES = (AttentionSite("a.attn1", "self"), AttentionSite("a.attn2", "cross"))


def network(*, guided: bool = True, after_gate: Halves = "negative") -> Network:
    return Network(sites=SITES, guided=guided, after_gate=after_gate, deep="up.1")


@st.composite
def settings(draw: st.DrawFn) -> tuple[Settings, int]:
    """Settings, and a sampler's calls before the first step."""
    steps = draw(st.integers(1, 60))
    gate, interval = draw(st.integers(1, steps)), draw(st.integers(1, 9))
    return Settings(steps=steps, gate=gate, warm_up=0, cache_interval=interval), draw(st.integers(0, 2))


@given(settings())
def test_every_cth_call_is_a_full_one(numbers: tuple[Settings, int]) -> None:
    asked, lead_in = numbers
    program = ALONE.program(asked, lead_in)
    graphs = [call.graph for call in program]
    assert len(graphs) == lead_in + asked.steps
    full = {i for i, graph in enumerate(graphs) if graph == "full"}
    assert full == {*range(lead_in), *range(lead_in, lead_in + asked.steps, asked.cache_interval)}
    assert {call.phase for call in program} == {"semantics-planning"}


@given(settings())
def test_the_interval_begins_anew_at_the_gate(numbers: tuple[Settings, int]) -> None:
    asked, lead_in = numbers
    gate, interval = lead_in + asked.gate, asked.cache_interval
    graphs = [call.graph for call in GATED.program(asked, lead_in)]
    before, after = graphs[:gate], graphs[gate:]
    assert set(before) <= {"full", "shallow"}
    assert set(after) <= {"reuse_cross", "shallow_reuse_cross"}
    full = {i for i, graph in enumerate(before) if graph == "full"}
    assert full == {*range(lead_in), *range(lead_in, gate, interval), gate - 1}, "the gate step is among them"
    assert [i for i, graph in enumerate(after) if graph == "reuse_cross"] == list(range(0, len(after), interval))


@pytest.mark.parametrize(
    ("guided", "after_gate", "graphs"),
    [
        (
            True,
            "negative",
            [
                ("full", "both", [], ["cross.0", "deep_feature"]),
                ("shallow", "both", ["deep_feature"], []),
                ("reuse_cross", "negative", ["cross.0"], ["deep_feature.negative"]),
                ("shallow_reuse_cross", "negative", ["cross.0", "deep_feature.negative"], []),
                ("unguided", "positive", [], []),
            ],
        ),
        (
            True,
            "positive",
            [
                ("full", "both", [], ["cross.0", "deep_feature"]),
                ("shallow", "both", ["deep_feature"], []),
                ("reuse_cross", "positive", ["cross.0"], ["deep_feature.positive"]),
                ("shallow_reuse_cross", "positive", ["cross.0", "deep_feature.positive"], []),
                ("unguided", "positive", [], []),
            ],
        ),
        (
            False,
            "negative",
            [
                ("full", "positive", [], ["cross.0", "deep_feature"]),
                ("shallow", "positive", ["deep_feature"], []),
                ("reuse_cross", "positive", ["cross.0"], ["deep_feature"]),
                ("shallow_reuse_cross", "positive", ["cross.0", "deep_feature"], []),
            ],
        ),
    ],
)
def test_what_graphs_read_and_store(guided: bool, after_gate: Halves, graphs: list[Any]) -> None:
    asked = Settings(steps=6, gate=3, cache_interval=2)

    def told(method: Any) -> list[Any]:
        return [
            (v.name, v.halves, [n for p in v.parts for n in p.reads], [n for p in v.parts for n in p.writes])
            for v in method.variants(network(guided=guided, after_gate=after_gate), asked)
        ]

    assert told(GATED) == graphs
    halves = "both" if guided else "positive"
    assert told(ALONE) == [("full", halves, [], ["deep_feature"]), ("shallow", halves, ["deep_feature"], [])]


@pytest.mark.parametrize("method", [ALONE, GATED], ids=["deepcache", "tgate+deepcache"])
def test_goldens_walk_every_graph(method: Any) -> None:
    short = method.short(Settings(steps=25, gate=10, cache_interval=3))
    walked = {call.graph for call in method.program(short)}
    assert walked == {v.name for v in method.variants(network(), short)} - {"unguided"}


@pytest.mark.parametrize("method", [ALONE, GATED], ids=["deepcache", "tgate+deepcache"])
def test_a_network_without_skip_connections_is_refused(method: Any) -> None:
    with pytest.raises(MethodError, match=r"this network has none that are known\. Take another --method") as error:
        method.variants(Network(sites=SITES, guided=True), Settings(steps=6, gate=3))
    assert f"method {method.name} keeps" in str(error.value)


@pytest.mark.parametrize(
    ("method", "named", "says"),
    [
        (
            ALONE,
            {"steps": 25, "gate": None, "c": 1},
            "method deepcache with c = 1 caches nothing at n = 25:",
        ),
        (ALONE, {"steps": 1, "gate": None}, "caches nothing at n = 1:"),
        (GATED, {"steps": 3, "gate": 2}, "caches nothing at n = 3, m = 2:"),
        (GATED, {"steps": 25, "gate": 10, "c": 1}, "take a --cache-interval of 2 or more, and enough --steps"),
        (
            ALONE,
            {"steps": 25, "gate": None, "c": 26},
            "--cache-interval 26 of method deepcache makes the same calls as 25",
        ),
        (GATED, {"steps": 6, "gate": 3, "c": 1000}, "makes the same calls as 999 at n = 6, m = 3; take a smaller one"),
        (ALONE, {"steps": 25, "gate": None, "r": 2}, "--forecast 2 and method deepcache don't go together"),
        (GATED, {"steps": 25, "gate": 10, "r": 2}, "--forecast 2 and method tgate+deepcache don't go together"),
        (ALONE, {"steps": 25, "gate": None, "k": 2}, "--k 2 would change nothing"),
        (GATED, {"steps": 25, "gate": 10, "k": 2}, "--k 2 would change nothing"),
        (GATED, {"steps": 25, "gate": 10, "w": 1}, "--warm-up 1 would change nothing"),
        (GATED, {"steps": 25, "gate": 10, "f": 2}, "--fidelity-interval 2 would change nothing"),
    ],
)
def test_what_cannot_be_combined_or_changes_nothing(method: Any, named: dict[str, Any], says: str) -> None:
    with pytest.raises(MethodError) as error:
        method.settings(**named, defaults={"k": 5, "w": 2})
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_the_papers_totals() -> None:
    """Table 5, in tera-MACs: what a shallow call costs follows from the first figure and c = 3, the second from that.

    The paper names no m; of all there are, 13 alone gives its figure.
    """
    alone, gated = 57.888, 43.868
    cost = {"full": 149.438 / 25, "reuse_cross": (100.688 - 149.438 / 25 * 10) / 15}  # Table 2
    graphs = [call.graph for call in ALONE.program(Settings(steps=25, gate=25, cache_interval=3))]
    cost["shallow"] = (alone - graphs.count("full") * cost["full"]) / graphs.count("shallow")
    cost["shallow_reuse_cross"] = cost["shallow"] / 2  # SDXL's last layers attend to nothing: half of a batch is left

    def total(gate: int) -> float:
        asked = Settings(steps=25, gate=gate, warm_up=0, cache_interval=3)
        return sum(cost[call.graph] for call in GATED.program(asked))

    assert total(13) == pytest.approx(gated, abs=0.005)
    assert [m for m in range(1, 26) if abs(total(m) - gated) < 0.5] == [13]
