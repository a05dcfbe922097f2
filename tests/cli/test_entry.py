"""Signals that come before a command runs: from the program's first statement on, none is answered by a traceback."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.running import PROMPT

INT, TERM = signal.SIGINT, signal.SIGTERM
ENTRIES: dict[str, list[str]] = {
    "python -m tgate_engine": ["-m", "tgate_engine"],
    "python -m tgate_cli": ["-m", "tgate_cli"],
    "tgate": ["-c", "import sys; from tgate_cli.entry import tgate; sys.exit(tgate())"],
    "tgate-export": ["-c", "import sys; from tgate_cli.entry import tgate_export; sys.exit(tgate_export())"],
}
HEEDING = ["env", "--default-signal=INT"]
"""Whoever runs the tests in the background of a shell hands down an ignored SIGINT."""

MOMENTS, SPAN_S = 12, 0.6
"""How often, and over how long."""


def caught(process: subprocess.Popen[str], number: int) -> bool:
    """Whether a signal is answered by the process itself, which the system knows."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    mask = next(line for line in status.splitlines() if line.startswith("SigCgt:"))
    return bool(int(mask.split()[1], 16) >> (number - 1) & 1)


def await_entry(process: subprocess.Popen[str]) -> None:
    """Until Python has taken SIGINT, as it does when it starts, and the program has given it back."""
    deadline_s = time.monotonic() + 30
    for wanted in (True, False):
        while caught(process, signal.SIGINT) != wanted:
            assert process.poll() is None, "it ended"
            assert time.monotonic() < deadline_s
    assert process.poll() is None, "SIGINT raised an exception up to the end"


@pytest.mark.parametrize("name", ENTRIES)
def test_a_signal_at_any_moment_is_no_traceback(good: Path, tmp_path: Path, name: str) -> None:
    """From the program's first statement on: by the system's default, or with our line; and nothing is left."""
    arguments = ["generate", str(good), PROMPT, "--seed", "1", "--quiet", "--output", str(tmp_path / "x.png")]
    if name == "tgate-export":
        arguments = ["--model", "mini-sdxl", "--output", str(tmp_path / "b"), "--quiet"]
    ends = set()
    for moment in range(MOMENTS):
        process = subprocess.Popen(
            [*HEEDING, sys.executable, *ENTRIES[name], *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        await_entry(process)
        time.sleep(SPAN_S * moment / MOMENTS)
        number = (INT, TERM)[moment % 2]
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
        said = "interrupted" if number is INT else "terminated"
        ending = (process.returncode, err)
        if out:  # it was faster
            (tmp_path / "x.png").unlink()
            continue
        program = "tgate-export" if name == "tgate-export" else "tgate"
        assert ending in ((-number, ""), (128 + number, f"{program}: error: {said}\n")), moment
        ends.add(process.returncode)
        for left in tmp_path.iterdir():  # it came between the picture and the line that names it: the picture is whole
            assert left.name == "x.png"
            with Image.open(left) as picture:
                picture.load()
            left.unlink()
    assert ends & {-INT, -TERM}, "the first comes before anything is imported"


def test_who_ignores_a_signal_goes_on_ignoring_it() -> None:
    """As a shell has it for what runs in its background."""
    asks = "import signal, tgate_cli.entry as e; e._by_default(); print(signal.getsignal(signal.SIGINT).name)"
    for how, left in ((["env", "--ignore-signal=INT"], "SIG_IGN"), (HEEDING, "SIG_DFL")):
        command = [*how, sys.executable, "-c", asks]
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        assert done.stdout == f"{left}\n"
