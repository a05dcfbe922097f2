"""The bundle ``mini`` with the paper's plan, opened once, what requests are made of, and a server of videos."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import once
from tests.serve.videos import Models, Running, running, write_bundles
from tests.toy_bundle import edit_manifest
from tgate_export.plans import add_plan
from tgate_runtime.mini import place_of
from tgate_runtime.session import Session


@pytest.fixture(scope="package")
def session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    """Of plans that run all graphs: the bundle's own runs what `tgate tune` found to be fastest."""
    place = Path(shutil.copytree(place_of("mini"), tmp_path_factory.mktemp("served") / "mini"))

    def keep(data: dict[str, Any]) -> None:
        del data["plans"]["guidance_stopped"]  # at m = 7
        data["plans"]["default"]["baselines"] = ["ungated"]

    edit_manifest(place, keep)
    add_plan(place, name="default", m=15, k=3, force=True)
    with Session.open(place, threads=1) as opened:
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
