"""What long work tells whoever waits for it."""

from __future__ import annotations

import io

from tgate_engine.report import Silent


def test_quiet_says_warnings_alone() -> None:
    out = io.StringIO()
    report = Silent(out)
    report.stage("first")
    report.progress(1, 3, "one")
    report.note("a note")
    report.warn("a warning")
    assert out.getvalue() == "tgate: warning: a warning\n"
