"""The directory that holds everything, opened distrustfully."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from tgate_engine.atomic import is_half_written, locked, write_atomically
from tgate_engine.errors import BundleError, PlanError
from tgate_engine.manifest import MANIFEST_FILE, FileDigest, Manifest
from tgate_engine.manifest_json import dump_manifest, parse_manifest
from tgate_engine.plan import Plan
from tgate_engine.reader import check_name


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
        bundle._check_plans(manifest.plans)
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
            hashes = pool.map(sha256_of, [self.file(name) for name in self.manifest.files])
            for (name, want), got_digest in zip(self.manifest.files.items(), hashes, strict=True):
                if got_digest != want.sha256:
                    raise BundleError(
                        f"{self.path}: {name} has SHA-256 {got_digest[:16]}…, the manifest says {want.sha256[:16]}…; "
                        "the bundle is damaged: copy or export it again"
                    )

    def with_plans(self, plans: Mapping[str, Plan]) -> Bundle:
        """The bundle with more plans, in memory alone; each is checked. Raises :class:`PlanError`."""
        bundle = Bundle(self.path, replace(self.manifest, plans={**self.manifest.plans, **plans}))
        bundle._check_plans(plans)
        return bundle

    def save_plans(self, plans: Mapping[str, Plan], *, force: bool = False) -> Bundle:
        """The bundle as it lies on disk by now, with these plans more; its manifest is replaced atomically.

        Processes that do this at once wait for one another, so each one's plans are kept. Raises :class:`BundleError`
        where a name is taken (unless ``force``) or the manifest cannot be written, and :class:`PlanError`.
        """
        file = self.path / MANIFEST_FILE
        try:
            with locked(file):
                now = Bundle.open(self.path, check_digests=False)
                taken = [name for name in plans if name in now.manifest.plans]
                if taken and not force:
                    raise BundleError(
                        f"{self.path} already has a plan {taken[0]!r}; use another --name, or --force to replace it"
                    )
                bundle = now.with_plans(plans)
                write_atomically(file, dump_manifest(bundle.manifest).encode())
        except OSError as error:
            raise BundleError(
                f"{file} cannot be written ({error.strerror or error}); copy the bundle to where it can, and plan there"
            ) from error
        return bundle

    def size_bytes(self) -> int:
        """The size of all files on disk, the manifest included."""
        return sum(f.bytes for f in self.manifest.files.values()) + (self.path / MANIFEST_FILE).stat().st_size

    def _check_references(self) -> None:
        m = self.manifest
        for name in [
            *(name for name in (m.weights, m.samplers) if name),
            *(graph.file for shape in m.shapes for graph in shape.graphs.values()),
            *(t.file for t in m.tokenizers),
        ]:
            self.file(name)
        for shape in m.shapes:
            if missing := [name for name in m.conditioned_by("constant") if not shape.constants.get(name)]:
                raise BundleError(f"{self.path}: {shape.size} has no constant {missing[0]!r}; export the bundle again")
        for name, golden in m.goldens.items():
            self.file(golden.file)
            graphs = m.shapes_of(golden.size)[0].graphs
            if golden.plan is not None:
                golden.plan.check(graphs, m.carries)
            elif golden.graph not in graphs:
                raise BundleError(f"{self.path}: golden {name} names graph {golden.graph!r}, which is not there")

    def _check_plans(self, plans: Mapping[str, Plan]) -> None:
        for name, plan in plans.items():
            if plan.name != name:
                raise PlanError(f"plan {plan.name!r} is listed as {name!r}. Make it again with `tgate plan`.")
            for shape in self.manifest.shapes:
                plan.check(shape.graphs, self.manifest.carries)
            missing = [b for b in plan.baselines if b not in self.manifest.plans]
            if missing:
                raise PlanError(
                    f"plan {name!r} names baseline {missing[0]!r}, which is not there. Make it again with `tgate plan`."
                )


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hex; read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digests_of(root: Path) -> dict[str, FileDigest]:
    """Every file below ``root`` but the manifest, and what a killed run left, by its name inside the bundle."""
    files: dict[str, FileDigest] = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file() and not is_half_written(p.name)):
        name = path.relative_to(root).as_posix()
        if name != MANIFEST_FILE:
            files[check_name(name)] = FileDigest(sha256=sha256_of(path), bytes=path.stat().st_size)
    return files
