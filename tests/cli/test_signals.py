"""Signals end a command within a second, in the middle of an engine's call too, and leave nothing half made.

Each test is a process of its own, which a signal can hit where it is.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from tests.cli.running import PROMPT
from tests.toy_bundle import edit_manifest
from tgate_engine.bundle import digests_of

SIDE, PRODUCTS = 256, 4000
"""Of matrices, and how many a slow graph makes: minutes of a call, in nodes of a millisecond."""

MAIN = """
import signal, sys
# Whoever runs the tests in the background of a shell hands down an ignored SIGINT.
signal.signal(signal.SIGINT, signal.default_int_handler)
from tgate_cli.main import main
{more}
sys.exit(main())
"""


@pytest.fixture(scope="module")
def slow(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy bundle with graphs that run for minutes and give what they gave."""
    bundle = Path(shutil.copytree(good, tmp_path_factory.mktemp("slow") / "toy"))
    for path in bundle.glob("full*.onnx"):
        model = onnx.load(path, load_external_data=False)
        graph = model.graph
        made = [
            helper.make_node("ReduceSum", [graph.input[0].name], ["slow.sum"], keepdims=0),
            helper.make_node("Sub", ["slow.sum", "slow.sum"], ["slow.zero"]),
            helper.make_node("Expand", ["slow.zero", "slow.shape"], ["slow.0"]),
            *(helper.make_node("MatMul", [f"slow.{i}", f"slow.{i}"], [f"slow.{i + 1}"]) for i in range(PRODUCTS)),
            helper.make_node("ReduceMax", [f"slow.{PRODUCTS}"], ["slow.end"], keepdims=0),
        ]
        output = graph.output[0].name
        last = next(node for node in graph.node if output in node.output)
        last.output[list(last.output).index(output)] = "slow.own"
        made.append(helper.make_node("Add", ["slow.own", "slow.end"], [output]))
        graph.node.extend(made)
        graph.initializer.append(numpy_helper.from_array(np.array([SIDE, SIDE]), "slow.shape"))
        path.write_bytes(model.SerializeToString())
    entries = digests_of(bundle)

    def sign(data: dict[str, dict[str, dict[str, object]]]) -> None:
        for name, entry in data["files"].items():
            entry |= {"sha256": entries[name].sha256, "bytes": entries[name].bytes}

    edit_manifest(bundle, sign)
    return bundle


LIMIT_S = 2
"""A second, and as much again for a busy machine."""

PATIENT = "import tgate_cli.signals; tgate_cli.signals.GRACE_S = 60"
"""Nothing ends hard before the test has failed."""


TOLD = """
import tgate_engine.underway as underway
enter = underway.Cancellable.__enter__
def told(call):
    enter(call)
    print("calling", file=sys.stderr, flush=True)
underway.Cancellable.__enter__ = told
"""
"""A line on stderr for each call of an engine."""


def start(*arguments: object, more: str = "") -> subprocess.Popen[str]:
    script = MAIN.format(more=more)
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def signalled(process: subprocess.Popen[str], says: str, *numbers: signal.Signals) -> tuple[int, str, float]:
    """Wait for a line on stderr that says so, and for the call behind it; send signals: exit status, the last line, and
    how long it took."""
    assert process.stderr is not None
    lines = iter(process.stderr.readline, "")
    assert any(says in line for line in lines)
    time.sleep(0.3)
    begin_s = time.monotonic()
    for number in numbers:
        process.send_signal(number)
        time.sleep(0.05)
    _, err = process.communicate(timeout=30)
    elapsed_s = time.monotonic() - begin_s
    return process.returncode, err.splitlines()[-1] if err else "", elapsed_s


INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize(
    ("command", "number"),
    [
        (["generate", "{}", PROMPT, "--output", "{out}/x.png"], TERM),
        (["bench", "{}", "--trace", "{out}/t.json"], INT),
    ],
    ids=["generate", "bench"],
)
def test_a_call_of_an_engine_is_cancelled(
    slow: Path, tmp_path: Path, command: list[str], number: signal.Signals
) -> None:
    arguments = [text.format(slow, out=tmp_path) for text in command]
    status, line, elapsed_s = signalled(start(*arguments, "--threads", 1, more=PATIENT + TOLD), "calling", number)
    assert (status, line) == (128 + number, f"tgate: error: {'interrupted' if number is INT else 'terminated'}")
    assert elapsed_s < LIMIT_S
    assert list(tmp_path.iterdir()) == []


STUCK = """
import hashlib, pathlib
from tgate_engine.atomic import staging, write_atomically
from tgate_runtime.pipeline import Pipeline
def stuck(*_, **__):
    with staging(pathlib.Path({target!r})) as stage:
        (stage / "half").write_bytes(b"half")
        print("stuck", file=sys.stderr, flush=True)
        hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)  # minutes in C, without Python's lock
Pipeline.__call__ = stuck
"""

KEPT = """
import time, tgate_engine.underway as underway
from tgate_runtime.pipeline import Pipeline
def kept(*_, **__):
    print("kept", file=sys.stderr, flush=True)
    with underway.without_python():
        sum(range(10**10))  # minutes in C, under Python's lock
Pipeline.__call__ = kept
"""


def test_what_cannot_be_cancelled_ends_hard_and_leaves_nothing(good: Path, tmp_path: Path) -> None:
    arguments = ["generate", good, PROMPT, "--quiet", "--output", tmp_path / "x.png"]
    process = start(*arguments, more=STUCK.format(target=str(tmp_path / "b")))
    status, line, elapsed_s = signalled(process, "stuck", TERM)
    assert (status, line) == (143, "tgate: error: terminated")
    assert elapsed_s < LIMIT_S
    assert list(tmp_path.iterdir()) == []


def test_a_second_signal_ends_at_once(good: Path, tmp_path: Path) -> None:
    arguments = ["generate", good, PROMPT, "--quiet", "--output", tmp_path / "x.png"]
    process = start(*arguments, more=PATIENT + STUCK.format(target=str(tmp_path / "b")))
    status, line, elapsed_s = signalled(process, "stuck", INT, INT)
    assert (status, line) == (130, "tgate: error: interrupted")
    assert elapsed_s < LIMIT_S
    assert list(tmp_path.iterdir()) == []


IMPORTS = """
import os, pathlib, time
from tgate_engine.atomic import staging
from tgate_runtime.pipeline import Pipeline
pathlib.Path({folder!r}, "frail.py").write_text('''
import os, sys, time
try:
    print("importing", file=sys.stderr, flush=True)
    time.sleep(60)
except BaseException:
    os.abort()  # as PyTorch does, where native code called back
''')
sys.path.insert(0, {folder!r})
def imports(*_, **__):
    with staging(pathlib.Path({target!r})) as stage:
        (stage / "half").write_bytes(b"half")
        import frail
Pipeline.__call__ = imports
"""


@pytest.mark.parametrize("number", [INT, TERM])
def test_nothing_is_raised_in_the_middle_of_an_import(
    good: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, number: signal.Signals
) -> None:
    arguments = ["generate", good, PROMPT, "--quiet", "--output", tmp_path / "x.png"]
    more = PATIENT + IMPORTS.format(folder=str(tmp_path_factory.mktemp("frail")), target=str(tmp_path / "b"))
    status, line, elapsed_s = signalled(start(*arguments, more=more), "importing", number)
    assert (status, line) == (128 + number, f"tgate: error: {'interrupted' if number is INT else 'terminated'}")
    assert elapsed_s < LIMIT_S
    assert list(tmp_path.iterdir()) == []


def test_a_call_that_keeps_pythons_lock_is_killed(good: Path, tmp_path: Path) -> None:
    arguments = ["generate", good, PROMPT, "--quiet", "--output", tmp_path / "x.png"]
    status, _, elapsed_s = signalled(start(*arguments, more=KEPT), "kept", INT)
    assert status == -INT  # which a shell counts as 130 too
    assert elapsed_s < LIMIT_S
