"""How a command ends: the exit status, one line where it failed, and nothing half made."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import tgate_engine
from tests.cli.running import PROMPT, Run, fails
from tgate_engine.manifest import MANIFEST_FILE
from tgate_runtime.pipeline import Pipeline


def raising(error: BaseException) -> Callable[..., None]:
    def raise_it(*_: object, **__: object) -> None:
        raise error

    return raise_it


@pytest.mark.parametrize(
    ("error", "status", "says"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (PermissionError(errno.EACCES, "Permission denied", "/x/y"), 1, "/x/y: Permission denied"),
        (RuntimeError("line one\nline two"), 70, "unexpected RuntimeError: line one line two; run with --traceback"),
        (MemoryError(), 70, "unexpected MemoryError"),
    ],
)
def test_endings(
    run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, status: int, says: str
) -> None:
    monkeypatch.setattr(Pipeline, "__call__", raising(error))
    fails(run("generate", good, PROMPT, "--output", tmp_path / "x.png"), says, status=status)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk(run: Run, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line says which directory is full, and nothing is left in it."""
    monkeypatch.setattr(os, "fsync", raising(OSError(errno.ENOSPC, "No space left on device")))
    fails(run("generate", good, PROMPT, "--output", tmp_path / "x.png"), f"there is no space left in {tmp_path}")
    assert list(tmp_path.iterdir()) == []


def test_a_traceback_is_shown_when_asked_for(run: Run, tmp_path: Path) -> None:
    status, _, err = run("inspect", tmp_path / "nothing", "--traceback")
    assert status == 1
    assert "Traceback" in err
    assert err.splitlines()[-1].startswith("tgate: error: ")


