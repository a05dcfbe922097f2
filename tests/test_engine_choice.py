"""Which engine is taken: what is missing, too old or broken is one line that says what mends it, before any work."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from tgate_cli import main as cli
from tgate_engine.bundle import Bundle
from tgate_engine.errors import EngineError
from tgate_runtime.backends import ENGINES, EngineOptions, backend, installed, most_threads

ROOT = Path(__file__).resolve().parents[1]
ON_EVERY_HOST = {"pillow", "rich", "tokenizers"}  # what the extras of all engines bring, for prompts and pictures


# --- what an engine needs -----------------------------------------------------------------------


def extras() -> dict[str, dict[str, str]]:
    """The least version of each distribution, by extra."""
    found = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return {extra: dict(re.findall(r"([\w-]+)>=([\d.]+)", "\n".join(lines))) for extra, lines in found.items()}


def test_what_engines_need_is_what_their_extras_bring() -> None:
    brought = extras()
    least = {name: version for extra in brought.values() for name, version in extra.items()}
    for name, engine in ENGINES.items():
        assert brought[engine.extra].keys() - ON_EVERY_HOST <= engine.needs.keys(), name
        assert dict(engine.needs) == {needed: least[needed] for needed in engine.needs}, name


def give_versions(monkeypatch: pytest.MonkeyPatch, given: Mapping[str, str | None]) -> None:
    """As if these versions were installed; None for what is not."""
    version = metadata.version

    def of(name: str) -> str:
        found = given[name] if name in given else version(name)
        if found is None:
            raise metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(metadata, "version", of)


@pytest.mark.parametrize(
    ("engine", "distribution", "version", "least", "extra"),
    [
        ("ort-cpu", "onnxruntime", "1.9.2", "1.31", "cpu"),
        ("ort-cuda", "onnxruntime-gpu", "1.30.9", "1.31", "cuda"),
        ("openvino", "openvino", "2025.4.0-1234-abc", "2026.2", "openvino"),
        ("aoti", "torch", "2.10.0+cu128", "2.11", "aoti"),
    ],
)
def test_an_engine_that_is_too_old(
    monkeypatch: pytest.MonkeyPatch, engine: str, distribution: str, version: str, least: str, extra: str
) -> None:
    give_versions(monkeypatch, {distribution: version})
    says = f"needs {distribution} {least} or later, got {version}: pip install 'tgate-engine[{extra}]'"
    with pytest.raises(EngineError, match=re.escape(says)):
        backend(engine)


def test_a_version_is_compared_by_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("1.31", "1.31.0", "1.100.0.dev20270101", "2.0.0+local.1.2"):
        give_versions(monkeypatch, {"onnxruntime": version})
        assert backend("ort-cpu").name == "ort-cpu"


def test_a_library_that_came_another_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime built from source, or under another of its names, has no distribution that is known here."""
    give_versions(monkeypatch, {"onnxruntime": None, "onnxruntime-gpu": None})
    assert backend("ort-cpu").name == "ort-cpu"


BROKEN = {
    "without a library of its own": (
        "openvino",
        "openvino.py",
        "raise ImportError('libtbb.so.12: cannot open shared object file')",
        "ImportError: libtbb.so.12: cannot open shared object file",
    ),
    "without what it should have": (
        "openvino",
        "openvino.py",
        "__version__ = '2026.4'",
        "cannot import name 'opset13'",
    ),
    "empty": ("ort-cpu", "onnxruntime.py", "", "module 'onnxruntime' has no attribute '__version__'"),
    "not for this processor": (
        "aoti",
        "torch.py",
        "raise OSError('libc10.so: invalid ELF header')",
        "invalid ELF header",
    ),
    "without a half of it": ("ort-cpu", "onnxruntime.py", "import no_such_half", "needs no_such_half, which is not"),
}


