"""The directory that holds everything: opened distrustfully, written atomically."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tgate_engine.errors import BundleError
from tgate_engine.manifest import MANIFEST_FILE, FileDigest, Manifest, check_name, dump_manifest, parse_manifest
from tgate_engine.plan import Plan


@dataclass(frozen=True)
class Bundle:
    """A bundle's directory and its manifest. Nothing of it is in memory but the manifest."""

    path: Path
    manifest: Manifest

    @staticmethod
    def open(path: str | os.PathLike[str], *, check_digests: bool = True) -> Bundle:
        """Read the manifest, check every plan, and every file's presence, size and (by default) SHA-256.

        Raises :class:`BundleError` or :class:`PlanError` with the first fault found.
        """
        root = Path(path)
        if not root.is_dir():
            raise BundleError(f"{root} is not a bundle: there is no such directory. Make one with `tgate-export`.")
        file = root / MANIFEST_FILE
        try:
            manifest = parse_manifest(file.read_bytes())
        except FileNotFoundError:
            raise BundleError(f"{root} is not a bundle: it has no {MANIFEST_FILE}") from None
        except IsADirectoryError:
            raise BundleError(f"{root} is not a bundle: {MANIFEST_FILE} is a directory") from None
        bundle = Bundle(root, manifest)
        bundle._check_references()
        bundle.check_files(digests=check_digests)
        for plan in manifest.plans.values():
            plan.check(manifest)
        return bundle

    def file(self, name: str) -> Path:
        """The path of a file that the manifest lists. Raises :class:`BundleError` for any other name."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: the manifest lists no file {name!r}; export the bundle again")
        return self.path / check_name(name)

    def check_files(self, *, digests: bool = True) -> None:
        """Every listed file is there, a plain file, of its size and, with ``digests``, its SHA-256."""
        for name, want in self.manifest.files.items():
            path = self.file(name)
            if not path.is_file() or path.resolve() != self.path.resolve() / name:
                raise BundleError(
                    f"{self.path}: {name} is missing or not a plain file; copy or export the bundle again"
                )
            got = path.stat().st_size
            if got != want.bytes:
                raise BundleError(
                    f"{self.path}: {name} holds {got} bytes, the manifest says {want.bytes}; "
                    "the bundle is damaged: copy or export it again"
                )
        if not digests:
            return
        with ThreadPoolExecutor() as pool:
            found = pool.map(sha256_of, [self.file(name) for name in self.manifest.files])
            for (name, want), got_digest in zip(self.manifest.files.items(), found, strict=True):
                if got_digest != want.sha256:
                    raise BundleError(
                        f"{self.path}: {name} has SHA-256 {got_digest[:16]}…, the manifest says {want.sha256[:16]}…; "
                        "the bundle is damaged: copy or export it again"
                    )

    def with_plans(self, plans: Mapping[str, Plan]) -> Bundle:
        """The bundle with more plans, in memory alone; each is checked. Raises :class:`PlanError`."""
        manifest = replace(self.manifest, plans={**self.manifest.plans, **plans})
        for plan in plans.values():
            plan.check(manifest)
        return Bundle(self.path, manifest)

    def with_plan(self, plan: Plan, *, force: bool = False) -> Bundle:
        """The bundle with one more plan, its manifest replaced atomically on disk.

        Raises :class:`BundleError` where the name is taken (unless ``force``).
        """
        if plan.name in self.manifest.plans and not force:
            raise BundleError(
                f"{self.path} already has a plan {plan.name!r}; use another --name, or --force to replace it"
            )
        bundle = self.with_plans({plan.name: plan})
        write_atomically(self.path / MANIFEST_FILE, dump_manifest(bundle.manifest).encode())
        return bundle

    def size_bytes(self) -> int:
        """The size of all files on disk, the manifest included."""
        return sum(f.bytes for f in self.manifest.files.values()) + (self.path / MANIFEST_FILE).stat().st_size

    def _check_references(self) -> None:
        m = self.manifest
        for graph in (m.text, m.image, m.decoder):
            if graph and graph not in m.graphs:
                raise BundleError(f"{self.path}: the manifest names graph {graph!r} but does not describe it")
        for name in [
            *([m.weights] if m.weights else []),
            *(g.file for g in m.graphs.values()),
            *(t.file for t in m.tokenizers),
        ]:
            self.file(name)
        for golden in m.goldens.values():
            self.file(golden.file)
            if golden.plan is not None:
                golden.plan.check(m)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hex; read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests_of(root: Path) -> dict[str, FileDigest]:
    """Every file below ``root`` but the manifest, by its name inside the bundle."""
    found: dict[str, FileDigest] = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        name = path.relative_to(root).as_posix()
        if name != MANIFEST_FILE:
            found[check_name(name)] = FileDigest(sha256=sha256_of(path), bytes=path.stat().st_size)
    return found


def write_atomically(path: Path, content: bytes) -> None:
    """Write beside ``path`` and rename over it: a reader sees the old file or the new one, whole."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with _a_full_disk_is_named(path.parent), os.fdopen(handle, "wb") as file:
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
    _check_target(target, force)
    _remove_abandoned(target.parent, prefix)
    stage, lock = _locked_directory(target.parent, prefix)
    try:
        os.chmod(stage, 0o755)
        with _a_full_disk_is_named(target.parent):
            yield stage
            _sync(stage)
        _check_target(target, force)
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


def _check_target(target: Path, force: bool) -> None:
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
