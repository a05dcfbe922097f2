"""Sequences of calls that nobody would write, made up by ``runtime/cpp/probes/host_sequences.cpp``."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest

from tests import toy_bundle
from tests.cpp.library import onnxruntime_library
from tests.toy_bundle import Toy, build
from tgate_export.methods.base import Settings
from tgate_runtime.mini import place_of

RANGES: Sequence[Sequence[tuple[int, int]]] = (
    [(1, 1)],
    [(1, 4)],
    [(4, 4)],  # calls that are filled up
    [(2, 3)],
    [(1, 1), (4, 4)],
    [(2, 2), (5, 5)],
)


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Toy bundles of every range of :data:`RANGES`, of two methods' settings, with noise in every step."""
    settings = {"default": Settings(steps=8, gate=5, self_interval=2), "short": Settings(steps=5, gate=2)}
    folder = tmp_path_factory.mktemp("toys")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_bundle, "sampler", partial(toy_bundle.sampler, noise=0.3))
        return {
            str(ranges): build(folder / str(i), Toy(batches=ranges, settings=settings), goldens=False)
            for i, ranges in enumerate(RANGES)
        }


def run(program: Path, *words: object, folder: Path) -> str:
    # ONNX Runtime is not instrumented: what it synchronises by itself looks like races inside it.
    (folder / "races.txt").write_text("race:libonnxruntime.so\n")
    (folder / "leaks.txt").write_text("leak:libonnxruntime.so\n")
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=1:detect_stack_use_after_return=1",
        "LSAN_OPTIONS": f"suppressions={folder}/leaks.txt",
        "TSAN_OPTIONS": f"suppressions={folder}/races.txt",
    }
    command = [str(program), *map(str, words)]
    done = subprocess.run(command, text=True, capture_output=True, check=False, env=environment, timeout=900)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert "Sanitizer" not in done.stderr, done.stderr[-6000:]
    return done.stdout


@pytest.mark.parametrize("ranges", [*map(str, RANGES)])
@pytest.mark.parametrize("threads", [1, 3])
def test_whatever_is_called_in_whatever_order(
    cpp_build: Path, toys: dict[str, Path], tmp_path: Path, ranges: str, threads: int
) -> None:
    program = cpp_build / "probe-host_sequences"
    said = run(program, toys[ranges], onnxruntime_library(), 1000, 60, threads, folder=tmp_path)
    compared = int(said.split()[-3])
    assert compared > 5000


@pytest.mark.sanitizers
@pytest.mark.parametrize("preset", ["asan", "tsan"])
def test_the_same_under_sanitizers(
    cpp_preset: Callable[[str], Path], toys: dict[str, Path], tmp_path: Path, preset: str
) -> None:
    program = cpp_preset(preset) / "probe-host_sequences"
    for number, ranges in enumerate(([(1, 4)], [(2, 3)], [(2, 2), (5, 5)])):
        run(program, toys[str(ranges)], onnxruntime_library(), 2000 + 100 * number, 12, 3, folder=tmp_path)


@pytest.mark.sanitizers
@pytest.mark.slow
@pytest.mark.parametrize("ranges", [*map(str, RANGES)])
def test_thousands_of_sequences(
    cpp_preset: Callable[[str], Path], toys: dict[str, Path], tmp_path: Path, ranges: str
) -> None:
    run(
        cpp_preset("asan") / "probe-host_sequences",
        toys[ranges],
        onnxruntime_library(),
        10_000,
        1000,
        2,
        folder=tmp_path,
    )


def test_what_callbacks_throw_and_which_is_heard(cpp_build: Path, tmp_path: Path) -> None:
    assert (
        run(cpp_build / "probe-host_callbacks", place_of("mini"), onnxruntime_library(), folder=tmp_path)
        == "0 faults\n"
    )


def test_memory_that_is_not_there(cpp_preset: Callable[[str], Path], toys: dict[str, Path], tmp_path: Path) -> None:
    """Any allocation may fail: the call says so, and the next finds everything as it should be."""
    program = cpp_preset("test") / "probe-host_memory"  # it has an allocator of its own, as sanitizers have
    said = run(program, toys[str([(1, 4)])], onnxruntime_library(), folder=tmp_path)
    assert int(said.split()[0]) > 300
