"""The toy bundle, whole and as a copy to damage."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest

from tests.toy_bundle import Toy, build
from tgate_engine.bundle import Bundle
from tgate_engine.graph import GraphSpec
from tgate_engine.manifest import Manifest
from tgate_export.methods.base import Settings

SIZES = Toy(
    settings={
        "default": Settings(steps=8, gate=5, self_interval=2),
        "fast": Settings(steps=6, gate=3, fidelity_interval=2),
    },
    sizes=((4, 4), (8, 2)),
    batches=((1, 1), (3, 4)),
)
"""Every field of a manifest that can hold several holds several."""


@pytest.fixture(scope="package")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy bundle. Read only."""
    return build(tmp_path_factory.mktemp("contract") / "toy")


@pytest.fixture
def toy(good: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(good, tmp_path / "toy"))


@pytest.fixture(scope="package")
def manifest(good: Path) -> Manifest:
    return Bundle.open(good).manifest


@pytest.fixture(scope="package")
def graphs(manifest: Manifest) -> Mapping[str, GraphSpec]:
    """The toy bundle's."""
    return manifest.shapes[0].graphs


@pytest.fixture(scope="package")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy bundle of two sizes, two ranges of batches and two plans with their baselines. Read only."""
    return build(tmp_path_factory.mktemp("contract") / "large", SIZES)
