"""The command line opens the engine before any work, and says in one line what is wrong with it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.running import Run, fails
from tgate_engine.bundle import Bundle
from tgate_runtime.engines import ENGINES, open_engine


def tgate(*arguments: object, path: Path) -> subprocess.CompletedProcess[str]:
    """``tgate`` where the modules in ``path`` come before those that are installed."""
    return subprocess.run(
        [sys.executable, "-m", "tgate_cli", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(path), *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_an_engine_that_is_broken_is_one_line(good: Path, tmp_path: Path) -> None:
    (tmp_path / "openvino.py").write_text("raise ImportError('libtbb.so.12: cannot open shared object file')")
    done = tgate("bench", good, "--engine", "openvino", "--quiet", path=tmp_path)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert line.startswith("tgate: error: engine openvino ")
    assert "libtbb.so.12" in line


@pytest.mark.parametrize(("engine", "extra"), [("ort-cuda", "cuda"), ("ort-cpu", "cpu"), ("openvino", "openvino")])
def test_what_is_missing_beside_the_engine_comes_with_its_extra(
    good: Path, tmp_path: Path, engine: str, extra: str
) -> None:
    """A bare machine has no tokenizers either; [cpu] would bring the wrong ONNX Runtime for a GPU."""
    for name in ("tokenizers", "onnxruntime", "openvino"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}', name={name!r})")
    for command in ("bench", "verify", "build"):
        done = tgate(command, good, "--engine", engine, "--quiet", path=tmp_path)
        assert f"pip install 'tgate-engine[{extra}]'" in done.stderr, command
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("command", ["generate", "bench", "verify", "build"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--engine", "abacus"], "there is no engine 'abacus'"),
        (["--engine", "ort-cuda"], "has no CUDAExecutionProvider"),
        (["--threads", "10000"], "threads must be a whole number"),
    ],
)
def test_the_engine_is_settled_before_the_bundle_is_read(
    run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, options: list[str], says: str
) -> None:
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("the bundle was opened")

    monkeypatch.setattr(Bundle, "open", opened)
    drawing = ["a cat", "--output", str(tmp_path / "x.png")] if command == "generate" else []
    fails(run(command, good, *drawing, *options, "--quiet"), says)


def test_an_engine_without_compilation_has_nothing_to_build(run: Run, good: Path) -> None:
    status, out, err = run("build", good, "--engine", "openvino", "--quiet")
    assert (status, err) == (0, "")
    assert "compiles nothing ahead of time" in out


def test_every_engine_is_listed(run: Run) -> None:
    status, out, _ = run("engines")
    assert status == 0
    assert all(name in out for name in ENGINES)


def test_the_help_names_the_default_of_memory(run: Run) -> None:
    shown = " ".join(run("bench", "--help")[1].split())
    fast, shared = re.search(r"if left out fast on (.*?), shared on (.*?)(?: --|$)", shown).groups()  # type: ignore[union-attr]
    for name in ("ort-cpu", "openvino", "aoti"):
        default = open_engine(name).options.memory
        assert (name in fast, name in shared) == (default == "fast", default == "shared"), name
    assert all(name.lower() in f"{fast} {shared}".lower() for name in ENGINES)
