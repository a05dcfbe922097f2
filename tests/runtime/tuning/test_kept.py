"""Measurements in a file: they are there again, and nobody else's are taken for them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tgate_engine.errors import RequestError
from tgate_runtime.tuning.kept import Facts, Kept

OF: Facts = {"bundle": "abc", "seed": 3}


def test_what_was_measured_is_there_again(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    kept = Kept(file, OF)
    assert kept.scores("psnr", "p") == ()
    kept.add("psnr", "p", [30.5, 31.0])
    kept.add("psnr", "p", [29.0])
    assert kept.fact("times", lambda: {"full": 1.5}) == {"full": 1.5}
    again = Kept(file, OF)
    assert again.scores("psnr", "p") == (30.5, 31.0, 29.0)
    assert again.scores("ssim", "p") == again.scores("psnr", "q") == ()
    assert again.fact("times", lambda: pytest.fail("measured twice")) == {"full": 1.5}


def test_without_a_file_it_is_in_memory_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    kept = Kept(None, OF)
    kept.add("psnr", "p", [1.0])
    assert kept.scores("psnr", "p") == (1.0,)
    assert list(tmp_path.iterdir()) == []


def test_measurements_of_something_else_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    Kept(file, OF).add("psnr", "p", [1.0])
    with pytest.raises(RequestError, match=r"other measurements, whose bundle is abc, not xyz; name another --state"):
        Kept(file, {**OF, "bundle": "xyz"})
    with pytest.raises(RequestError, match="whose seed is"):
        Kept(file, {**OF, "seed": 4})


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "holds no measurements"),
        ("[1]", "holds no measurements"),
        ('{"form": 2}', "that this version reads"),
        ('{"form": 1, "of": {}, "facts": {}, "scores": {}}', "does not match its own digest"),
    ],
)
def test_a_file_that_holds_none_is_refused(tmp_path: Path, content: str, says: str) -> None:
    file = tmp_path / "state.json"
    file.write_text(content)
    with pytest.raises(RequestError, match=says) as refused:
        Kept(file, OF)
    assert "\n" not in str(refused.value)


def test_a_number_that_was_changed_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "state.json"
    Kept(file, OF).add("psnr", "p", [30.5])
    file.write_text(file.read_text().replace("30.5", "31.5"))
    with pytest.raises(RequestError, match="does not match its own digest; remove it, and measure again"):
        Kept(file, OF)


def test_a_place_that_cannot_be_written_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="there is no directory"):
        Kept(tmp_path / "none" / "state.json", OF)
    with pytest.raises(RequestError, match="is a directory"):
        Kept(tmp_path, OF)
