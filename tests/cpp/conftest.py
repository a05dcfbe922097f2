"""libtgate, built once for all processes that run tests at the same time, and bundles opened in it."""

from __future__ import annotations

import functools
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import filelock
import pytest

from tests.cpp.library import Library

ROOT = Path(__file__).parents[2]


@functools.cache
def build(preset: str) -> Path:
    """The folder of a preset of ``runtime/cpp/CMakePresets.json``, built; what was built before is built on."""
    folder = ROOT / "build" / "cpp"
    folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder / ".lock"):
        done = subprocess.run(
            ["make", "--no-print-directory", f"cpp-{preset}"], cwd=ROOT, text=True, capture_output=True, check=False
        )
    assert done.returncode == 0, f"libtgate does not build:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return folder / preset


@pytest.fixture(scope="session")
def cpp_build() -> Path:
    """The folder with ``libtgate.so``, ``tools/tgate-run`` and the programs ``probe-*``."""
    return build(os.environ.get("TGATE_TEST_PRESET", "test"))


@pytest.fixture(scope="session")
def cpp_preset() -> Callable[[str], Path]:
    """The same of any preset."""
    return build


@pytest.fixture(scope="session")
def library(cpp_build: Path) -> Library:
    return Library(cpp_build / "libtgate.so")
