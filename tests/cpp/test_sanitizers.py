"""The library under the compilers' sanitizers: eight requests at once, and everything that the other tests do to it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cpp.library import onnxruntime_library
from tgate_runtime.mini import place_of

OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=1:strict_string_checks=1:detect_stack_use_after_return=1",
    "UBSAN_OPTIONS": "print_stacktrace=1",
    "LSAN_OPTIONS": "suppressions={folder}/leaks.txt",
    "TSAN_OPTIONS": "suppressions={folder}/races.txt:history_size=4",
}


@pytest.mark.parametrize("preset", ["asan", "tsan"])
def test_eight_requests_at_once(cpp_preset: Callable[[str], Path], tmp_path: Path, preset: str) -> None:
    # ONNX Runtime is not instrumented, so what it synchronises by itself looks like races inside it.
    (tmp_path / "races.txt").write_text("race:libonnxruntime.so\n")
    (tmp_path / "leaks.txt").write_text("leak:libonnxruntime.so\n")
    environment = {**os.environ, **{key: value.format(folder=tmp_path) for key, value in OPTIONS.items()}}
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
