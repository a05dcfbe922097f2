"""Files and directories that are either whole or not there."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from tgate_engine import atomic
from tgate_engine.atomic import check_target, is_half_written, locked, staging, write_atomically
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


@pytest.mark.parametrize("at", range(60))
@pytest.mark.parametrize("there", [False, True])
def test_a_signal_at_any_line_or_call_leaves_a_whole_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int, there: bool
) -> None:
    path = tmp_path / "x"
    if there:
        path.write_bytes(b"old")
    ended_at(monkeypatch, at, lambda: write_atomically(path, b"new"))
    assert left_behind(tmp_path, "x") == []
    assert not path.exists() or path.read_bytes() in (b"old", b"new")
    assert path.exists() or not there


@pytest.mark.parametrize("at", range(0, 120, 2))
def test_a_signal_at_any_line_or_call_leaves_no_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int) -> None:

    def stage() -> None:
        with staging(tmp_path / "b") as folder:
            (folder / "x").write_bytes(b"new")

    ended_at(monkeypatch, at, stage)
    assert left_behind(tmp_path, "b") == []
    assert not (tmp_path / "b").exists() or (tmp_path / "b" / "x").read_bytes() == b"new"


@pytest.mark.parametrize("at", range(20))
def test_a_signal_while_places_are_tried_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:

    def look() -> None:
        check_target(tmp_path / "b", force=False)
        atomic.check_place(tmp_path / "x", BundleError)

    ended_at(monkeypatch, at, look)
    assert left_behind(tmp_path, "") == []


class Ended(BaseException):
    """What a signal raises, in the main thread, between two of Python's instructions."""


