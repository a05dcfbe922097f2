"""The engine cache: entries are whole, made once, and never used where they are damaged."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
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
    with pytest.raises(EngineError, match=r"file is not a directory; set TGATE_CACHE"):
        cache.find_or_build(KEY, writing("one", []))
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path / "file" / "cache"))
    assert cache.find(KEY) is None
    with pytest.raises(EngineError, match=r"cache'\); .* set TGATE_CACHE"):
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


def test_what_a_killed_builder_of_another_entry_left_is_removed_too(root: Path) -> None:
    """It may be of a version that nobody runs any more. What another process is at stays, as does all else."""
    root.mkdir()
    gone, busy = f"{'0' * 40}.tmp-abcdefgh", f"{'1' * 40}.tmp-abcdefgh"
    others = [f"{'0' * 40}.tmp-abcdefg*", f"{'0' * 39}.tmp-abcdefgh", "notes.tmp-abcdefgh"]
    for name in (gone, busy, *others):
        (root / name).mkdir()
    with (root / f"{'1' * 40}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        place = cache.find_or_build(KEY, writing("one", []))
    assert {path.name for path in root.iterdir() if path.is_dir()} == {busy, *others, place.name}


# --- whose it is --------------------------------------------------------------------------------


ROOT = os.geteuid() == 0
STRANGER = 12345


@pytest.fixture
def open_place() -> Iterator[Path]:
    """A directory below nothing but what belongs to us or root, which a test may open to others."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def forged(place: Path) -> None:
    """An entry of KEY that is whole by itself: whoever can write it can write its digests."""
    place.mkdir(parents=True)
    (place / "engine").write_text("a stranger's")
    digest = hashlib.sha256(b"a stranger's").hexdigest()
    (place / "entry.json").write_text(json.dumps({"key": KEY, "files": {"engine": digest}}))


def refuses(says: str) -> None:
    built: list[str] = []
    asks: list[Callable[[], object]] = [
        lambda: cache.find(KEY),
        lambda: cache.find_or_build(KEY, writing("one", built)),
    ]
    for ask in asks:
        with pytest.raises(EngineError, match=f"cannot be used: .*{says}; set TGATE_CACHE to a directory") as told:
            ask()
        assert "\n" not in str(told.value)
    assert built == []


def test_what_is_made_is_for_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every directory that is made on the way, even with a umask that takes nothing away, and every file."""
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path / "a" / "b" / "c"))
    before = os.umask(0)
    try:
        seen: list[int] = []

        def build(stage: Path) -> None:
            seen.append(stat.S_IMODE(stage.stat().st_mode))
            writing("one", [])(stage)

        place = cache.find_or_build(KEY, build)
    finally:
        os.umask(before)
    assert seen == [0o700]
    for folder in (tmp_path / "a", tmp_path / "a" / "b", tmp_path / "a" / "b" / "c", place):
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    for path in place.parent.rglob("*"):
        assert not path.stat().st_mode & 0o022
    assert cache.find(KEY) == place


@pytest.mark.parametrize("mode", [0o777, 0o1777, 0o770, 0o702, 0o720])
def test_a_cache_that_others_can_write_to_is_refused(
    open_place: Path, monkeypatch: pytest.MonkeyPatch, mode: int
) -> None:
    """Sticky or not: the stranger's entry has the name that is looked for, with digests of its own."""
    root = open_place / "cache"
    forged(root / cache.digest_of(KEY))
    monkeypatch.setenv("TGATE_CACHE", str(root))
    assert cache.find(KEY) is not None, "it is taken where only we could have written it"
    root.chmod(mode)
    refuses(f"others may write to {root}, its mode is {mode:04o}")


@pytest.mark.parametrize(("mode", "refused"), [(0o777, True), (0o770, True), (0o1777, False), (0o755, False)])
def test_so_is_one_that_others_can_move_away(
    open_place: Path, monkeypatch: pytest.MonkeyPatch, mode: int, refused: bool
) -> None:
    above = open_place / "shared"
    root = above / "ours" / "cache"
    root.mkdir(parents=True)
    above.chmod(mode)
    monkeypatch.setenv("TGATE_CACHE", str(root))
    if refused:
        refuses(f"others may write to {above}, its mode is {mode:04o}")
    else:
        cache.find_or_build(KEY, writing("one", []))
        assert cache.find(KEY) is not None


