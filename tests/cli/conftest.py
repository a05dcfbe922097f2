"""The toy bundle, and the command line in this process."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.cli.running import Run
from tests.toy_bundle import Toy, build
from tgate_cli import main as cli
from tgate_export.methods.base import Settings


@pytest.fixture(scope="package")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy bundle. Read only."""
    return build(tmp_path_factory.mktemp("cli") / "toy")


@pytest.fixture(scope="package")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of two sizes and two gated plans. Read only."""
    settings = {"default": Settings(steps=8, gate=5, self_interval=2), "early": Settings(steps=8, gate=2)}
    toy = Toy(sizes=((4, 4), (8, 2)), settings=settings)
    return build(tmp_path_factory.mktemp("sizes") / "toy", toy, goldens=False)


@pytest.fixture
def toy(good: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(good, tmp_path / "toy"))


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    def tgate(*arguments: object, main: Callable[[Sequence[str]], int] = cli.main) -> tuple[int, str, str]:
        try:
            status = main([str(a) for a in arguments])
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else 1
        out, err = capfd.readouterr()
        return status, out, err

    return tgate
