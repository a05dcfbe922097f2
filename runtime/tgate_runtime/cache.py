"""Compiled engines on disk: made once, found again by what they were made from.

An entry is a directory named by the digest of its key: graph and weights, the engine and its version, the device,
the shapes, the flags. Whoever builds holds a lock, so that two processes do not do the same work, and an entry gets
its name only when it is whole. What is found damaged is built again.

Entries are code that runs in this process, and their digests lie beside them. So the cache is a directory that nobody
but the user and root can write to, or move away, or it is refused: :func:`_trusted`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tgate_engine.atomic import is_full_disk, remove_tree
from tgate_engine.errors import EngineError
from tgate_engine.underway import unfinished

_RECORD = "entry.json"
_MOST_RECORD_BYTES = 1 << 20  # of a few hundred
_STAGE = re.compile(r"([0-9a-f]{40})\.tmp-\w{8}")
_OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
_NO_LINK = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


def cache_directory() -> Path:
    """``$TGATE_CACHE``, or ``tgate-engine`` in the user's cache directory. It may not exist yet.

    Raises :class:`EngineError` for a user without a home directory.
    """
    try:
        if own := os.environ.get("TGATE_CACHE"):
            return Path(own).expanduser()
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tgate-engine"
    except RuntimeError as error:  # what pathlib raises for a user that the system does not know
        raise EngineError(f"there is no place for a cache ({error}); set TGATE_CACHE to a directory of yours") from None


def own_directory() -> Path:
    """The cache directory, without links in its path: made where it is missing, for its user alone.

    Raises :class:`EngineError` where somebody else could put something there, and OSError where it cannot be made.
    """
    root = Path(os.path.realpath(cache_directory()))
    _make(root)
    _trusted(root)
    return root


def find(key: Mapping[str, Any]) -> Path | None:
    """The directory of the whole entry of that key; None where there is none, or a damaged one.

    Raises :class:`EngineError` where somebody else could have put it there.
    """
    root = Path(os.path.realpath(cache_directory()))
    if not os.path.lexists(root):
        return None
    _trusted(root)
    path = root / digest_of(key)
    return path if _whole(path, key) else None


def find_or_build(key: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
    """The directory of the entry of that key; ``build(directory)`` fills it where there is none.

    ``key``: JSON values. ``build`` may write what it likes in the directory, which nobody else can look into; what it
    leaves there, plain files and directories, is the entry. Another process that builds the same entry is waited for. A
    build that raises, or is killed, leaves no entry. Raises :class:`EngineError` where the cache cannot be written, is
    not the user's own or is full, or a build finds something missing.
    """
    if (found := find(key)) is not None:
        return found
    root, name = Path(os.path.realpath(cache_directory())), digest_of(key)
    path = root / name
    try:
        own_directory()
        with _lock(root / f"{name}.lock"):
            if _whole(path, key):  # another process was faster
                return path
            _remove_abandoned(root, name)
            stage = root / f"{name}.tmp-{secrets.token_hex(4)}"
            try:
                with unfinished(stage):
                    stage.mkdir(mode=0o700)
                    build(stage)
                _seal(stage, key)
                _remove(path)
                os.rename(stage, path)
            finally:
                remove_tree(stage)
    except (OSError, EngineError) as error:
        if is_full_disk(error):
            raise EngineError(
                f"there is no space left in the engine cache {root}; free some, or set TGATE_CACHE to a directory "
                "elsewhere"
            ) from error
        if isinstance(error, EngineError):
            raise
        raise EngineError(
            f"building an engine in the cache {root} failed ({error}); if it cannot be written there, set TGATE_CACHE "
            "to a directory where it can"
        ) from error
    return path


def digest_of(key: Mapping[str, Any]) -> str:
    """The name of the entry of that key."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:40]


# --- whose the cache is -------------------------------------------------------------------------


def _make(root: Path) -> None:
    """Make the directory, and those above it that are missing, for nobody but the user."""
    for folder in reversed((root, *root.parents)):
        if not os.path.lexists(folder):
            with contextlib.suppress(FileExistsError):  # another process was faster
                os.mkdir(folder, 0o700)


def _trusted(root: Path) -> None:
    """Raises :class:`EngineError` where somebody else can write into ``root``, or put another directory in its place.

    ``root``: resolved, so that nothing above it is a link. A directory above it belongs to the user or to root, and
    others may write to it only where it is sticky, so that they cannot rename what is not theirs.
    """
    for folder in (root, *root.parents):
        found = os.lstat(folder)
        sticky = folder != root and found.st_mode & stat.S_ISVTX
        if not stat.S_ISDIR(found.st_mode):
            why = f"{folder} is not a directory"
        elif not _is_owner_trusted(found):
            why = f"{folder} belongs to user {found.st_uid}, and this is user {os.geteuid()}"
        elif found.st_mode & _OTHERS_MAY_WRITE and not sticky:
            why = f"others may write to {folder}, its mode is {stat.S_IMODE(found.st_mode):04o}"
        else:
            continue
        raise EngineError(
            f"the cache {root} cannot be used: {why}; set TGATE_CACHE to a directory of your own "
            "that nobody else can write to"
        )


