"""What the C++ compiler makes is kept where it can be loaded beside PyTorch."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tgate_engine.errors import EngineError
from tgate_runtime.engines.aoti.inductor import LIBRARY, keep

SOURCE = """#include <regex>
extern "C" bool matches(const char* text) { return std::regex_match(text, std::regex("(cpu|cuda)(:([0-9]+))?")); }
"""


def made(folder: Path, *flags: str) -> Path:
    source, library = folder / "made.cpp", folder / "made.so"
    source.write_text(SOURCE)
    compiler = os.environ.get("CXX", "g++")
    subprocess.run([compiler, "-O0", "-shared", "-fPIC", *flags, "-o", str(library), str(source)], check=True)
    return library


def test_a_library_that_uses_the_shared_one_is_kept(tmp_path: Path) -> None:
    (tmp_path / "entry").mkdir()
    keep([str(made(tmp_path))], tmp_path / "entry")
    assert (tmp_path / "entry" / LIBRARY).stat().st_size > 0


def test_a_library_with_a_c_plus_plus_library_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"^the C\+\+ compiler links .+ of its own .+: install the shared one"):
        keep([str(made(tmp_path, "-static-libstdc++"))], tmp_path)
