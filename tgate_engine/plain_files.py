"""Files of strangers: opened once, seen to be plain files, and known again.

A name can lead anywhere by the time it is opened: to a link, a pipe that never ends, a device. So a file is opened
without following a link and without waiting, and what is asked of it is asked of the open descriptor.
"""

from __future__ import annotations

import errno
import os
import stat
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path

from tgate_engine.errors import BundleError, TgateError

_FLAGS = os.O_RDONLY | os.O_CLOEXEC


@dataclass(frozen=True)
class FileState:
    """Which file it is and when it was last written to: equal states are the same bytes.

    ``changed_ns`` is set by the system at every write, and not by whoever sets ``written_ns`` back.
    """

    device: int
    inode: int
    bytes: int
    written_ns: int
    changed_ns: int

    @staticmethod
    def of(found: os.stat_result) -> FileState:
        """What ``os.stat`` or ``os.fstat`` found."""
        return FileState(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


@contextmanager
def open_inside(root: Path, name: str) -> Iterator[BufferedReader]:
    """The plain file ``name`` below ``root``, for reading. No part of ``name`` may be a link; ``root`` may.

    ``name``: parts between slashes, none of them ``..`` (see :func:`tgate_engine.reader.check_name`). Raises
    :class:`OSError`, also for what is no plain file, and for a link that says so.
    """
    folder = os.open(root, _FLAGS | os.O_DIRECTORY)
    try:
        *folders, last = name.split("/")
        for part in folders:
            inner = _open_no_link(part, os.O_DIRECTORY, folder)
            os.close(folder)
            folder = inner
        handle = _open_no_link(last, os.O_NONBLOCK, folder)
    finally:
        os.close(folder)
    with _plain(handle) as file:
        yield file


@contextmanager
def open_plain(path: Path) -> Iterator[BufferedReader]:
    """The plain file that ``path`` leads to, for reading. Raises :class:`OSError`, also for what is no plain file."""
    with _plain(os.open(path, _FLAGS | os.O_NONBLOCK)) as file:
        yield file


def read_plain(path: Path, most_bytes: int, error: type[TgateError]) -> bytes:
    """What a file of a user's holds; a link to it is followed.

    Raises ``error`` at once for one that is not there, cannot be read, holds more than ``most_bytes``, or is no plain
    file: a pipe would keep the reader waiting, a device never ends.
    """
    try:
        with open_plain(path) as file:
            size = os.fstat(file.fileno()).st_size
            content = b"" if size > most_bytes else file.read(most_bytes + 1)
    except FileNotFoundError:
        raise error(f"{path}: there is no such file") from None
    except (OSError, ValueError) as fault:  # ValueError: a NUL in the name
        raise error(f"{path} cannot be read ({getattr(fault, 'strerror', None) or fault}); name a file") from None
    size = max(size, len(content))
    if size > most_bytes:
        raise error(f"{path} holds {size} bytes; at most {most_bytes} are read")
    return content


def read_most(file: BufferedReader, most_bytes: int) -> bytes:
    """All of a file. Raises :class:`OSError` where that is more than ``most_bytes``."""
    content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(f"it holds more than {most_bytes} bytes")
    return content


def state_of(file: BufferedReader) -> FileState:
    """The state of an open file."""
    return FileState.of(os.fstat(file.fileno()))


class Watched:
    """A file kept open, to see whether somebody writes to it. Thread-safe; closed when it is dropped.

    What takes its name does not matter: who mapped it has the old file's pages.
    """

    def __init__(self, path: Path) -> None:
        """Raises :class:`OSError` where it cannot be opened."""
        self._path = path
        self._handle = os.open(path, _FLAGS | os.O_NOFOLLOW | os.O_NONBLOCK)
        weakref.finalize(self, os.close, self._handle)
        self._content = self._look()

    def check(self) -> None:
        """Raises :class:`BundleError` where it has another size than at first, or was written to."""
        if self._look() != self._content:
            raise BundleError(
                f"{self._path} was changed while it was in use, so nothing that is made of it can be trusted; "
                "restore it and open the bundle again"
            )

    def _look(self) -> tuple[int, int]:
        found = os.fstat(self._handle)
        return found.st_size, found.st_mtime_ns


def _open_no_link(name: str, flags: int, folder: int) -> int:
    try:
        return os.open(name, _FLAGS | os.O_NOFOLLOW | flags, dir_fd=folder)
    except OSError as error:
        # The system says "Too many levels of symbolic links" of a file, and "Not a directory" of a folder.
        if error.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
        if not stat.S_ISLNK(os.stat(name, dir_fd=folder, follow_symlinks=False).st_mode):
            raise
        raise OSError(error.errno, f"{name} is a link, and links are not followed: `cp -rL` copies files") from None


def _plain(handle: int) -> BufferedReader:
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise OSError("it is not a plain file")
    return os.fdopen(handle, "rb")