def _is_owner_trusted(found: os.stat_result) -> bool:
    return found.st_uid in (os.geteuid(), 0)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the lock of that file, waiting for it. The file stays: removing it would let two processes in."""
    with os.fdopen(_open_lock(path), "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _open_lock(path: Path) -> int:
    """Open the file, made where it is missing. Raises :class:`EngineError` for what is no plain file of the user's."""
    why = "not a plain file of yours"
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | _NO_LINK, 0o600)
    except OSError as error:
        if error.errno not in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise EngineError(f"the lock {path} of the engine cache is {why}; remove it") from None
    found = os.fstat(handle)
    if not (stat.S_ISREG(found.st_mode) and _is_owner_trusted(found)):
        os.close(handle)
        raise EngineError(f"the lock {path} of the engine cache is {why}; remove it")
    return handle


def _remove_abandoned(root: Path, name: str) -> None:
    """Remove what killed builders left: of this entry, whose lock is held, and of those that nobody is building."""
    for leftover in root.iterdir():
        match = _STAGE.fullmatch(leftover.name)
        if match is None:
            continue
        if match[1] == name:
            _remove(leftover)
            continue
        with os.fdopen(_open_lock(root / f"{match[1]}.lock"), "rb") as file, contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(leftover)


def _remove(path: Path) -> None:
    """Remove what is there, whatever it is; of a link, not what it leads to."""
    if path.is_dir() and not path.is_symlink():
        remove_tree(path)
    else:
        path.unlink(missing_ok=True)


# --- entries ------------------------------------------------------------------------------------


class _NotWhole(Exception):
    """Why an entry is not what was built."""


def _seal(stage: Path, key: Mapping[str, Any]) -> None:
    """Write down what a build left in ``stage``, which others may not write to, whatever the umask is."""
    for path in stage.rglob("*"):
        if not path.is_symlink():
            path.chmod(path.stat().st_mode & ~_OTHERS_MAY_WRITE)
    try:
        record = {"key": key, "files": _digests(stage)}
    except _NotWhole as error:
        raise EngineError(f"what was built cannot be kept: {error}") from None
    with (stage / _RECORD).open("x") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(json.dumps(record, indent=1, sort_keys=True) + "\n")


def _whole(path: Path, key: Mapping[str, Any]) -> bool:
    """Whether the entry is there, of this key, and holds exactly the files that were built, and nothing else."""
    try:
        with _opened(path / _RECORD) as file:
            record = json.loads(file.read(_MOST_RECORD_BYTES))
        digests = _digests(path)
        del digests[_RECORD]
    except (OSError, ValueError, RecursionError, _NotWhole):
        return False
    return bool(record == {"key": json.loads(json.dumps(key)), "files": digests})


def _digests(root: Path) -> dict[str, str]:
    """The SHA-256 of each file in a directory, by its path within. Raises :class:`_NotWhole` where it holds something
    else than files, or a directory without any, or what others may write to."""
    _check_kind(root, os.lstat(root), stat.S_ISDIR)
    files: dict[str, str] = {}
    for path in sorted(root.iterdir()):
        if stat.S_ISDIR(os.lstat(path).st_mode):
            files |= {f"{path.name}/{name}": digest for name, digest in _digests(path).items()}
        else:
            with _opened(path) as file:
                files[path.name] = hashlib.file_digest(file, "sha256").hexdigest()
    if not files:
        raise _NotWhole(f"{root} is empty")
    return files


def _opened(path: Path) -> io.BufferedReader:
    """The file, open to read. Raises :class:`_NotWhole` where it is none, or others may write to it, and OSError."""
    handle = os.open(path, os.O_RDONLY | _NO_LINK)
    try:
        _check_kind(path, os.fstat(handle), stat.S_ISREG)
    except _NotWhole:
        os.close(handle)
        raise
    return os.fdopen(handle, "rb")


def _check_kind(path: Path, found: os.stat_result, is_kind: Callable[[int], bool]) -> None:
    if not (is_kind(found.st_mode) and _is_owner_trusted(found)) or found.st_mode & _OTHERS_MAY_WRITE:
        raise _NotWhole(f"{path} is not a plain file or directory that only its owner writes to")
