"""What a step takes of the host: no memory at all. How long it takes is measured in ``benchmarks/embedding``."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from tests.cpp.library import onnxruntime_library
from tgate_runtime.mini import place_of


@pytest.mark.parametrize(("plan", "images"), [("default", 1), ("ungated", 3)])
def test_a_step_allocates_nothing(cpp_build: Path, plan: str, images: int) -> None:
    words = [cpp_build / "probe-step_cost", place_of("mini"), onnxruntime_library(), plan, images, 3]
    told = json.loads(subprocess.run([*map(str, words)], text=True, capture_output=True, check=True).stdout)
    assert told["steps"] == 2 * 24
    assert told["allocations"] == 0
