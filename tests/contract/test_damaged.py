"""Python refuses every damaged bundle there is, in a line that says what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.damaged import DAMAGES, FIELDS, FILES, GRAPHS, PLANS, TEXTS, TOKENIZERS
from tgate_engine.bundle import Bundle
from tgate_engine.errors import TgateError
from tgate_runtime.graph_check import read_graphs
from tgate_runtime.session import Session
from tgate_runtime.text import TextEncoder


def test_no_two_damages_have_one_name() -> None:
    assert len(DAMAGES) == sum(map(len, (FILES, TEXTS, FIELDS, PLANS, GRAPHS, TOKENIZERS)))


def use(path: Path, seen: str) -> None:
    """Open a bundle, and do with it what shows the damage."""
    bundle = Bundle.open(path)
    read_graphs(bundle, [*bundle.manifest.shapes[0].graphs.values()])
    if seen == "tokenizers":
        with Session.open(bundle, threads=1) as session:
            TextEncoder(session)


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_bundle_is_refused(toy: Path, what: str) -> None:
    damage = DAMAGES[what]
    damage.harm(toy)
    if damage.seen != "opening":  # or it would not get that far
        Bundle.open(toy)
    with pytest.raises(TgateError) as error:
        use(toy, damage.seen)
    assert type(error.value) is damage.error
    assert damage.says in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
