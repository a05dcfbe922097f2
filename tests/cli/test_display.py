"""What a command shows its user while it works."""

from __future__ import annotations

import io
import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

from tests.toy_bundle import build
from tgate_cli.display import Display, Lines, reporter
from tgate_engine.report import Reporter, Silent


def speak(report: Reporter) -> None:
    report.stage("first [stage]")
    report.progress(1, 3, "one")
    report.note("a note")
    report.warn("a warning")
    report.progress(3, 3)
    report.stage("second")


def test_lines_are_plain_and_few() -> None:
    out = io.StringIO()
    report = Lines(out)
    speak(report)
    for done in range(1000):
        report.progress(done, 1000)
    assert out.getvalue().splitlines() == ["first [stage]", "a note", "tgate: warning: a warning", "second"]


def test_lines_tell_of_progress_now_and_then() -> None:
    out = io.StringIO()
    report = Lines(out, interval_s=0)
    report.progress(1, 3, "one")
    report.progress(2, 3)
    assert out.getvalue() == "  1/3 one\n  2/3\n"


def test_without_a_terminal_lines_are_chosen(capsys: pytest.CaptureFixture[str]) -> None:
    with reporter() as report:
        assert isinstance(report, Lines)
        speak(report)
    with reporter(quiet=True) as report:
        assert isinstance(report, Silent)
    out, err = capsys.readouterr()
    assert out == ""
    assert "first [stage]" in err


def test_at_a_terminal_results_still_go_to_stdout(tmp_path: Path) -> None:
    """stderr is a terminal and shows a live display; stdout is a file and holds the results alone."""
    bundle = build(tmp_path / "toy")
    mine, theirs = pty.openpty()
    arguments = ["bench", str(bundle), "--repeats", "1", "--threads", "1", "--json"]
    with (tmp_path / "out.json").open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", "tgate_cli", *arguments],
            stdout=out,
            stderr=theirs,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "100"},
        )
        os.close(theirs)
        shown = b""
        while True:
            try:
                piece = os.read(mine, 65536)
            except OSError:  # the other end is closed
                break
            if not piece:
                break
            shown += piece
        assert process.wait(timeout=60) == 0
    os.close(mine)
    assert json.loads((tmp_path / "out.json").read_text())["speedup"] > 0
    assert b"measuring" in shown
    assert b"6/6" in shown  # three plans, one turn to warm up and one that counts
    assert b"speedup" not in shown


def test_a_live_display_says_what_it_does_and_obeys_no_stranger() -> None:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn

    out = io.StringIO()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]}"))
    bar = Progress(*columns, console=Console(file=out, force_terminal=True, width=100), auto_refresh=False)
    display = Display(bar, program="tgate-export")
    display.stage("tracing")
    display.progress(1, 3, "full, [bold]8x8[/]\x1b]0;owned\x07")
    display.warn("[link=x]\x9b2J")
    display.note("\x1b[2J")
    bar.refresh()
    bar.stop()
    shown = out.getvalue()
    assert "1/3 full, [bold]8x8[/]" in shown
    assert "tgate-export: warning:" in shown
    assert "[link=x]" in shown
    assert r"\x1b]0;owned\x07" in shown
    for sent in ("\x1b]0", "\x07", "\x9b", "\x1b[2J"):
        assert sent not in shown
