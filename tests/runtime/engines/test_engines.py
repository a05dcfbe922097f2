"""Which engine is opened: what is missing, too old or broken is one line that says what mends it."""

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

import onnxruntime
import pytest

from tgate_engine.errors import EngineError
from tgate_runtime.engines import ENGINES, installed, open_engine, ort
from tgate_runtime.engines.openvino import OpenVino

ROOT = Path(__file__).resolve().parents[3]
ON_EVERY_HOST = {"pillow", "rich", "tokenizers"}  # what the extras of all engines bring, for prompts and pictures


def test_engines_by_name() -> None:
    assert list(ENGINES) == ["ort-cpu", "ort-cuda", "openvino", "aoti", "tensorrt"]
    engine = open_engine("ort-cpu", threads=2)
    assert (engine.name, engine.version, engine.options.threads) == ("ort-cpu", onnxruntime.__version__, 2)
    with pytest.raises(EngineError, match="there is no engine 'abacus'; the engines are ort-cpu, ort-cuda, "):
        open_engine("abacus")


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("ort-cpu", {"threads": 0}, "threads must be a whole number"),
        ("openvino", {"device": 3}, "engine openvino runs on the CPU; leave out --device and --architecture"),
        ("ort-cpu", {"architecture": "sm_90"}, "engine ort-cpu runs on the CPU; leave out --device and --architecture"),
    ],
)
def test_options_that_cannot_be_followed(name: str, options: Any, says: str) -> None:
    with pytest.raises(EngineError, match=says):
        open_engine(name, **options)


# --- what an engine needs -----------------------------------------------------------------------


def extras() -> dict[str, dict[str, str]]:
    """The least version of each distribution, by extra."""
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return {extra: dict(re.findall(r"([\w-]+)>=([\d.]+)", "\n".join(lines))) for extra, lines in tables.items()}


def test_what_engines_need_is_what_their_extras_bring() -> None:
    brought = extras()
    least = {name: version for extra in brought.values() for name, version in extra.items()}
    for name, entry in ENGINES.items():
        assert brought[entry.extra].keys() - ON_EVERY_HOST <= entry.needs.keys(), name
        assert dict(entry.needs) == {distribution: least[distribution] for distribution in entry.needs}, name


def pretend(monkeypatch: pytest.MonkeyPatch, versions: Mapping[str, str | None]) -> None:
    """As if these versions were installed; None for what is not."""
    version = metadata.version

    def of(name: str) -> str:
        pretended = versions[name] if name in versions else version(name)
        if pretended is None:
            raise metadata.PackageNotFoundError(name)
        return pretended

    monkeypatch.setattr(metadata, "version", of)


@pytest.mark.parametrize(
    ("name", "distribution", "version", "least", "extra"),
    [
        ("ort-cpu", "onnxruntime", "1.9.2", "1.31", "cpu"),
        ("ort-cuda", "onnxruntime-gpu", "1.30.9", "1.31", "cuda"),
        ("openvino", "openvino", "2025.4.0-1234-abc", "2026.2", "openvino"),
        ("aoti", "torch", "2.10.0+cu128", "2.11", "aoti"),
    ],
)
def test_an_engine_that_is_too_old(
    monkeypatch: pytest.MonkeyPatch, name: str, distribution: str, version: str, least: str, extra: str
) -> None:
    pretend(monkeypatch, {distribution: version})
    says = f"needs {distribution} {least} or later, got {version}: pip install 'tgate-engine[{extra}]'"
    with pytest.raises(EngineError, match=re.escape(says)):
        open_engine(name)


def test_a_version_is_compared_by_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    for version in ("1.31", "1.31.0", "1.100.0.dev20270101", "2.0.0+local.1.2"):
        pretend(monkeypatch, {"onnxruntime": version})
        assert open_engine("ort-cpu").name == "ort-cpu"


def test_a_library_that_came_another_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime built from source, or under another of its names, has no distribution that is known here."""
    pretend(monkeypatch, {"onnxruntime": None, "onnxruntime-gpu": None})
    assert open_engine("ort-cpu").name == "ort-cpu"


@pytest.mark.parametrize(
    ("name", "module", "library", "extra"),
    [("ort-cpu", "ort", "onnxruntime", "cpu"), ("openvino", "openvino", "openvino", "openvino")],
)
def test_an_engine_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, name: str, module: str, library: str, extra: str
) -> None:
    monkeypatch.delitem(sys.modules, f"tgate_runtime.engines.{module}")
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(EngineError, match=rf"needs {library}, .* pip install 'tgate-engine\[{extra}\]'"):
        open_engine(name)


# --- what is broken -----------------------------------------------------------------------------

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


def python(code: str, path: Path) -> str:
    """What that code prints where the modules in ``path`` come before those that are installed."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(path), *sys.path])},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    return done.stdout


@pytest.mark.parametrize("what", BROKEN)
def test_an_engine_that_is_broken_is_one_line(tmp_path: Path, what: str) -> None:
    name, file, content, says = BROKEN[what]
    (tmp_path / file).write_text(content)
    code = f"""
from tgate_engine.errors import EngineError
from tgate_runtime.engines import open_engine
try:
    open_engine({name!r})
except EngineError as error:
    print(error)
"""
    (line,) = python(code, tmp_path).splitlines()
    assert line.startswith(f"engine {name} ")
    assert says in line
    assert f"pip install 'tgate-engine[{ENGINES[name].extra}]'" in line


def test_broken_engines_do_not_hide_the_others(tmp_path: Path) -> None:
    for what in ("without a library of its own", "not for this processor"):
        _, file, content, _ = BROKEN[what]
        (tmp_path / file).write_text(content)
    code = "import json; from tgate_runtime.engines import installed; print(json.dumps(installed()))"
    says = {entry["name"]: entry["says"] for entry in json.loads(python(code, tmp_path))}
    assert list(says) == list(ENGINES)
    assert says["ort-cpu"] == "ready"
    assert "libtbb.so.12" in says["openvino"]
    assert "invalid ELF header" in says["aoti"]


def test_an_engine_without_what_it_uses_later_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ort, "_one_arena", ort._one_arena.__wrapped__)  # whoever ran before may have made one
    monkeypatch.delattr(onnxruntime, "OrtMemoryInfo")
    with pytest.raises(EngineError, match=r"no attribute 'OrtMemoryInfo'.*tgate-engine\[cpu\]"):
        open_engine("ort-cpu", memory="shared")


def test_whatever_ails_one_engine_is_its_own_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no plugins\nat all")

    monkeypatch.setattr(OpenVino, "__init__", broken)
    says = {entry["name"]: entry["says"] for entry in installed()}
    assert says["openvino"] == "engine openvino failed (RuntimeError: no plugins at all)"
    assert says["ort-cpu"] == "ready"


def test_every_engine_has_a_row() -> None:
    rows = {entry["name"]: entry for entry in installed()}
    assert list(rows) == list(ENGINES)
    assert rows["ort-cpu"] == {
        "name": "ort-cpu",
        "runs_on": "CPU",
        "version": onnxruntime.__version__,
        "says": "ready",
    }
    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        assert rows["ort-cuda"]["version"] == ""
        assert "has no CUDAExecutionProvider" in rows["ort-cuda"]["says"]