def tgate(*arguments: object, path: Path) -> subprocess.CompletedProcess[str]:
    """``tgate`` where the modules in ``path`` come before those that are installed."""
    return subprocess.run(
        [sys.executable, "-m", "tgate_cli.main", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(path), *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("what", BROKEN)
def test_an_engine_that_is_broken_is_one_line(tmp_path: Path, what: str) -> None:
    engine, file, content, says = BROKEN[what]
    (tmp_path / file).write_text(content)
    done = tgate("bench", tmp_path / "nothing", "--engine", engine, "--quiet", path=tmp_path)
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (1, "")
    assert line.startswith(f"tgate: error: engine {engine} ")
    assert says in line
    assert f"pip install 'tgate-engine[{ENGINES[engine].extra}]'" in line


def test_broken_engines_do_not_hide_the_others(tmp_path: Path) -> None:
    for what in ("without a library of its own", "not for this processor"):
        _, file, content, _ = BROKEN[what]
        (tmp_path / file).write_text(content)
    done = tgate("engines", "--json", path=tmp_path)
    found = {entry["name"]: entry["says"] for entry in json.loads(done.stdout)}
    assert list(found) == list(ENGINES)
    assert found["ort-cpu"] == "ready"
    assert "libtbb.so.12" in found["openvino"]
    assert "invalid ELF header" in found["aoti"]


def test_an_engine_without_what_it_uses_later_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    from tgate_runtime.backends import ort

    monkeypatch.setattr(ort, "_one_arena", ort._one_arena.__wrapped__)  # whoever ran before may have made one
    monkeypatch.delattr(onnxruntime, "OrtMemoryInfo")
    with pytest.raises(EngineError, match=r"no attribute 'OrtMemoryInfo'.*tgate-engine\[cpu\]"):
        backend("ort-cpu", memory="shared")


def test_whatever_ails_one_engine_is_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    from tgate_runtime.backends.openvino import OpenVino

    def broken(*_: object) -> None:
        raise RuntimeError("no plugins\nat all")

    monkeypatch.setattr(OpenVino, "__init__", broken)
    found = {entry["name"]: entry["says"] for entry in installed()}
    assert found["openvino"] == "engine openvino failed (RuntimeError: no plugins at all)"
    assert found["ort-cpu"] == "ready"


@pytest.mark.parametrize(("engine", "extra"), [("ort-cuda", "cuda"), ("ort-cpu", "cpu"), ("openvino", "openvino")])
def test_what_is_missing_beside_the_engine_comes_with_its_extra(tmp_path: Path, engine: str, extra: str) -> None:
    """A bare machine has no tokenizers either; [cpu] would bring the wrong ONNX Runtime for a GPU."""
    for name in ("tokenizers", "onnxruntime", "openvino"):
        (tmp_path / f"{name}.py").write_text(f"raise ModuleNotFoundError('No module named {name}', name={name!r})")
    for command in ("bench", "verify", "build"):
        done = tgate(command, tmp_path / "nothing", "--engine", engine, "--quiet", path=tmp_path)
        assert f"pip install 'tgate-engine[{extra}]'" in done.stderr, command
        assert len(done.stderr.splitlines()) == 1


# --- before any work ----------------------------------------------------------------------------


@pytest.mark.parametrize("command", ["generate", "bench", "verify", "build"])
@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--engine", "abacus"], "there is no engine 'abacus'"),
        (["--engine", "ort-cuda"], "has no CUDAExecutionProvider"),
        (["--threads", "100000"], "threads must be a whole number"),
    ],
)
def test_the_engine_is_settled_before_the_bundle_is_read(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: str,
    options: list[str],
    says: str,
) -> None:
    def opened(*_: object, **__: object) -> None:
        raise AssertionError("the bundle was opened")

    monkeypatch.setattr(Bundle, "open", opened)
    drawing = ["a cat", "--output", str(tmp_path / "x.png")] if command == "generate" else []
    assert cli.main([command, str(tmp_path), *drawing, *options, "--quiet"]) == 1
    assert says in capsys.readouterr().err


# --- what may be asked of any engine ------------------------------------------------------------


@pytest.mark.parametrize("threads", [0, -1, 100_000, 10**30, "4", 2.5, True, [1]])
def test_threads_that_cannot_be(threads: Any) -> None:
    says = rf"threads must be a whole number, at least 1 and here at most \d+, got {re.escape(repr(threads))}$"
    with pytest.raises(EngineError, match=says):
        EngineOptions(threads=threads)


@pytest.mark.parametrize(("processors", "most"), [(1, 64), (None, 64), (8, 64), (96, 768)])
def test_the_most_threads_follow_the_machine(
    monkeypatch: pytest.MonkeyPatch, processors: int | None, most: int
) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: processors)
    assert most_threads() == most
    assert EngineOptions(threads=most).threads == most
    with pytest.raises(EngineError, match=f"at most {most}, got {most + 1}"):
        EngineOptions(threads=most + 1)


@pytest.mark.parametrize("device", [-1, 1.0, "0", False])
def test_devices_that_cannot_be(device: Any) -> None:
    with pytest.raises(EngineError, match="a device is a whole number from 0, got"):
        EngineOptions(device=device)


def test_the_help_names_the_default_of_memory(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    fast, shared = re.search(r"if left out fast on (.*?), shared on (.*?)(?: --|$)", shown).groups()  # type: ignore[union-attr]
    for name in ("ort-cpu", "openvino", "aoti"):
        default = backend(name).options.memory
        assert (name in fast, name in shared) == (default == "fast", default == "shared"), name
    assert all(name.lower() in f"{fast} {shared}".lower() for name in ENGINES)