def test_a_reader_that_goes_away(good: Path) -> None:
    done = subprocess.run(
        ["/bin/sh", "-c", f"'{sys.executable}' -m tgate_cli inspect '{good}' --json | head -c 10"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == '{\n "model":'[:10]
    assert done.stderr == ""


SLOW = """
import signal, sys, time
from tgate_cli.main import main
from tgate_runtime.pipeline import Pipeline
# Whoever runs the tests in the background of a shell hands down an ignored SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
def wait(*_, **__):
    print("ready", flush=True)
    for _ in range(600):  # a signal that comes just before a sleep is handled after it
        time.sleep(0.1)
Pipeline.__call__ = wait
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.parametrize(
    ("number", "status", "says"), [(signal.SIGTERM, 143, "terminated"), (signal.SIGINT, 130, "interrupted")]
)
def test_signals(good: Path, tmp_path: Path, number: signal.Signals, status: int, says: str) -> None:
    arguments = ["generate", str(good), PROMPT, "--quiet", "--output", str(tmp_path / "x.png")]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    _, err = process.communicate(timeout=30)
    assert process.returncode == status
    assert err == f"tgate: error: {says}\n"
    assert list(tmp_path.iterdir()) == []


# --- at the speed of a word ---------------------------------------------------------------------

HEAVY = "torch", "diffusers", "transformers", "accelerate", "onnx", "onnxruntime", "openvino", "huggingface_hub", "PIL"

WORDS = """
import contextlib, io, json, sys
from tgate_cli.main import export_main, main
heavy, commands = json.loads(sys.argv[1])
for program, arguments in commands:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            status = (main if program == "tgate" else export_main)(arguments)
        except SystemExit as stop:
            status = stop.code
    loaded = sorted(set(heavy) & set(sys.modules))
    print(json.dumps([status, (out.getvalue() + err.getvalue()).splitlines()[-1], loaded]))
"""


def test_nothing_heavy_is_loaded_to_refuse_or_to_tell(good: Path, tmp_path: Path) -> None:
    """In one process, one command after another: what the first one loaded, none would be forgiven for."""
    there = tmp_path / "there"
    there.mkdir()
    sdxl = ["--model", "sdxl"]
    refused: list[tuple[str, list[str], int, str]] = [
        ("tgate-export", ["--model", "sdx"], 1, "did you mean 'sdxl'?"),
        ("tgate-export", [*sdxl, "--m", "30"], 1, "between 1 and the number of steps n = 25, got m = 30"),
        ("tgate-export", [*sdxl, "--output", str(there)], 1, "exists already"),
        ("tgate-export", [*sdxl, "--sampler", "heun"], 1, "calls the network twice"),
        ("tgate-export", [*sdxl, "--method", "foo"], 1, "unknown method 'foo'"),
        ("tgate-export", [*sdxl, "--frames", "3"], 1, "--frames is for video models"),
        ("tgate-export", [*sdxl, "--components", "image"], 1, "--components of sdxl are some of text"),
        ("tgate-export", [*sdxl, "--batch", "4:1"], 1, "got 4:1"),
        ("tgate-export", [*sdxl, "--guidance-rescale", "2"], 1, "--guidance-rescale must be from 0 to 1"),
        ("tgate-export", [*sdxl, "--lora", str(there / "x.safetensors")], 1, "does not exist"),
        ("tgate-export", [*sdxl, "--checkpoint", str(there / "x")], 1, "does not exist"),
        ("tgate-export", [*sdxl, "--output", str(good / MANIFEST_FILE / "b")], 1, "Not a directory"),
        ("tgate-export", ["--model", "svd", "--clip-skip", "1"], 1, "--clip-skip is for models with CLIP"),
        ("tgate", ["embed", "a", "--model", "svd", "--output", str(there / "e.safetensors")], 1, "by an image"),
        ("tgate", ["embed", "a", "--model", "sdxl", "--output", str(there / "d" / "e")], 1, "there is no directory"),
        *(
            ("tgate", ["embed", "a", "--output", str(tmp_path / "e"), *more], 1, says)
            for more, says in (
                ([*sdxl, "--checkpoint", str(there / "x")], "does not exist; --checkpoint wants"),
                (["--model", "mini-pixart", "--clip-skip", "1"], "mini-pixart has none"),
                ([*sdxl, "--clip-skip", "257"], "--clip-skip must be at most 256, got 257"),
            )
        ),
        ("tgate", ["plan", str(good), "--name", "x", "--m", "99"], 1, "got m = 99"),
        *(
            ("tgate", [name, str(there / "none"), *more], 1, "there is no such directory")
            for name, more in {
                "generate": ["a", "--output", "x.png"],
                "verify": [],
                "bench": [],
                "build": [],
                "inspect": [],
            }.items()
        ),
    ]
    names = ("generate", "embed", "inspect", "verify", "bench", "engines", "build", "plan")
    told: list[tuple[str, list[str], int, str]] = [
        *(("tgate", [name, "--help"], 0, "130 interrupted") for name in names),
        *((program, ["--help"], 0, "130 interrupted") for program in ("tgate", "tgate-export")),
        *((program, ["--version"], 0, program) for program in ("tgate", "tgate-export")),
        ("tgate-export", ["--list-models"], 0, "mini-pixart"),
    ]
    commands = [*told, *refused]
    asked = json.dumps([HEAVY, [command[:2] for command in commands]])
    done = subprocess.run(
        [sys.executable, "-c", WORDS, asked],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        env={**os.environ, "COLUMNS": "200"},
    )
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(answers) == len(commands)
    for (program, arguments, status, says), (got, line, loaded) in zip(commands, answers, strict=True):
        assert (got, loaded) == (status, []), (program, arguments, line)
        assert says in line
        if status:
            assert line.startswith(f"{program}: error: ")


@pytest.mark.parametrize("module", ["tgate_engine", "tgate_cli"])
def test_python_runs_it_by_its_name(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == f"tgate {tgate_engine.__version__}\n"


# --- where standard output ends ------------------------------------------------------------------


def words(bundle: object, tmp_path: Path) -> dict[str, list[object]]:
    """A command line of each command that prints something."""
    return {
        "help": ["--help"],
        "help of a command": ["generate", "--help"],
        "version": ["--version"],
        "inspect": ["inspect", bundle],
        "inspect as data": ["inspect", bundle, "--json"],
        "verify": ["verify", bundle],
        "bench": ["bench", bundle, "--repeats", 1, "--warm-ups", 0],
        "engines": ["engines"],
        "build": ["build", bundle],
        "plan": ["plan", bundle, "--name", "x", "--m", 3, "--output", tmp_path / "p.json"],
        "generate": ["generate", bundle, PROMPT, "--output", tmp_path / "x.png"],
        "generate to it": ["generate", bundle, PROMPT, "--output", "-"],
        "export": ["--list-models"],
    }


@pytest.mark.parametrize("name", words("", Path()))
def test_standard_output_that_is_full_is_told_in_a_line(good: Path, tmp_path: Path, name: str) -> None:
    program = "tgate-export" if name == "export" else "tgate"
    start = f"import sys; from tgate_cli.entry import {program.replace('-', '_')} as start; sys.exit(start())"
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-c", start, *map(str, words(good, tmp_path)[name])],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=60,
            check=False,
        )
    says = "standard output cannot be written (No space left on device); send it to where there is room"
    assert done.stderr.splitlines()[-1] == f"{program}: error: {says}"
    assert "Exception" not in done.stderr
    assert done.returncode == 1