def test_of_a_link_what_it_leads_to_is_checked(open_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (open_place / "shared" / "cache").mkdir(parents=True)
    (open_place / "ours").symlink_to("shared/cache")
    monkeypatch.setenv("TGATE_CACHE", str(open_place / "ours"))
    assert cache.find_or_build(KEY, writing("one", [])).parent == (open_place / "shared" / "cache").resolve()
    (open_place / "shared").chmod(0o777)
    refuses(f"others may write to {open_place / 'shared'}, its mode is 0777")


@pytest.mark.skipif(not ROOT, reason="only root can give a directory away")
@pytest.mark.parametrize("theirs", ["cache", "above"])
def test_a_cache_of_another_user_is_refused(open_place: Path, monkeypatch: pytest.MonkeyPatch, theirs: str) -> None:
    root = open_place / "above" / "cache"
    forged(root / cache.digest_of(KEY))
    monkeypatch.setenv("TGATE_CACHE", str(root))
    place = root if theirs == "cache" else root.parent
    os.chown(place, STRANGER, STRANGER)
    refuses(f"{place} belongs to user {STRANGER}, and this is user 0")


@pytest.mark.skipif(not ROOT, reason="only root can become another user")
def test_what_root_has_built_may_be_used(open_place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container that is built by root and run by another."""
    open_place.chmod(0o755)
    monkeypatch.setenv("TGATE_CACHE", str(open_place / "cache"))
    place = cache.find_or_build(KEY, writing("one", []))
    for path in (place.parent, *place.parent.rglob("*")):
        path.chmod(0o755)
    os.seteuid(STRANGER)
    try:
        assert cache.find(KEY) == place
    finally:
        os.seteuid(0)


HARMS: dict[str, Callable[[Path], object]] = {
    "a file more": lambda place: (place / "sub" / "more.so").write_text(""),
    "an empty directory more": lambda place: (place / "more").mkdir(),
    "a file that is a link to its like": lambda place: linked(place / "sub" / "engine"),
    "a directory that is a link to its like": lambda place: linked(place / "sub"),
    "a record that is a link to its like": lambda place: linked(place / "entry.json"),
    "a pipe more": lambda place: os.mkfifo(place / "pipe"),
    "a pipe for a file": lambda place: instead(place / "sub" / "engine", os.mkfifo),
    "a pipe for a record": lambda place: instead(place / "entry.json", os.mkfifo),
    "a directory for a record": lambda place: instead(place / "entry.json", Path.mkdir),
    "a file that others may write to": lambda place: (place / "sub" / "engine").chmod(0o666),
    "a directory that others may write to": lambda place: (place / "sub").chmod(0o777),
    "an entry that others may write to": lambda place: place.chmod(0o770),
    "a record that others may write to": lambda place: (place / "entry.json").chmod(0o620),
    "a record of many bytes": lambda place: (place / "entry.json").write_text(
        " " * (2 << 20) + (place / "entry.json").read_text()
    ),
    "a record that is deep": lambda place: (place / "entry.json").write_text("[" * 100_000),
    "a record that names itself": lambda place: renamed(place, "entry.json"),
    "a record that names what lies outside": lambda place: renamed(place, "../outside"),
}


def instead(path: Path, make: Callable[[Path], object]) -> None:
    path.unlink()
    make(path)


def linked(path: Path) -> None:
    path.rename(path.parent.parent.parent / "like")
    path.symlink_to(path.parent.parent.parent / "like")


def renamed(place: Path, name: str) -> None:
    record = json.loads((place / "entry.json").read_text())
    record["files"][name] = next(iter(record["files"].values()))
    shutil.copy(place / "sub" / "engine", place.parent / "outside")
    (place / "entry.json").write_text(json.dumps(record))


@pytest.mark.parametrize("harm", HARMS)
def test_an_entry_is_exactly_its_files(root: Path, harm: str) -> None:
    built: list[str] = []
    place = cache.find_or_build(KEY, writing("one", built))
    HARMS[harm](place)
    assert cache.find(KEY) is None
    assert cache.find_or_build(KEY, writing("two", built)) == place
    assert built == ["one", "two"]
    assert sorted(path.name for path in place.rglob("*")) == ["engine", "entry.json", "sub"]


@pytest.mark.skipif(not ROOT, reason="only root can give a file away")
@pytest.mark.parametrize("name", [".", "sub", "sub/engine", "entry.json"])
def test_an_entry_of_another_user_is_built_again(name: str) -> None:
    built: list[str] = []
    place = cache.find_or_build(KEY, writing("one", built))
    os.chown(place / name, STRANGER, STRANGER)
    assert cache.find(KEY) is None
    cache.find_or_build(KEY, writing("two", built))
    assert built == ["one", "two"]


def test_a_build_that_leaves_a_link_is_refused(root: Path) -> None:
    def build(stage: Path) -> None:
        (stage / "engine").symlink_to("/etc/passwd")

    with pytest.raises(EngineError, match=r"what was built cannot be kept|symbolic links"):
        cache.find_or_build(KEY, build)
    assert [path.name for path in root.iterdir() if path.is_dir()] == []


# --- locks --------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["a link", "a dangling link", "a pipe", "a directory", "another's"])
def test_a_lock_is_a_plain_file_of_ours(root: Path, tmp_path: Path, what: str) -> None:
    """A link emptied the file that it led to; a pipe had everybody wait."""
    root.mkdir()
    (tmp_path / "mine").write_text("mine")
    lock = root / f"{cache.digest_of(KEY)}.lock"
    if what == "a pipe":
        os.mkfifo(lock)
    elif what == "a directory":
        lock.mkdir()
    elif what == "another's":
        if not ROOT:
            pytest.skip("only root can give a file away")
        lock.write_text("theirs")
        os.chown(lock, STRANGER, STRANGER)
    else:
        lock.symlink_to(tmp_path / ("mine" if what == "a link" else "nothing"))
    with pytest.raises(EngineError, match=r"\.lock of the engine cache is not a plain file of yours; remove it$"):
        cache.find_or_build(KEY, writing("one", []))
    assert (tmp_path / "mine").read_text() == "mine"
    assert not (tmp_path / "nothing").exists()


def test_a_lock_is_never_emptied(root: Path) -> None:
    root.mkdir()
    lock = root / f"{cache.digest_of(KEY)}.lock"
    lock.write_text("mine")
    cache.find_or_build(KEY, writing("one", []))
    assert lock.read_text() == "mine"


# --- full disks ---------------------------------------------------------------------------------


def compiler(error: BaseException) -> None:
    try:
        raise error
    except BaseException as cause:
        raise EngineError("cannot compile") from cause


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        OSError(errno.EDQUOT, "Disk quota exceeded"),
        RuntimeError("/tmp/x.s: fatal error: error writing: No space left on device"),
    ],
)
def test_a_full_disk_is_named(root: Path, error: Exception) -> None:
    """Whoever says so, and however deep below the error that is told."""

    def build(stage: Path) -> None:
        (stage / "half").write_text("half")
        compiler(error)

    with pytest.raises(EngineError, match=f"^there is no space left in the engine cache {root}; free some, or set"):
        cache.find_or_build(KEY, build)
    assert [path.name for path in root.iterdir() if path.is_dir()] == []


@pytest.mark.skipif(not ROOT or shutil.which("mount") is None, reason="only root can mount a small file system")
def test_a_disk_that_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k,mode=700", "none", disk], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        monkeypatch.setenv("TGATE_CACHE", str(disk / "cache"))
        with pytest.raises(EngineError, match="there is no space left in the engine cache"):
            cache.find_or_build(KEY, writing("one" * (1 << 20), []))
        assert [path.suffix for path in (disk / "cache").iterdir()] == [".lock"]
        cache.find_or_build(KEY, writing("one", []))
    finally:
        subprocess.run(["umount", disk], check=True)
