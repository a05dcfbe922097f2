"""What the tests of the command line share: how it is run, and what a failure looks like."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

PROMPT = "a large red circle"

Run = Callable[..., tuple[int, str, str]]
"""Runs ``tgate``, or another ``main``, in this process: exit status, stdout, stderr."""


def fails(result: tuple[int, str, str], *says: str, status: int = 1) -> None:
    """One clear line and the exit status, and nothing on stdout."""
    got, out, err = result
    lines = [line for line in err.splitlines() if re.match("tgate(-export)?: error: ", line)]
    assert len(lines) == 1, err
    assert err.splitlines()[-1] == lines[0]
    assert "Traceback" not in err
    for text in says:
        assert text in lines[0]
    assert got == status
    assert out == ""


def beside(bundle: Path) -> list[str]:
    """The names of everything that lies beside a bundle."""
    return sorted(path.name for path in bundle.parent.iterdir() if path != bundle)
