"""Files and directories that are either whole or not there: written beside their place and renamed.

What is half written bears a name of its own, ``.<name>.tmp-<16 digits>`` or ``.<name>.staging-<16 digits>``, and a lock
that ends with its process. So whoever next writes the same thing knows what a killed run left, and removes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tgate_engine.errors import BundleError, TgateError
from tgate_engine.manifest import MANIFEST_FILE
from tgate_engine.underway import unfinished

_FILE, _STAGE, _PREVIOUS = "tmp", "staging", "previous"
_MARK = re.compile(rf"\..+\.({_FILE}|{_STAGE}|{_PREVIOUS})-[0-9a-f]{{16}}", re.DOTALL)
_NO_LOCKS = (errno.EBADF, errno.EINVAL, errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""How file systems say that they have no locks, or none of directories, as some of a network do."""
_PATIENCE_S = 60.0


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside ``path`` and rename over it: a reader sees the old file or the new one, whole.

    A file that is replaced hands on its mode; a new one has what the umask leaves of 0666. A link is replaced itself:
    nothing is written where it leads. Raises :class:`BundleError` where something else than a file is in the way, or
    the disk is full, and OSError.
    """
    mode = _mode_of_file(path)
    with _naming(path):
        _remove_abandoned(path, _FILE)
    name = path.with_name(_marked(path, _FILE))
    try:  # before the file is there: a signal may come the moment that the system has made it
        with unfinished(name), naming_a_full_disk(path.parent):
            with _naming(path):
                handle = _new_file(name, 0o666 if mode is None else 0o600)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                if mode is not None:
                    os.fchmod(file.fileno(), mode)
                os.fsync(file.fileno())
                os.replace(name, path)  # still locked: until then it is nobody's leftover
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    _sync_directory(path.parent)


@contextlib.contextmanager
def staging(target: Path, *, force: bool = False) -> Iterator[Path]:
    """A directory to build a bundle in; renamed to ``target`` when the block ends without an error.

    An error, or a kill, leaves ``target`` as it was. What a killed run left behind is removed by the next run
    for the same target. With ``force`` an existing bundle is exchanged in one step, and hands on its mode; a directory
    that is neither empty nor a bundle is never replaced. Raises :class:`BundleError` where ``target`` is in the way.
    """
    target = Path(os.path.abspath(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    _recover(target)
    _check_free(target, force)
    _remove_abandoned(target, _STAGE)
    stage, lock = target.with_name(_marked(target, _STAGE)), None
    try:
        with unfinished(stage), naming_a_full_disk(target.parent):
            lock = _new_directory(stage)
            yield stage
            _sync(stage)
        _check_free(target, force)
        _commit(stage, target)
    finally:
        remove_tree(stage)
        if lock is not None:
            os.close(lock)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file that others replace under the same lock; the file at ``path`` stays what it is meanwhile.

    The lock ends with the process. Raises :class:`BundleError` where another process holds it for a minute, and OSError
    where there is no such file. On a file system without locks there is none, and the block runs all the same.
    """
    deadline = time.monotonic() + _PATIENCE_S
    while True:
        handle = _open_to_lock(path)
        try:
            if not _lock(handle, wait=False):
                if time.monotonic() > deadline:
                    raise BundleError(
                        f"{path} has been locked by another process for {_PATIENCE_S:.0f} s; wait for it, or end it"
                    )
                time.sleep(0.02)
            elif _is_at(handle, path):  # or it was replaced while this process waited
                yield
                return
        finally:
            os.close(handle)


@contextlib.contextmanager
def naming_a_full_disk(directory: Path) -> Iterator[None]:
    """Turns "no space left" from whoever writes into ``directory`` into one line that says where."""
    try:
        yield
    except Exception as error:
        if is_full_disk(error):
            raise BundleError(f"there is no space left in {directory}; free some, or write elsewhere") from error
        raise


def is_full_disk(error: BaseException | None) -> bool:
    """Whether an error says that there is no space left, or one that it came from does.

    Libraries that write in C or Rust raise classes of their own, which hold the system's words alone.
    """
    while error is not None:
        full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if full or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_half_written(name: str) -> bool:
    """Whether a file or directory of that name is what a run that was killed, or is at work, keeps beside its place."""
    return _MARK.fullmatch(name) is not None


def remove_tree(path: Path) -> None:
    """Remove a directory and what is in it, directories that may not be written to as well; links are not followed.

    What cannot be removed stays.
    """
    for folder, _, _ in os.walk(path):
        with contextlib.suppress(OSError):
            os.chmod(folder, 0o700)
    shutil.rmtree(path, ignore_errors=True)


def check_place(path: Path, error: type[TgateError]) -> None:
    """What :func:`write_atomically` will find in its way, known before the work, which writing a file beside ``path``
    tells. Raises ``error``."""
    if not path.parent.is_dir():
        raise error(f"{path}: there is no directory {path.parent}; make it first")
    check_replaceable(path, error)
    try:
        tempfile.TemporaryFile(dir=path.parent).close()
    except OSError as fault:
        raise error(f"{path} cannot be written ({fault.strerror}); name another place") from None


def check_replaceable(path: Path, error: type[TgateError]) -> None:
    """Whatever is at ``path`` is a file, or a link, if there is anything. Raises ``error``."""
    if path.is_dir():
        raise error(f"{path} is a directory; name a file in it")
    try:
        _mode_of_file(path)
    except BundleError as fault:
        raise error(str(fault)) from None
    except OSError as fault:
        raise error(f"{path} cannot be written ({fault.strerror}); name another place") from None


