"""The engine cache: entries are whole, made once, and never used where they are damaged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tgate_engine.errors import EngineError
from tgate_runtime import cache

KEY = {"graph": "abc", "batch": [1, 4], "flags": {"fast": True}}


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def writing(text: str, built: list[str]) -> Callable[[Path], None]:
    def build(stage: Path) -> None:
        built.append(text)
        (stage / "sub").mkdir()
        (stage / "sub" / "engine").write_text(text)

    return build


def test_an_entry_is_built_once_and_found_again() -> None:
    built: list[str] = []
    assert cache.find(KEY) is None
    path = cache.find_or_build(KEY, writing("one", built))
    assert (path / "sub" / "engine").read_text() == "one"
    assert cache.find_or_build(KEY, writing("two", built)) == path == cache.find(KEY)
    assert built == ["one"]


@pytest.mark.parametrize("other", [{"graph": "abd"}, {"batch": [1, 2]}, {"flags": {"fast": False}}, {"more": 1}])
def test_any_other_key_is_another_entry(other: dict[str, object]) -> None:
    built: list[str] = []
    first = cache.find_or_build(KEY, writing("one", built))
    second = cache.find_or_build({**KEY, **other}, writing("two", built))
    assert first != second
    assert built == ["one", "two"]


def test_the_order_of_a_key_does_not_matter() -> None:
    assert cache.digest_of(KEY) == cache.digest_of(dict(reversed(KEY.items())))


@pytest.mark.parametrize("harm", ["changed", "cut", "removed", "record changed", "record removed", "another's record"])
def test_a_damaged_entry_is_built_again(harm: str) -> None:
    built: list[str] = []
    path = cache.find_or_build(KEY, writing("one", built))
    engine, record = path / "sub" / "engine", path / "entry.json"
    if harm == "changed":
        engine.write_text("eno")
    elif harm == "cut":
        engine.write_text("on")
    elif harm == "removed":
        engine.unlink()
    elif harm == "record changed":
        record.write_text("[]")
    elif harm == "record removed":
        record.unlink()
    else:
        record.write_text(record.read_text().replace("abc", "xyz"))
    assert cache.find(KEY) is None
    assert (cache.find_or_build(KEY, writing("two", built)) / "sub" / "engine").read_text() == "two"
    assert built == ["one", "two"]


@pytest.mark.parametrize("harm", ["a file", "a dangling link", "a link to a file", "a link to another directory"])
def test_what_is_not_a_directory_gives_way_to_an_entry(root: Path, tmp_path: Path, harm: str) -> None:
    place = root / cache.digest_of(KEY)
    root.mkdir()
    other = tmp_path / "other"
    if harm == "a file":
        place.write_text("not an entry")
    else:
        place.symlink_to(other)
    if harm == "a link to a file":
        other.write_text("mine")
    if harm == "a link to another directory":
        other.mkdir()
        (other / "mine").write_text("mine")
    kept = [path.name for path in tmp_path.rglob("*") if path.is_file() and path != place and path.parent != root]
    built: list[str] = []
    for _ in range(2):
        assert cache.find_or_build(KEY, writing("one", built)) == place
    assert built == ["one"]
    assert not place.is_symlink()
    assert (place / "sub" / "engine").read_text() == "one"
    assert [path.name for path in tmp_path.rglob("*") if path.is_file() and root not in path.parents] == kept


def test_a_build_that_fails_leaves_nothing(root: Path) -> None:
    def failing(stage: Path) -> None:
        (stage / "half").write_text("half")
        raise EngineError("no compiler")

    with pytest.raises(EngineError, match="no compiler"):
        cache.find_or_build(KEY, failing)
    assert cache.find(KEY) is None
    assert [path.name for path in root.iterdir() if path.is_dir()] == []


def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path / "file"))
    with pytest.raises(EngineError, match=r"file'\); .* set TGATE_CACHE"):
        cache.find_or_build(KEY, writing("one", []))


def test_a_build_that_misses_a_file_names_it(root: Path) -> None:
    def failing(stage: Path) -> None:
        (root / "no-compiler").read_text()

    with pytest.raises(EngineError, match="no-compiler"):
        cache.find_or_build(KEY, failing)
    assert cache.find(KEY) is None


SLOW_BUILDER = """
import sys, time
from pathlib import Path
from tgate_runtime import cache

def build(stage):
    (stage / "half").write_text("half")
    Path(sys.argv[1]).open("a").write("built\\n")
    time.sleep(float(sys.argv[2]))

print(cache.find_or_build({"graph": "slow"}, build))
"""


def builder(log: Path, seconds: float) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", SLOW_BUILDER, str(log), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))


def wait_for(log: Path) -> None:
    deadline = time.monotonic() + 60
    while not log.exists() or not log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_two_processes_do_not_do_the_same_work(tmp_path: Path) -> None:
    log = tmp_path / "log"
    processes = [builder(log, 1.0) for _ in range(3)]
    places = {process.communicate(timeout=60)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0, 0, 0]
    assert len(places) == 1
    assert log.read_text() == "built\n"


def test_a_builder_that_is_killed_leaves_no_entry_and_the_next_cleans_up(tmp_path: Path, root: Path) -> None:
    log = tmp_path / "log"
    first = builder(log, 600)
    wait_for(log)
    first.send_signal(signal.SIGKILL)
    first.wait(timeout=60)
    assert cache.find({"graph": "slow"}) is None
    second = builder(log, 0)
    place = Path(second.communicate(timeout=60)[0].strip())
    assert (place / "half").read_text() == "half"
    assert [path for path in root.iterdir() if path.is_dir()] == [place]
