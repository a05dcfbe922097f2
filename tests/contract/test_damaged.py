"""Python refuses every damaged bundle there is, in a line that says what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
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


def read_tokenizers(bundle: Bundle) -> None:
    with Session.open(bundle, threads=1) as session:
        TextEncoder(session)


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_bundle_is_refused(toy: Path, what: str) -> None:
    damage = DAMAGES[what]
    damage.harm(toy)
    read: Callable[[], object] = partial(Bundle.open, toy)
    if damage.seen != "opening":
        bundle = Bundle.open(toy)
        specs = list(bundle.manifest.shapes[0].graphs.values())
        read = partial(read_graphs, bundle, specs)
        if damage.seen == "tokenizers":
            read()
            read = partial(read_tokenizers, bundle)
    with pytest.raises(TgateError) as error:
        read()
    assert type(error.value) is damage.error
    assert damage.says in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
