"""The Markdown of a tuned plan: a table that GitHub reads, in which a stranger's text stays text."""

from __future__ import annotations

from tests.cli.tuned import HOSTILE, data, report
from tgate_cli.tune_markdown import markdown


def test_the_front_is_a_table_and_the_chosen_plan_is_bold() -> None:
    lines = markdown(data()).splitlines()
    assert lines[0] == "### tgate tune: toy"
    assert lines[2].startswith("m=2 is the fastest plan found that keeps psnr at 30.00 dB")
    assert "| m=1 | 150.0 | 2.00× | 25.00 dB (24.20 to 25.90) |" in lines
    assert "| **m=2** | **210.0** | **1.43×** | **31.00 dB (30.20 to 31.90)** |" in lines
    assert f"| SHA-256, full.onnx | {'d' * 64} |" in lines
    tables = [line for line in lines if line.startswith("|")]
    assert {line.count("|") for line in tables} == {3, 5}


def test_what_a_stranger_wrote_stays_text_in_its_cell() -> None:
    text = markdown(data(model=HOSTILE, report=report(machine="a | b\n# c `d`")))
    assert "<script" not in text.replace("\\<", "")
    assert "<img" not in text.replace("\\<", "")
    assert "| processor | a \\| b\\\\n\\# c \\`d\\` |" in text