def _mode_of_file(path: Path) -> int | None:
    """The permissions of the file that is replaced; None where there is none, or a link, which has none of its own."""
    try:
        found = os.lstat(path).st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISREG(found):
        return stat.S_IMODE(found) & 0o777
    if not stat.S_ISLNK(found):
        raise BundleError(f"{path} exists and is not a file; name another place")
    return None


def check_target(target: Path, force: bool) -> None:
    """What :func:`staging` will find in its way, known before the work, which making a directory where ``target`` will
    lie tells. Raises :class:`BundleError`."""
    _check_free(target, force)
    parents = Path(os.path.abspath(target)).parents
    there = next(folder for folder in parents if os.path.lexists(folder))  # those below it will be made
    probe = there / _marked(target, _STAGE)
    try:
        os.mkdir(probe)
        os.rmdir(probe)
    except OSError as fault:
        raise BundleError(
            f"{target} cannot be written (in {there}: {fault.strerror}); choose another --output"
        ) from None
    except BaseException:  # a signal, perhaps before the second call
        with contextlib.suppress(OSError):
            os.rmdir(probe)
        raise


def _check_free(target: Path, force: bool) -> None:
    """Nothing lies where the bundle will, or what it may replace."""
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
    elif _is_plain(target / MANIFEST_FILE):
        with locked(target / MANIFEST_FILE):  # whoever adds a plan adds it to the old bundle, or to the new one
            _replace(stage, target)
    else:
        _replace(stage, target)
    _sync_directory(target.parent)


def _replace(stage: Path, target: Path) -> None:
    os.chmod(stage, stat.S_IMODE(target.stat().st_mode) & 0o777)
    if not _exchange(stage, target):
        # No atomic exchange on this file system: the old bundle keeps a name of its own until the new one is in place.
        # A kill in between leaves that name, and the next export puts it back (_recover).
        previous = target.with_name(_marked(target, _PREVIOUS))
        lock = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            _lock(lock, wait=True)
            os.rename(target, previous)
            os.rename(stage, target)
            remove_tree(previous)
        finally:
            os.close(lock)


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


def _recover(target: Path) -> None:
    """Undo or finish a replacement that was killed half way, where names could not be exchanged in one step."""
    with _abandoned(target, _PREVIOUS) as left:
        for path in left:
            if target.exists():
                remove_tree(path)
            else:
                os.rename(path, target)


# --- names, and their locks ---------------------------------------------------------------------


def _marked(path: Path, kind: str) -> str:
    """A name for what will become ``path``."""
    return f".{path.name}.{kind}-{secrets.token_hex(8)}"


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """An OSError names ``path``, and not what is written beside it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None


def _new_file(name: Path, mode: int) -> int:
    """Make a file; a handle that writes it and holds its lock."""
    while True:
        handle = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
        _lock(handle, wait=True)
        if _is_at(handle, name):
            return handle
        os.close(handle)  # another process took it for abandoned before it was locked


def _new_directory(name: Path) -> int:
    """Make a directory; a handle that holds its lock."""
    while True:
        os.mkdir(name)
        try:
            handle = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            continue  # another process took it for abandoned before it was locked
        _lock(handle, wait=True)
        if _is_at(handle, name):
            return handle
        os.close(handle)


def _remove_abandoned(path: Path, kind: str) -> None:
    """Remove what killed runs left of what should have become ``path``."""
    with _abandoned(path, kind) as leftovers:
        for leftover in leftovers:
            if kind == _FILE:
                leftover.unlink(missing_ok=True)
            else:
                remove_tree(leftover)


@contextlib.contextmanager
def _abandoned(path: Path, kind: str) -> Iterator[list[Path]]:
    """What killed runs left of ``path``: of our own, a plain file or a directory, and nobody holds its lock but we."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.{kind}-[0-9a-f]{{16}}")
    is_kind = stat.S_ISREG if kind == _FILE else stat.S_ISDIR
    found: list[Path] = []
    with contextlib.ExitStack() as held:
        try:
            names = [name for name in os.listdir(path.parent) if pattern.fullmatch(name)]
        except PermissionError:  # a directory that may be written to, and not listed
            names = []
        for name in names:
            leftover = path.with_name(name)
            try:
                handle = os.open(leftover, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError:
                continue
            held.callback(os.close, handle)
            status = os.fstat(handle)
            ours = status.st_uid == os.geteuid() and is_kind(status.st_mode)
            if ours and _lock(handle, wait=False, otherwise=False):
                found.append(leftover)
        yield found


def _open_to_lock(path: Path) -> int:
    flags = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(path, os.O_RDWR | flags)  # some network file systems lock only what may be written
    except PermissionError:
        return os.open(path, os.O_RDONLY | flags)


def _lock(handle: int, *, wait: bool, otherwise: bool = True) -> bool:
    """Take the lock of an open file or directory; False where another holds it, ``otherwise`` where there are none."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return otherwise
        raise
    return True


def _is_at(handle: int, path: Path) -> bool:
    """Whether what is open is what bears that name."""
    try:
        return os.path.samestat(os.fstat(handle), os.lstat(path))
    except FileNotFoundError:
        return False


def _sync(root: Path) -> None:
    for folder, _, files in os.walk(root):
        for path in (Path(folder, name) for name in files):
            if _is_plain(path):
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        _sync_directory(Path(folder))


def _sync_directory(path: Path) -> None:
    try:
        handle = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:  # it may be written to, and not read
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that keeps directories in its own way
            raise
    finally:
        os.close(handle)


def _is_plain(path: Path) -> bool:
    return path.is_file() and not path.is_symlink()
