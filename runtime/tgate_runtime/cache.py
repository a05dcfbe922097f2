"""Compiled engines on disk: made once, found again by what they were made from.

An entry is a directory named by the digest of its key: graph and weights, the engine and its version, the device,
the shapes, the flags. Whoever builds holds a lock, so that two processes do not do the same work, and an entry gets
its name only when it is whole. What is found damaged is built again.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tgate_engine.errors import EngineError
from tgate_engine.underway import unfinished

_RECORD = "entry.json"


def cache_directory() -> Path:
    """``$TGATE_CACHE``, or ``tgate-engine`` in the user's cache directory. It may not exist yet."""
    if own := os.environ.get("TGATE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tgate-engine"


def find(key: Mapping[str, Any]) -> Path | None:
    """The directory of the whole entry of that key; None where there is none, or a damaged one."""
    path = cache_directory() / digest_of(key)
    return path if _whole(path, key) else None


def find_or_build(key: Mapping[str, Any], build: Callable[[Path], None]) -> Path:
    """The directory of the entry of that key; ``build(directory)`` fills it where there is none.

    ``key``: JSON values. Another process that builds the same entry is waited for. A build that raises, or is
    killed, leaves no entry. Raises :class:`EngineError` where the cache cannot be written, or a build finds something
    missing.
    """
    root, name = cache_directory(), digest_of(key)
    path = root / name
    if _whole(path, key):
        return path
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _lock(root / f"{name}.lock"):
            if _whole(path, key):  # another process was faster
                return path
            for leftover in root.glob(f"{name}.tmp-*"):  # of builders that were killed: the lock is ours
                _remove(leftover)
            stage = Path(tempfile.mkdtemp(dir=root, prefix=f"{name}.tmp-"))
            try:
                with unfinished(stage):
                    build(stage)
                files = {file.relative_to(stage).as_posix(): _digest(file) for file in _files(stage)}
                (stage / _RECORD).write_text(json.dumps({"key": key, "files": files}, indent=1, sort_keys=True) + "\n")
                _remove(path)
                os.rename(stage, path)
            finally:
                shutil.rmtree(stage, ignore_errors=True)
    except OSError as error:
        raise EngineError(
            f"building an engine in the cache {root} failed ({error}); if it cannot be written there, set TGATE_CACHE "
            "to a directory where it can"
        ) from error
    return path


def digest_of(key: Mapping[str, Any]) -> str:
    """The name of the entry of that key."""
    return hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:40]


def _whole(path: Path, key: Mapping[str, Any]) -> bool:
    try:
        record = json.loads((path / _RECORD).read_text())
        return bool(record["key"] == json.loads(json.dumps(key))) and all(
            _digest(path / name) == digest for name, digest in record["files"].items()
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _remove(path: Path) -> None:
    """Remove what is there, whatever it is; of a link, not what it leads to."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file())


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the lock of that file, waiting for it. The file stays: removing it would let two processes in."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