def ended_at(monkeypatch: pytest.MonkeyPatch, at: int, work: Callable[[], None]) -> None:
    """Raises :class:`Ended` once in ``work``: at the line of ``atomic`` or after the call of the system that comes
    after ``at`` others, if there are as many. A call that succeeded gives nothing back then: a signal may come before
    Python has bound its result.

    In a thread of its own: where a line of an except clause is not run to its end so, Python goes on holding the
    exception as the one at hand, and the next test's errors would have it as their context."""
    left = at

    def may_end() -> None:
        nonlocal left
        left -= 1
        if left == -1:
            sys.settrace(None)
            raise Ended

    def traced(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename != atomic.__file__:
            return None
        if event == "line":
            may_end()
        return traced

    def calling(call: Callable[..., Any]) -> Callable[..., Any]:
        def called(*arguments: Any, **named: Any) -> Any:
            result = call(*arguments, **named)
            if sys.gettrace() is traced:
                may_end()
            return result

        return called

    with monkeypatch.context() as patch:
        for name in ("open", "mkdir", "replace", "rename", "fdopen", "fsync"):
            patch.setattr(os, name, calling(getattr(os, name)))

        def run() -> None:
            sys.settrace(traced)
            try:
                work()
            except Ended:
                pass
            except BaseException as error:
                failed.append(error)
            finally:
                sys.settrace(None)

        failed: list[BaseException] = []
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert failed == []


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


@pytest.fixture(params=[0o022, 0o077, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_file_is_whole_and_has_what_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    write_atomically(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new"
    assert mode(tmp_path / "x") == 0o666 & ~umask
    assert left_behind(tmp_path, "x") == []


@pytest.mark.parametrize("own", [0o600, 0o640, 0o444, 0o664])
def test_a_file_that_is_replaced_hands_on_its_mode(tmp_path: Path, own: int) -> None:
    (tmp_path / "x").write_bytes(b"old")
    (tmp_path / "x").chmod(own | stat.S_ISUID)
    write_atomically(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"new"
    assert mode(tmp_path / "x") == own


def test_a_private_file_is_private_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "x").write_bytes(b"old")
    (tmp_path / "x").chmod(0o600)
    seen: list[int] = []
    replace, opened = os.replace, os.open

    def watched_replace(a: Path, b: Path) -> None:
        seen.append(mode(a))
        replace(a, b)

    def watched_open(path: Path, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_CREAT:
            seen.append(mode)
        return opened(path, flags, mode)

    monkeypatch.setattr(os, "replace", watched_replace)
    monkeypatch.setattr(os, "open", watched_open)
    write_atomically(tmp_path / "x", b"new")
    assert seen == [0o600, 0o600]


@pytest.mark.parametrize("leads", ["to a file", "to nothing", "to itself"])
def test_a_link_is_replaced_and_not_followed(tmp_path: Path, leads: str) -> None:
    (tmp_path / "mine").write_bytes(b"mine")
    target = {"to a file": "mine", "to nothing": "nothing", "to itself": "x"}[leads]
    (tmp_path / "x").symlink_to(target)
    write_atomically(tmp_path / "x", b"new")
    assert not (tmp_path / "x").is_symlink()
    assert (tmp_path / "x").read_bytes() == b"new"
    assert (tmp_path / "mine").read_bytes() == b"mine"
    assert not (tmp_path / "nothing").exists()


@pytest.mark.parametrize("what", ["a pipe", "a directory"])
def test_what_is_no_file_is_not_replaced(tmp_path: Path, what: str) -> None:
    """Root could replace /dev/null."""
    os.mkfifo(tmp_path / "x") if what == "a pipe" else (tmp_path / "x").mkdir()
    before = os.lstat(tmp_path / "x").st_ino
    with pytest.raises(BundleError, match="x exists and is not a file; name another place"):
        write_atomically(tmp_path / "x", b"new")
    assert os.lstat(tmp_path / "x").st_ino == before
    assert left_behind(tmp_path, "x") == []


def test_the_directory_is_synced_after_the_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    replace = os.replace

    def watched(a: Path, b: Path) -> None:
        replace(a, b)
        told.append("renamed")

    def sync(handle: int) -> None:
        told.append("directory" if stat.S_ISDIR(os.fstat(handle).st_mode) else "file")

    monkeypatch.setattr(os, "replace", watched)
    monkeypatch.setattr(os, "fsync", sync)
    write_atomically(tmp_path / "x", b"new")
    assert told == ["file", "renamed", "directory"]


DIGITS = "0123456789abcdef"


def test_what_a_killed_write_left_is_removed_by_the_next(tmp_path: Path) -> None:
    """And nothing else: what another writer is at, a neighbour's, a link, a directory, a name that only looks alike."""
    abandoned = tmp_path / f".a[x]*.tmp-{DIGITS}"
    abandoned.write_bytes(b"half")
    kept = [f".aX.tmp-{DIGITS}", f".a[x]*.tmp-{DIGITS}0", f".a[x]*.tmp-{DIGITS[:-1]}g", f".a[x]*.b.tmp-{DIGITS}"]
    for name in kept:
        (tmp_path / name).write_bytes(b"mine")
    (tmp_path / f".a[x]*.tmp-{DIGITS[::-1]}").symlink_to(kept[0])
    (tmp_path / f".a[x]*.tmp-1{DIGITS[1:]}").mkdir()
    busy = tmp_path / f".a[x]*.tmp-2{DIGITS[1:]}"
    with busy.open("wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        before = sorted(p.name for p in tmp_path.iterdir())
        write_atomically(tmp_path / "a[x]*", b"new")
    after = sorted(p.name for p in tmp_path.iterdir())
    assert set(before) - set(after) == {abandoned.name}
    assert set(after) - set(before) == {"a[x]*"}
    assert (tmp_path / kept[0]).read_bytes() == b"mine"


KILLED_WRITE = """
import os, signal, sys
from pathlib import Path
from tgate_engine import atomic
def kill(*_):
    os.kill(os.getpid(), signal.SIGKILL)
setattr(atomic.os, sys.argv[2], kill)
atomic.write_atomically(Path(sys.argv[1]), b"new" * 1000)
"""


@pytest.mark.parametrize("when", ["fsync", "replace"])
def test_a_kill_in_a_write_loses_nothing_and_is_cleaned_up(tmp_path: Path, when: str) -> None:
    (tmp_path / "x").write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", KILLED_WRITE, str(tmp_path / "x"), when], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "x").read_bytes() == b"old"
    assert [is_half_written(name) for name in left_behind(tmp_path, "x")] == [True]
    write_atomically(tmp_path / "x", b"newer")
    assert (tmp_path / "x").read_bytes() == b"newer"
    assert left_behind(tmp_path, "x") == []


def test_a_file_system_without_locks_is_written_to_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    other = tmp_path / f".x.tmp-{DIGITS}"
    other.write_bytes(b"half")
    write_atomically(tmp_path / "x", b"new")
    with locked(tmp_path / "x"), staging(tmp_path / "bundle") as stage:
        (stage / MANIFEST_FILE).write_text("new")
    assert (tmp_path / "bundle" / MANIFEST_FILE).read_text() == "new"
    assert other.exists(), "it may be another's, at work"


def test_a_lock_is_of_the_file_that_is_there_when_it_is_taken(tmp_path: Path) -> None:
    """Whoever waited while the file was replaced waits for the lock of the new one."""
    path = tmp_path / "x"
    path.write_bytes(b"1")
    new = tmp_path / "new"
    new.write_bytes(b"2")
    seen: list[bytes] = []

    def wait() -> None:
        with locked(path):
            seen.append(path.read_bytes())

    other = threading.Thread(target=wait)
    with new.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # before it gets the name, so there is no moment at which nobody has a lock
        with locked(path):
            other.start()
            time.sleep(0.1)  # it has opened the file, and waits
            os.replace(new, path)
        time.sleep(0.1)  # the old file's lock is free, which is nothing to it
        assert seen == []
    other.join(60)
    assert seen == [b"2"]


def test_a_file_that_is_replaced_while_its_lock_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between opening it and locking it: the lock of what is gone is let go of, and the new file's taken."""
    path, lock = tmp_path / "x", atomic._lock
    path.write_bytes(b"1")

    def late(handle: int, **how: bool) -> bool:
        monkeypatch.setattr(atomic, "_lock", lock)
        write_atomically(path, b"2")
        return lock(handle, **how)

    monkeypatch.setattr(atomic, "_lock", late)
    with locked(path), path.open("rb") as file:
        assert file.read() == b"2"
        with pytest.raises(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_lock_that_never_comes_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stranger who may read a file can hold its lock for ever."""
    (tmp_path / "x").write_bytes(b"1")
    monkeypatch.setattr(atomic, "_PATIENCE_S", 0.05)
    with (tmp_path / "x").open("rb") as stranger:
        fcntl.flock(stranger, fcntl.LOCK_EX)
        with pytest.raises(BundleError, match="x has been locked by another process for"), locked(tmp_path / "x"):
            pytest.fail("the block must not run")


@pytest.mark.parametrize("what", ["a link", "a pipe"])
def test_a_lock_follows_no_link_and_waits_for_no_reader(tmp_path: Path, what: str) -> None:
    (tmp_path / "mine").write_bytes(b"mine")
    if what == "a link":
        (tmp_path / "x").symlink_to("mine")
        with pytest.raises(OSError, match="symbolic"), locked(tmp_path / "x"):
            pytest.fail("the block must not run")
    else:
        os.mkfifo(tmp_path / "x")
        with locked(tmp_path / "x"):
            pass
    assert (tmp_path / "mine").read_bytes() == b"mine"


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


@pytest.mark.parametrize("exchange", [True, False])
def test_a_bundle_that_is_replaced_hands_on_its_mode(
    toy: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    if not exchange:
        monkeypatch.setattr(atomic, "_exchange", lambda a, b: False)
    toy.chmod(0o700)
    (toy / "deep").mkdir()
    (toy / "deep" / "x").write_text("x")
    (toy / "deep").chmod(0o500)  # which nobody but root can remove anything from
    with staging(toy, force=True) as stage:
        (stage / MANIFEST_FILE).write_text("new")
    assert mode(toy) == 0o700
    assert left_behind(toy.parent, "toy") == []


def test_a_new_directory_has_what_the_umask_leaves(tmp_path: Path, umask: int) -> None:
    with staging(tmp_path / "bundle") as stage:
        (stage / MANIFEST_FILE).write_text("new")
    assert mode(tmp_path / "bundle") == 0o777 & ~umask


def test_a_bundle_is_replaced_under_the_lock_of_its_manifest(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan that is being added goes into the old bundle or into the new one, never the old one's into the new."""
    monkeypatch.setattr(atomic, "_PATIENCE_S", 0.05)
    before = digests_of(toy)
    with (
        locked(toy / MANIFEST_FILE),
        pytest.raises(BundleError, match="has been locked"),
        staging(toy, force=True) as stage,
    ):
        (stage / MANIFEST_FILE).write_text("new")
    assert digests_of(toy) == before
    assert left_behind(toy.parent, "toy") == []


@pytest.mark.parametrize("target", ["a*", "[ab]", "a?", "*"])
def test_a_name_is_no_pattern(tmp_path: Path, target: str) -> None:
    """Each of them, as a glob, takes in what lies beside it."""
    for name in (f".ab.staging-{DIGITS}", f".a.staging-{DIGITS}", f".ab.previous-{DIGITS}", ".a.staging-work"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text("mine")
    (tmp_path / f".{target}.staging-{DIGITS}").mkdir()  # and this is abandoned
    with staging(tmp_path / target) as stage:
        (stage / MANIFEST_FILE).write_text("new")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [f".ab.staging-{DIGITS}", f".a.staging-{DIGITS}", f".ab.previous-{DIGITS}", ".a.staging-work", target]
    )
    assert len(list(tmp_path.rglob("mine"))) == 4


@pytest.mark.parametrize("kind", ["staging", "previous"])
@pytest.mark.parametrize("what", ["a link", "a file", "another's"])
def test_what_is_not_ours_is_no_leftover(tmp_path: Path, kind: str, what: str) -> None:
    """In a shared directory a stranger could name a directory so that it became the bundle, or was removed."""
    place = tmp_path / f".bundle.{kind}-{DIGITS}"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / MANIFEST_FILE).write_text("mine")
    if what == "a link":
        place.symlink_to("other")
    elif what == "a file":
        place.write_text("mine")
    elif os.geteuid() == 0:
        (tmp_path / "other").rename(place)
        os.chown(place, 12345, 12345)
    else:
        pytest.skip("only root can give a directory away")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    with pytest.raises(Failed):
        fail_in_the_block(tmp_path / "bundle", beside=len(list(tmp_path.iterdir())) + 1)
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


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


@pytest.mark.parametrize("target", ["bundle", "deep/er/bundle", "there"])
def test_a_target_that_can_be_is_checked_without_a_trace(tmp_path: Path, target: str) -> None:
    (tmp_path / "there").mkdir()
    check_target(tmp_path / target, force=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("file/bundle", "file: Not a directory"),
        ("file/deep/bundle", "file: Not a directory"),
        ("x" * 250, ": File name too long"),
        ("/proc/bundle", r"/proc: .*"),
    ],
)
def test_a_target_that_cannot_be_is_known_before_the_work(tmp_path: Path, target: str, says: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(BundleError, match=rf"cannot be written \(in .*{says}\); choose another --output$"):
        check_target(tmp_path / target, force=False)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_directory_that_may_not_be_written_to_holds_no_bundle(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(BundleError, match="Permission denied"):
        check_target(tmp_path / "deep" / "bundle", force=False)
    tmp_path.chmod(0o700)


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
