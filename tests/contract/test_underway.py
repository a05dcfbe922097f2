"""Calls and files that are under way: found while they are, forgotten when they are not."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tgate_engine import underway
from tgate_engine.underway import Cancellable, unfinished


def test_calls_are_cancelled_while_they_are_under_way_and_no_longer() -> None:
    heard: list[str] = []
    with Cancellable(lambda: heard.append("a")):
        with Cancellable(lambda: heard.append("b")):
            underway.cancel_calls()
        assert sorted(heard) == ["a", "b"]
        underway.cancel_calls()
    assert sorted(heard) == ["a", "a", "b"]
    with pytest.raises(ValueError), Cancellable(lambda: heard.append("c")):
        raise ValueError
    underway.cancel_calls()
    assert len(heard) == 3


def test_what_is_half_made_is_removed_and_what_is_whole_stays(tmp_path: Path) -> None:
    folder, file, whole, gone = (tmp_path / name for name in ("folder", "file", "whole", "gone"))
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "x").write_text("x")
    file.write_text("x")
    with unfinished(whole):
        whole.write_text("x")
    with unfinished(folder), unfinished(file), unfinished(gone):
        underway.remove_unfinished()
    assert list(tmp_path.iterdir()) == [whole]


def test_a_call_without_python_is_shielded_by_whoever_takes_signals() -> None:
    seen: list[str] = []

    @contextlib.contextmanager
    def shield() -> Iterator[None]:
        seen.append("in")
        yield
        seen.append("out")

    with underway.without_python():
        assert seen == []
    underway.shield_with(shield)
    try:
        with underway.without_python():
            assert seen == ["in"]
    finally:
        underway.shield_with(None)
    with underway.without_python():
        assert seen == ["in", "out"]
