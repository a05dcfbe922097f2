"""How a command ends: the exit status, one line where it failed, and nothing half made."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.running import PROMPT, Run, fails
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
        ["/bin/sh", "-c", f"'{sys.executable}' -m tgate_cli.main inspect '{good}' --json | head -c 10"],
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
