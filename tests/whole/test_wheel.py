"""The wheel stands alone: built, installed with `[cpu]` in a bare environment, it draws at once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import tgate_engine
from tgate_cli.main import main

ROOT = Path(__file__).resolve().parents[2]
SOURCES = (
    "LICENSE",
    "README.md",
    "pyproject.toml",
    "tgate_engine",
    "export/tgate_export",
    "runtime/tgate_runtime",
    "serve/tgate_serve",
    "cli/tgate_cli",
)
PROMPT = "a large red circle above a small blue square"
BUILD_LIBRARIES = {"diffusers", "onnx", "onnx-ir", "onnxscript", "torch", "transformers"}


def run(*command: str | Path, cwd: Path) -> str:
    """Runs `command` without this environment's PYTHONPATH and returns what it printed, or fails with it."""
    env = {name: value for name, value in os.environ.items() if name not in {"PYTHONPATH", "PYTHONHOME"}}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, so that the checkout gains no build directory and lends no stale one."""
    tree = tmp_path_factory.mktemp("tree")
    for name in SOURCES:
        source, target = ROOT / name, tree / name
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, target)
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", "dist", ".", cwd=tree)
    (built,) = (tree / "dist").glob("*.whl")
    return built


def pip(python: Path, *arguments: str | Path) -> str:
    """Runs this environment's pip on the environment of `python`, which so needs none of its own."""
    return run(sys.executable, "-m", "pip", "--python", python, *arguments, cwd=python.parent)


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` directory of an environment that holds the wheel with its `[cpu]` extra only."""
    home = tmp_path_factory.mktemp("bare") / "venv"
    venv.create(home, with_pip=False, symlinks=True)
    constraints = ROOT / "constraints.txt"
    pip(home / "bin" / "python", "install", "--quiet", "--no-compile", "-c", constraints, f"{wheel}[cpu]")
    return home / "bin"


def test_the_wheel_holds_every_module_and_the_embedded_model(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    roots = {
        "tgate_engine": ROOT,
        "tgate_export": ROOT / "export",
        "tgate_runtime": ROOT / "runtime",
        "tgate_serve": ROOT / "serve",
        "tgate_cli": ROOT / "cli",
    }
    files = {
        path.relative_to(root).as_posix()
        for package, root in roots.items()
        for path in (root / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert files <= held
    assert {f"{package}/py.typed" for package in roots} <= held
    assert any(name.startswith("tgate_engine/models/") and name.endswith(".safetensors") for name in held)
    assert {name.partition("/")[0] for name in held - files} == {f"tgate_engine-{tgate_engine.__version__}.dist-info"}


def test_a_bare_environment_draws_mini(bare: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a newcomer types after `pip install 'tgate-engine[cpu]'`; the picture is the one that is drawn here."""
    listed = json.loads(pip(bare / "python", "list", "--format=json"))
    installed = {package["name"].lower() for package in listed}
    assert "tgate-engine" in installed
    assert not installed & BUILD_LIBRARIES
    look = "import importlib.util; print(importlib.util.find_spec('torch'))"
    assert run(bare / "python", "-c", look, cwd=tmp_path) == "None\n"

    command = ["generate", "mini", PROMPT, "--seed", "7"]
    for name in ("bare", "here"):
        (tmp_path / name).mkdir()
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path / "bare" / "cache"))
    assert run(bare / "tgate", *command, cwd=tmp_path / "bare") == "mini-0001.png\n"
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path / "here" / "cache"))
    monkeypatch.chdir(tmp_path / "here")
    assert main([*command, "--quiet"]) == 0

    with Image.open(tmp_path / "bare" / "mini-0001.png") as image:
        assert image.format == "PNG"
        assert image.size == (128, 128)
        assert np.asarray(image).std() > 0, "one flat colour"
    pictures = [(tmp_path / name / "mini-0001.png").read_bytes() for name in ("bare", "here")]
    assert pictures[0] == pictures[1]
