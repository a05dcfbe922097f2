"""README stays short, and leads to the documentation."""

from __future__ import annotations

from pathlib import Path

README = (Path(__file__).parents[2] / "README.md").read_bytes()


def test_readme_is_short() -> None:
    assert len(README) < 4_000


def test_readme_leads_to_the_documentation() -> None:
    assert b"](docs/index.md)" in README
