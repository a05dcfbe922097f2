"""The bundle ``mini``, opened once, and what requests are made of."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tgate_runtime.session import Session


@pytest.fixture(scope="package")
def session() -> Iterator[Session]:
    with Session.open("mini", threads=1) as opened:
        yield opened
