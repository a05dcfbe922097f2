"""Files of strangers are regular, bounded, and told at once."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from tgate_engine.errors import BundleError, RequestError
from tgate_engine.regular_file import read_regular


def test_the_whole_file_through_links_too(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"content")
    (tmp_path / "link").symlink_to("a")
    for name in ("a", "link"):
        assert read_regular(tmp_path / name, 7, BundleError) == b"content"


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
            read_regular(path, 10, RequestError)
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
        read_regular(tmp_path / "hole", 10, RequestError)


def test_a_file_that_says_it_is_empty_and_is_not() -> None:
    """Those of /proc have no size."""
    with pytest.raises(RequestError, match="at most 10 are read"):
        read_regular(Path("/proc/self/maps"), 10, RequestError)
