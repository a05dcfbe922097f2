"""Files and directories that are either whole or not there: written beside their place and renamed."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tgate_engine.errors import BundleError
from tgate_engine.manifest import MANIFEST_FILE
from tgate_engine.underway import unfinished


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside ``path`` and rename over it: a reader sees the old file or the new one, whole."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:  # it would name the file beside it
        raise OSError(error.errno, error.strerror, str(path)) from None
    try:
        with unfinished(Path(name)), _a_full_disk_is_named(path.parent), os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


@contextlib.contextmanager
def staging(target: Path, *, force: bool = False) -> Iterator[Path]:
    """A directory to build a bundle in; renamed to ``target`` when the block ends without an error.

    An error, or a kill, leaves ``target`` as it was. What a killed run left behind is removed by the next run
    for the same target. With ``force`` an existing bundle is exchanged in one step; a directory that is neither
    empty nor a bundle is never replaced. Raises :class:`BundleError` where ``target`` is in the way.
    """
    target = Path(os.path.abspath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{target.name}.staging-"
    _recover(target)
    check_target(target, force)
    _remove_abandoned(target.parent, prefix)
    stage, lock = _locked_directory(target.parent, prefix)
    try:
        os.chmod(stage, 0o755)
        with unfinished(stage), _a_full_disk_is_named(target.parent):
            yield stage
            _sync(stage)
        check_target(target, force)
        _commit(stage, target)
    finally:
        shutil.rmtree(stage, ignore_errors=True)
        os.close(lock)


@contextlib.contextmanager
def _a_full_disk_is_named(directory: Path) -> Iterator[None]:
    """Turns "no space left" from whoever writes into ``directory`` into one line that says where.

    Libraries that write in C or Rust raise classes of their own, which hold the system's words alone.
    """
    try:
        yield
    except Exception as error:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or os.strerror(errno.ENOSPC) in str(error):
            raise BundleError(f"there is no space left in {directory}; free some, or write elsewhere") from error
        raise


def check_target(target: Path, force: bool) -> None:
    """What :func:`staging` will find in its way, known before the work. Raises :class:`BundleError`."""
    if not os.path.lexists(target):
        return
    if not target.is_dir() or target.is_symlink():
        raise BundleError(f"{target} exists and is not a directory; choose another --output")
    if not force:
        raise BundleError(f"{target} exists already; choose another --output, or --force to replace it")
    if any(target.iterdir()) and not (target / MANIFEST_FILE).is_file():
        raise BundleError(f"{target} is not a bundle (it has no {MANIFEST_FILE}), so --force does not replace it")


def _commit(stage: Path, target: Path) -> None:
    """Give ``stage`` the name ``target``. What was there ends up in ``stage``, which the caller removes."""
    if not target.exists():
        os.rename(stage, target)
    elif not _exchange(stage, target):
        # No atomic exchange on this file system: the old bundle keeps a name of its own until the new one is in place.
        # A kill in between leaves that name, and the next export puts it back (_recover).
        os.rename(target, _previous(target))
        os.rename(stage, target)
        shutil.rmtree(_previous(target), ignore_errors=True)
    _sync_directory(target.parent)


def _exchange(a: Path, b: Path) -> bool:
    """Swap two names in one step (Linux renameat2 with RENAME_EXCHANGE); False where that cannot be had."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    at_fdcwd, rename_exchange = -100, 2
    if renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(b))


def _previous(target: Path) -> Path:
    return target.with_name(f".{target.name}.previous")


def _recover(target: Path) -> None:
    """Undo or finish a replacement that was killed half way, where names could not be exchanged in one step."""
    if _previous(target).is_dir():
        if target.exists():
            shutil.rmtree(_previous(target), ignore_errors=True)
        else:
            os.rename(_previous(target), target)


def _locked_directory(parent: Path, prefix: str) -> tuple[Path, int]:
    """A new directory and a handle that holds its lock for as long as this process lives."""
    while True:
        path = Path(tempfile.mkdtemp(dir=parent, prefix=prefix))
        try:
            lock = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another export took it for abandoned before it was locked
        fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path, lock
        os.close(lock)


def _remove_abandoned(parent: Path, prefix: str) -> None:
    """Remove the staging directories of runs that were killed: nobody holds their lock any more."""
    for path in parent.glob(f"{prefix}*"):
        try:
            handle = os.open(path, os.O_RDONLY)
        except OSError:
            continue
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            continue
        else:
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(handle)


def _sync(root: Path) -> None:
    for path in root.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
