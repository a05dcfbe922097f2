"""The toy bundle, loaded with every graph there is."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtime.pictures import EVERY_GRAPH
from tests.toy_bundle import Toy, build
from tgate_runtime.session import Session


@pytest.fixture(scope="package")
def toy_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy bundle whose plans run every graph. Read only."""
    return build(tmp_path_factory.mktemp("runtime") / "toy", Toy(settings=EVERY_GRAPH))


@pytest.fixture(scope="package")
def session(toy_path: Path) -> Iterator[Session]:
    with Session.open(toy_path, threads=1, memory="fast") as opened:
        yield opened
