"""Both methods' graphs, plans and refusals; the whole product is ``tests/whole/test_tome.py``."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tgate_engine.errors import MethodError
from tgate_export.attention import AttentionSite
from tgate_export.methods import METHODS, find_method
from tgate_export.methods.base import Network, Settings, settings_of

ALONE, GATED, TGATE = find_method("tome"), find_method("tgate+tome"), find_method("tgate")
SITES = (AttentionSite("down.attn1", "self"), AttentionSite("down.attn2", "cross"))
FINEST = ("down.attn1",)


@given(st.integers(1, 40), st.data())
def test_every_call_merges(steps: int, data: st.DataObject) -> None:
    """Those before the first step among them; under the gate, each is what the gate alone would make."""
    lead_in = data.draw(st.integers(0, 2))
    numbers = [data.draw(st.integers(1, steps)), data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))]
    asked = Settings(
        steps=steps, gate=numbers[0], self_interval=numbers[1], fidelity_interval=numbers[2], merge_ratio=0.5
    )
    assert {call.graph for call in ALONE.program(asked, lead_in)} == {"merged"}
    assert len(ALONE.program(asked, lead_in)) == lead_in + steps
    gated, plain = GATED.program(asked, lead_in), TGATE.program(asked, lead_in)
    names = {"full": "merged", **{name: f"merged_{name}" for name in ("reuse_self", "reuse_cross", "reuse_both")}}
    assert [(call.phase, call.graph) for call in gated] == [(call.phase, names[call.graph]) for call in plain]


@pytest.mark.parametrize("guided", [True, False])
def test_what_graphs_read_and_store(guided: bool) -> None:
    asked = Settings(steps=6, gate=3, fidelity_interval=2, merge_ratio=0.25)
    network = Network(sites=SITES, guided=guided, finest=FINEST)

    def told(method: Any) -> dict[str, Any]:
        return {
            v.name: (v.halves, [n for p in v.parts for n in p.reads], [n for p in v.parts for n in p.writes])
            for v in method.variants(network, asked)
        }

    both = "both" if guided else "positive"
    assert told(ALONE) == {"full": (both, [], []), "merged": (both, [], [])}
    gate = told(TGATE)
    unguided = {"unguided": gate.pop("unguided")} if guided else {}
    wanted = {f"merged_{name}".removesuffix("_full"): graph for name, graph in gate.items()}
    assert list(told(GATED).items()) == list({"full": (both, [], []), **wanted, **unguided}.items())
    for variant in (*ALONE.variants(network, asked), *GATED.variants(network, asked)):
        merges = [type(part).__name__ for part in variant.parts].count("MergeTokens")
        assert merges == variant.name.startswith("merged"), "baselines merge nothing"
        assert not merges or type(variant.parts[0]).__name__ == "MergeTokens", (
            "what it gives is stored, not what it sees"
        )


@pytest.mark.parametrize("method", [ALONE, GATED], ids=["tome", "tgate+tome"])
def test_goldens_walk_every_graph(method: Any) -> None:
    asked = method.settings(steps=25, gate=10 if method.gated else None, defaults={"k": 5, "w": 2})
    assert asked.merge_ratio == 0.5
    graphs = {v.name for v in method.variants(Network(sites=SITES, guided=True, finest=FINEST), asked)}
    assert {call.graph for call in method.program(method.short(asked))} == graphs - {"full", "unguided"}


@pytest.mark.parametrize("method", [ALONE, GATED], ids=["tome", "tgate+tome"])
def test_a_network_without_levels_is_refused(method: Any) -> None:
    with pytest.raises(MethodError, match=r"network has none that is known\. Take another --method") as error:
        method.variants(Network(sites=SITES, guided=True), Settings(steps=6, gate=3, merge_ratio=0.5))
    assert f"method {method.name} merges tokens" in str(error.value)


@pytest.mark.parametrize(
    ("method", "named", "says"),
    [
        (ALONE, {"gate": None, "ratio": 0.0}, "--merge-ratio 0 would change nothing: method tome merges tokens, and"),
        (GATED, {"gate": 3, "ratio": 0.8}, "the merge ratio must be above 0 and at most 0.75: one token of each four"),
        (ALONE, {"gate": None, "ratio": -0.1}, "got -0.1"),
        (ALONE, {"gate": None, "ratio": float("nan")}, "got nan"),
        (TGATE, {"gate": 3, "ratio": 0.5}, "--merge-ratio 0.5 would change nothing: method tgate merges no tokens"),
        (ALONE, {"gate": 3}, "--m 3 would change nothing: method tome has no gate"),
        (ALONE, {"gate": None, "k": 2}, "--k 2 would change nothing: method tome reuses no self-attention"),
        (ALONE, {"gate": None, "r": 2}, "--forecast 2 would change nothing: method tome has no gate from which on"),
        (GATED, {"gate": 3, "c": 2}, "--cache-interval 2 would change nothing"),
    ],
)
def test_what_cannot_be_combined_or_changes_nothing(method: Any, named: dict[str, Any], says: str) -> None:
    with pytest.raises(MethodError) as error:
        method.settings(**named, steps=6, defaults={"k": 5, "w": 2})
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_the_ratio_is_told_and_read_again() -> None:
    asked = GATED.settings(steps=6, gate=3, k=2, ratio=0.3, defaults={})
    assert GATED.facts(asked)["ratio"] == 0.3
    assert settings_of(GATED.facts(asked)) == asked
    assert all("ratio" not in method.facts(Settings(steps=6, gate=3)) for method in METHODS.values())


def test_forecasts_go_together_with_merging_under_a_gate() -> None:
    assert GATED.settings(steps=8, gate=3, r=2, defaults={}).left_out() == (4, 6)
