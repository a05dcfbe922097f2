"""Files are opened without following a link, and without waiting; a file is known again, and watched."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tgate_engine.errors import BundleError, RequestError
from tgate_engine.plain_files import Watched, open_inside, open_plain, read_most, read_plain, state_of


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "root" / "in").mkdir(parents=True)
    (tmp_path / "root" / "in" / "x").write_bytes(b"abc")
    return tmp_path / "root"


def read(root: Path, name: str) -> bytes:
    with open_inside(root, name) as file:
        return file.read()


def handles() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_a_file_is_read(root: Path, tmp_path: Path) -> None:
    assert read(root, "in/x") == b"abc"
    (tmp_path / "link").symlink_to(root)
    assert read(tmp_path / "link", "in/x") == b"abc", "how the user comes to the root is the user's"
    with open_plain(tmp_path / "link" / "in" / "x") as file:
        assert read_most(file, 3) == b"abc"


def test_what_is_no_plain_file_inside_is_refused_at_once(root: Path, tmp_path: Path) -> None:
    os.mkfifo(root / "fifo")
    (root / "file-link").symlink_to(root / "in" / "x")
    (root / "folder-link").symlink_to(root / "in")
    (root / "device").symlink_to("/dev/zero")
    before = handles()
    for name in ("fifo", "in", "file-link", "folder-link/x", "device", "in/none", "none/x", "in/x/y", "x" * 300):
        with pytest.raises(OSError, match=r"."):
            read(root, name)
    for path in (root / "fifo", root / "in", Path("/dev/zero")):
        with pytest.raises(OSError, match="not a plain file"), open_plain(path):
            pass
    assert handles() == before, "what was opened is closed"


def test_more_than_there_may_be_is_not_read(root: Path) -> None:
    with open_plain(root / "in" / "x") as file, pytest.raises(OSError, match="more than 2 bytes"):
        read_most(file, 2)


def state(path: Path) -> object:
    with open_plain(path) as file:
        return state_of(file)


def test_a_file_is_known_again(root: Path) -> None:
    path = root / "in" / "x"
    first, times = state(path), (path.stat().st_atime_ns, path.stat().st_mtime_ns)
    assert state(path) == first
    path.write_bytes(b"xyz")
    os.utime(path, ns=times)  # as an attacker would
    assert state(path) != first
    second = state(path)
    path.rename(root / "y")
    (root / "other").write_bytes(b"xyz")
    (root / "other").rename(path)
    assert state(path) != second


def test_a_watched_file_is_seen_to_change(root: Path) -> None:
    path = root / "in" / "x"
    watched = Watched(path)
    watched.check()
    (root / "new").write_bytes(b"other")
    os.replace(root / "new", path)
    watched.check()  # who has mapped the old file has it still
    again = Watched(path)
    os.truncate(path, 2)
    with pytest.raises(BundleError, match="was changed while it was in use"):
        again.check()


def test_watching_ends_with_whoever_watches(root: Path) -> None:
    before = handles()
    watched = Watched(root / "in" / "x")
    assert handles() == before + 1
    del watched
    assert handles() == before


# --- whole --------------------------------------------------------------------------------------


def test_the_whole_file_through_links_too(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "link").symlink_to("a")
    for name in ("a", "link"):
        assert read_plain(tmp_path / name, 7, BundleError) == b"content"


@pytest.mark.parametrize("kind", ["fifo", "directory", "device", "endless", "link to fifo", "missing", "nul", "long"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind in ("fifo", "link to fifo"):
        os.mkfifo(tmp_path / "pipe")
        path = tmp_path / "pipe"
        if kind == "link to fifo":
            path = tmp_path / "link"
            path.symlink_to("pipe")
    path = {
        "directory": tmp_path,
        "device": Path("/dev/null"),
        "endless": Path("/dev/zero"),
        "nul": tmp_path / "a\0b",
        "long": tmp_path / ("x" * 5000),
    }.get(kind, path)
    caught: list[BaseException] = []

    def read() -> None:
        try:
            read_plain(path, 10, RequestError)
        except BaseException as error:
            caught.append(error)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    (error,) = caught
    assert isinstance(error, RequestError)
    assert str(error).isprintable()


def test_what_is_too_large_is_not_read(tmp_path: Path) -> None:
    """A hole of a terabyte takes no room on disk, and would in memory."""
    with (tmp_path / "hole").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(RequestError, match=rf"hole holds {2**40} bytes; at most 10 are read"):
        read_plain(tmp_path / "hole", 10, RequestError)


def test_a_file_that_says_it_is_empty_and_is_not() -> None:
    """Those of /proc have no size."""
    with pytest.raises(RequestError, match="at most 10 are read"):
        read_plain(Path("/proc/self/maps"), 10, RequestError)
