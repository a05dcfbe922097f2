"""libtgate under the compilers' sanitizers: eight requests at once, and the tests of the C ABI."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cpp.library import onnxruntime_library
from tgate_runtime.mini import place_of

pytestmark = pytest.mark.sanitizers
ROOT = Path(__file__).parents[2]
SUITE = ("test_abi.py", "test_requests.py", "test_damaged.py")
"""What does wrong things to the library on purpose."""


@pytest.mark.parametrize("preset", [pytest.param("asan", marks=pytest.mark.slow), "tsan"])
def test_eight_requests_at_once(cpp_preset: Callable[[str], Path], tmp_path: Path, preset: str) -> None:
    # ONNX Runtime is not instrumented: what it synchronises by itself looks like races inside it.
    (tmp_path / "races.txt").write_text("race:libonnxruntime.so\n")
    (tmp_path / "leaks.txt").write_text("leak:libonnxruntime.so\n")
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=1:detect_stack_use_after_return=1",
        "LSAN_OPTIONS": f"suppressions={tmp_path}/leaks.txt",
        "TSAN_OPTIONS": f"suppressions={tmp_path}/races.txt",
    }
    program = cpp_preset(preset) / "probe-host_threads"
    done = subprocess.run(
        [program, place_of("mini"), onnxruntime_library(), "8"],
        text=True,
        capture_output=True,
        check=False,
        env=environment,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    assert len(done.stdout.splitlines()) == 8
    assert "Sanitizer" not in done.stderr, done.stderr[-6000:]


@pytest.mark.slow  # what the others draw and libFuzzer makes up is read under AddressSanitizer in any case
def test_the_tests_of_the_abi_pass_under_them(cpp_preset: Callable[[str], Path], tmp_path: Path) -> None:
    """In a Python of their own that has the sanitizer's runtime from the start."""
    cpp_preset("asan")
    # The second, or it finds nothing to pass exceptions on to.
    names = ("libasan.so", "libstdc++.so")
    finds = [["gcc", f"-print-file-name={name}"] for name in names]
    found = [subprocess.run(find, text=True, capture_output=True, check=True).stdout.strip() for find in finds]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST_")} | {
        "LD_PRELOAD": " ".join(found),
        "ASAN_OPTIONS": "detect_leaks=0",  # of Python's own there are many; the other test looks for ours
        "TGATE_TEST_PRESET": "asan",
    }
    files = [str(ROOT / "tests/cpp" / name) for name in SUITE]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", f"--basetemp={tmp_path}/own", *files],
        text=True,
        capture_output=True,
        check=False,
        env=environment,
        cwd=ROOT,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "runtime error" not in done.stderr
