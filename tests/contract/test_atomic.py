"""Files and directories that are either whole or not there."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tgate_engine import atomic
from tgate_engine.atomic import staging, write_atomically
from tgate_engine.bundle import Bundle, digests_of
from tgate_engine.errors import BundleError
from tgate_engine.manifest import MANIFEST_FILE


def left_behind(parent: Path, target: str) -> list[str]:
    """Everything in ``parent`` but the target."""
    return sorted(p.name for p in parent.iterdir() if p.name != target)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_atomically(tmp_path / "x", b"old")
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="cannot rename"):
        write_atomically(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old"
    assert left_behind(tmp_path, "x") == []


def fail(*_: object, **__: object) -> None:
    raise OSError(errno.EIO, "cannot rename")


def test_staging_gives_the_target_its_name_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "bundle"
    with staging(target) as stage:
        (stage / "x").write_text("x")
        assert stage.parent == target.parent
        assert not target.exists()
    assert (target / "x").read_text() == "x"
    assert left_behind(target.parent, "bundle") == []


class Failed(Exception):
    """What an export may raise."""


def fail_in_the_block(target: Path, beside: int = 1) -> None:
    """An export that fails half way; meanwhile ``beside`` other entries lie beside the target."""
    with staging(target, force=True) as stage:
        (stage / "x").write_text("x")
        assert stage.name in left_behind(target.parent, target.name)
        assert len(left_behind(target.parent, target.name)) == beside
        raise Failed


def test_a_written_file_is_whole_and_readable_by_others(tmp_path: Path) -> None:
    write_atomically(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new"
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644
    assert left_behind(tmp_path, "x") == []


def test_a_place_where_nothing_can_be_written_is_named(tmp_path: Path) -> None:
    """The file itself, not the one beside it that would become it."""
    with pytest.raises(FileNotFoundError) as error:
        write_atomically(tmp_path / "nowhere" / "x", b"new")
    assert error.value.filename == str(tmp_path / "nowhere" / "x")


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Failed):
        fail_in_the_block(tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []


def test_an_error_leaves_the_old_bundle(toy: Path) -> None:
    before = digests_of(toy)
    with pytest.raises(Failed):
        fail_in_the_block(toy)
    assert digests_of(toy) == before
    Bundle.open(toy)
    assert left_behind(toy.parent, "toy") == []


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_named_and_leaves_nothing(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(BundleError, match="there is no space left in") as told, staging(tmp_path / "bundle"):
        raise error
    assert str(tmp_path) in str(told.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("exchange", [True, False])
def test_force_replaces_a_bundle(toy: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    with staging(toy, force=True) as stage:
        (stage / MANIFEST_FILE).write_text("new")
    assert [p.name for p in toy.iterdir()] == [MANIFEST_FILE]
    assert left_behind(toy.parent, "toy") == []


def test_without_force_nothing_is_replaced(toy: Path) -> None:
    with pytest.raises(BundleError, match="exists already"), staging(toy):
        pytest.fail("the block must not run")
    Bundle.open(toy)


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="exists already"), staging(tmp_path / "bundle"):
        (tmp_path / "bundle").mkdir()
    assert left_behind(tmp_path, "bundle") == []


@pytest.mark.parametrize("force", [False, True])
def test_what_is_no_bundle_is_never_replaced(tmp_path: Path, force: bool) -> None:
    precious = tmp_path / "photos"
    precious.mkdir()
    (precious / "x.jpg").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(precious)
    for name in ("photos", "file", "link"):
        with pytest.raises(BundleError), staging(tmp_path / name, force=force):
            pytest.fail("the block must not run")
    assert (precious / "x.jpg").read_text() == "x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link", "photos"]


KILLED = """
import sys, time
from tgate_engine import atomic
def wait(*_):
    print("ready", flush=True)
    time.sleep(60)
if sys.argv[2] == "between renames":
    atomic._exchange = lambda a, b: False
    rename = atomic.os.rename
    def watched(a, b):
        rename(a, b)
        wait()
    atomic.os.rename = watched
with atomic.staging(sys.argv[1], force=True) as stage:
    (stage / "manifest.json").write_text("new")
    if sys.argv[2] == "in the block":
        wait()
"""


def killed(target: Path, when: str) -> None:
    """Runs an export in another process and kills it with SIGKILL."""
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(target), when], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def test_a_kill_leaves_the_old_bundle_and_the_next_run_cleans_up(toy: Path) -> None:
    before = digests_of(toy)
    killed(toy, "in the block")
    assert digests_of(toy) == before
    Bundle.open(toy)
    assert len(left_behind(toy.parent, "toy")) == 1
    with pytest.raises(Failed):
        fail_in_the_block(toy)
    assert left_behind(toy.parent, "toy") == []


def test_a_kill_leaves_no_bundle_where_none_was(tmp_path: Path) -> None:
    killed(tmp_path / "bundle", "in the block")
    assert not (tmp_path / "bundle").exists()
    with staging(tmp_path / "bundle") as stage:
        (stage / MANIFEST_FILE).write_text("new")
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_a_kill_between_two_renames_is_undone_by_the_next_run(toy: Path) -> None:
    before = digests_of(toy)
    killed(toy, "between renames")
    assert not toy.exists()
    with pytest.raises(BundleError, match="exists already"), staging(toy):
        pytest.fail("the block must not run")
    assert digests_of(toy) == before
    Bundle.open(toy)


def test_two_exports_at_once_do_not_remove_each_others_work(tmp_path: Path) -> None:
    with staging(tmp_path / "bundle") as first:
        (first / "x").write_text("1")
        with staging(tmp_path / "other"):
            pass
        with pytest.raises(Failed):
            fail_in_the_block(tmp_path / "bundle", beside=3)
        assert (first / "x").read_text() == "1"
    assert (tmp_path / "bundle" / "x").read_text() == "1"
