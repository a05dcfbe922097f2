"""The bundle ``mini``, opened once, what requests are made of, and a server of videos."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import once
from tests.serve.videos import Models, Running, running, write_bundles
from tgate_runtime.session import Session


@pytest.fixture(scope="package")
def session() -> Iterator[Session]:
    with Session.open("mini", threads=1) as opened:
        yield opened


@pytest.fixture(scope="package")
def video_bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "served-videos", write_bundles)


@pytest.fixture(scope="package")
def models(video_bundles: Path) -> Iterator[Models]:
    """Two models of videos, for any number of servers in turn."""
    opened = Models(video_bundles)
    yield opened
    opened.close()


@pytest.fixture(scope="package")
def there(models: Models) -> Iterator[Running]:
    """A server of them."""
    with running(models.models) as server:
        yield server
