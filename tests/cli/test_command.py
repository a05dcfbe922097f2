"""What a missing library says."""

from __future__ import annotations

import json

import pytest

from tgate_cli.command import ADVICE, needs, print_json
from tgate_engine.errors import EngineError


def test_a_library_that_is_missing_is_one_line_with_what_brings_it() -> None:
    with (
        pytest.raises(EngineError, match=r"^drawing needs PIL; .*pip install 'tgate-engine\[cpu\]'$"),
        needs("drawing", ADVICE.format("cpu")),
    ):
        raise ModuleNotFoundError("No module named 'PIL.Image'", name="PIL")


def test_a_fault_of_our_own_is_no_missing_library() -> None:
    with pytest.raises(ModuleNotFoundError), needs("drawing", "advice"):
        raise ModuleNotFoundError("No module named 'tgate_runtime.nothing'", name="tgate_runtime.nothing")


def test_json_keeps_its_letters(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"à": [1, None]})
    out = capsys.readouterr().out
    assert "à" in out
    assert json.loads(out) == {"à": [1, None]}
