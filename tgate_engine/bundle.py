"""The directory that holds everything, opened distrustfully."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from io import BufferedReader
from pathlib import Path

from tgate_engine.atomic import is_half_written, locked, write_atomically
from tgate_engine.control import check_control, controls_for
from tgate_engine.errors import BundleError, PlanError, shown
from tgate_engine.graph import CONTROL, DENOISE, GraphSpec
from tgate_engine.manifest import MANIFEST_FILE, Adapter, FileDigest, Manifest
from tgate_engine.manifest_json import MOST_BYTES, dump_manifest, parse_manifest
from tgate_engine.plain_files import FileState, open_inside, read_most, state_of
from tgate_engine.plan import Plan
from tgate_engine.plan_check import PlanCheck
from tgate_engine.reader import MOST_LETTERS, check_name, is_word

MOST_READ_BYTES = 1 << 31
"""How much of a file :meth:`Bundle.read` takes into memory; goldens of long videos hold hundreds of megabytes."""


DEFAULT = "default"
"""The plan that a request takes where it names none."""


@dataclass(frozen=True)
class Bundle:
    """A bundle's directory and its manifest. Nothing of it is in memory but the manifest.

    ``states``: which file each name led to when it was checked; empty for a bundle that was not opened by :meth:`open`.
    """

    path: Path
    manifest: Manifest
    states: Mapping[str, FileState] = field(default_factory=dict, compare=False)

    @staticmethod
    def open(path: str | os.PathLike[str], *, check_digests: bool = True) -> Bundle:
        """Read the manifest, check every plan, and every file's presence, size and (by default) SHA-256.

        Raises :class:`BundleError` or :class:`PlanError` with the first fault found.
        """
        root = Path(path)
        if not root.is_dir():
            raise BundleError(f"{root} is not a bundle: there is no such directory. Make one with `tgate-export`.")
        manifest = parse_manifest(_read_manifest(root))
        bundle = Bundle(root, manifest)
        bundle._check_references()
        bundle = replace(bundle, states=bundle.check_files(digests=check_digests))
        bundle._check_plans(manifest.plans)
        bundle._check_shapes()
        return bundle

    def checked(self) -> Bundle:
        """The bundle with the SHA-256 of every file checked, for one that was opened without, because what is cheaper
        was to be asked first. Raises :class:`BundleError`."""
        return replace(self, states=self.check_files())

    def file(self, name: str) -> Path:
        """The path of a file that the manifest lists. Raises :class:`BundleError` for any other name."""
        if name not in self.manifest.files:
            raise BundleError(f"{self.path}: the manifest lists no file {name!r:.60}; export the bundle again")
        return self.path / check_name(name)

    def read(self, name: str, most_bytes: int = MOST_READ_BYTES) -> bytes:
        """A listed file whole, of the size and the SHA-256 that the manifest says, however the bundle was opened.

        Raises :class:`BundleError` for anything else, and for more than ``most_bytes``.
        """
        self.file(name)
        want = self.manifest.files[name]
        with self._opened(name) as file:
            self._check_size(name, state_of(file))
            content = read_most(file, most_bytes)
        self._check_digest(name, hashlib.sha256(content).hexdigest())
        if len(content) != want.bytes:
            raise BundleError(self._changed(name))
        return content

    def check_files(self, *, digests: bool = True) -> dict[str, FileState]:
        """Every listed file is there, a plain file, of its size and, with ``digests``, its SHA-256; their states.

        A file is hashed through the descriptor that is asked for its state.
        """
        states: dict[str, FileState] = {}
        for name in self.manifest.files:
            with self._opened(name) as file:
                states[name] = state_of(file)
            self._check_size(name, states[name])
        if digests:
            with ThreadPoolExecutor() as pool:
                hashed = pool.map(self._hashed, self.manifest.files)
                for (name, state), (digest, before, after) in zip(states.items(), hashed, strict=True):
                    self._check_digest(name, digest)
                    if not state == before == after:
                        raise BundleError(self._changed(name))
        return states

    def check_unchanged(self, names: Iterable[str]) -> None:
        """Every name leads to the file that it led to when it was checked, and nobody has written to it since.

        An engine that opens files by their names has so read what was checked. Raises :class:`BundleError`.
        """
        for name in names:
            if name in self.states:
                with self._opened(name) as file:
                    if state_of(file) != self.states[name]:
                        raise BundleError(self._changed(name))

    def with_plans(self, plans: Mapping[str, Plan]) -> Bundle:
        """The bundle with more plans, in memory alone; each is checked. Raises :class:`PlanError`."""
        bundle = replace(self, manifest=replace(self.manifest, plans={**self.manifest.plans, **plans}))
        bundle._check_plans(plans)
        return bundle

    def check_free(self, names: Iterable[str]) -> None:
        """Raises :class:`BundleError` for the first of ``names`` that a plan of the bundle has."""
        for name in names:
            if name in self.manifest.plans:
                raise BundleError(
                    f"{self.path} already has a plan {name!r}; use another --name, or --force to replace it"
                )

    def save_plans(self, plans: Mapping[str, Plan], *, force: bool = False) -> Bundle:
        """The bundle as it lies on disk by now, with these plans more; its manifest is replaced atomically.

        Processes that do this at once wait for one another, so each one's plans are kept. Raises :class:`BundleError`
        where a name is taken (unless ``force``) or the manifest cannot be written, and :class:`PlanError`.
        """

        def add(now: Bundle) -> Bundle:
            if not force:
                now.check_free(plans)
            return now.with_plans(plans)

        return self._rewritten(add)

    def remove_plans(self, names: Collection[str]) -> Bundle:
        """The bundle as it lies on disk by now, without these plans; its manifest is replaced as :meth:`save_plans`
        does it.

        Raises :class:`BundleError` for a name that is not there, for :data:`DEFAULT`, for a plan that one of those that
        stay names as its baseline, and where the manifest cannot be written.
        """

        def remove(now: Bundle) -> Bundle:
            plans = dict(now.manifest.plans)
            for name in dict.fromkeys(names):
                now.manifest.plan(name)
                if name == DEFAULT:
                    raise BundleError(f"plan {DEFAULT!r} is taken by every request that names none; it stays")
                del plans[name]
            for plan in plans.values():
                if used := [name for name in plan.baselines if name in names]:
                    raise BundleError(
                        f"plan {used[0]!r} is what {plan.name!r} is measured against, and stays as long as that does"
                    )
            return replace(now, manifest=replace(now.manifest, plans=plans))

        return self._rewritten(remove)

    def save_adapter(self, name: str, adapter: Adapter, content: bytes, *, force: bool = False) -> Bundle:
        """The bundle as it lies on disk by now, with an adapter more, of whose file ``content`` is all; written as
        :meth:`save_plans` writes. Raises :class:`BundleError` where the name is taken (unless ``force``), or nothing
        can be written."""

        def add(now: Bundle) -> Bundle:
            if name in now.manifest.adapters and not force:
                raise BundleError(
                    f"{self.path} already has an adapter {name!r}; use another --name, or --force to replace it"
                )
            digest = FileDigest(sha256=hashlib.sha256(content).hexdigest(), bytes=len(content))
            files = {**now.manifest.files, adapter.file: digest}
            return _with_adapters(now, {**now.manifest.adapters, name: adapter}, files)

        return self._rewritten(add, {adapter.file: content})

    def remove_adapters(self, names: Collection[str]) -> Bundle:
        """The bundle as it lies on disk by now, without these adapters. Raises :class:`BundleError` for a name that is
        not there, and where the manifest cannot be written."""

        def remove(now: Bundle) -> Bundle:
            adapters = dict(now.manifest.adapters)
            for name in dict.fromkeys(names):
                if name not in adapters:
                    raise BundleError(
                        f"{self.path} has no adapter {name!r:.60}; it has {', '.join(sorted(adapters)) or 'none'}"
                    )
                del adapters[name]
            return _with_adapters(now, adapters, now.manifest.files)

        return self._rewritten(remove)

    def _rewritten(self, change: Callable[[Bundle], Bundle], added: Mapping[str, bytes] | None = None) -> Bundle:
        """What ``change`` makes of the bundle as it lies on disk, once its manifest is written, under its lock; the
        files ``added`` are written before it. Raises :class:`BundleError` for what could not be opened again."""
        file = self.path / MANIFEST_FILE
        try:
            with locked(file):
                before = Bundle.open(self.path, check_digests=False)
                bundle = change(before)
                text = dump_manifest(bundle.manifest).encode()
                parse_manifest(text)
                try:
                    for name, content in (added or {}).items():
                        bundle._add(name, content)
                    write_atomically(file, text)
                finally:
                    bundle._sweep({*(added or ()), *(adapter.file for adapter in before.manifest.adapters.values())})
        except OSError as error:
            raise BundleError(
                f"{file} cannot be written ({error.strerror or error}); copy the bundle to where it can, and change it"
            ) from error
        return bundle

    def _add(self, name: str, content: bytes) -> None:
        """Write a file of a folder, and see that it is where the bundle is: the folder may be a link."""
        file = self.path / check_name(name)
        file.parent.mkdir(exist_ok=True)
        if file.parent.is_symlink():
            raise BundleError(f"{file.parent} is a link, and links in a bundle are not followed; remove it")
        write_atomically(file, content)

    def _sweep(self, names: Iterable[str]) -> None:
        """Remove those files that the manifest on disk does not list, whoever wrote it last and whatever ended that."""
        listed = parse_manifest(_read_manifest(self.path)).files
        for name in names:
            if name not in listed:
                with contextlib.suppress(OSError):
                    (self.path / check_name(name)).unlink()

    def size_bytes(self) -> int:
        """The size of all files on disk, the manifest included."""
        return sum(f.bytes for f in self.manifest.files.values()) + (self.path / MANIFEST_FILE).stat().st_size

    @contextmanager
    def _opened(self, name: str) -> Iterator[BufferedReader]:
        """A listed file, open. Raises :class:`BundleError` where there is no plain file of that name, or reading
        fails."""
        try:
            with open_inside(self.path, check_name(name)) as file:
                yield file
        except OSError as error:
            raise BundleError(
                f"{self.path}: {name} is missing or not a plain file ({error.strerror or error}); copy or export the "
                "bundle again"
            ) from None

    def _hashed(self, name: str) -> tuple[str, FileState, FileState]:
        """A file's SHA-256, and its states before and after it was read."""
        with self._opened(name) as file:
            before = state_of(file)
            return hashlib.file_digest(file, "sha256").hexdigest(), before, state_of(file)

    def _check_size(self, name: str, state: FileState) -> None:
        want = self.manifest.files[name].bytes
        if state.bytes != want:
            raise BundleError(
                f"{self.path}: {name} holds {state.bytes} bytes, the manifest says {want}; "
                "the bundle is damaged: copy or export it again"
            )

    def _check_digest(self, name: str, digest: str) -> None:
        want = self.manifest.files[name].sha256
        if digest != want:
            raise BundleError(
                f"{self.path}: {name} has SHA-256 {digest[:16]}…, the manifest says {want[:16]}…; "
                "the bundle is damaged: copy or export it again"
            )

    def _changed(self, name: str) -> str:
        return f"{self.path}: {name} was changed after it was checked; open the bundle again"

    def _check_references(self) -> None:
        m = self.manifest
        for name in [
            *(name for name in (m.weights, m.samplers) if name),
            *(graph.file for shape in m.shapes for graph in shape.graphs.values()),
            *(t.file for t in m.tokenizers),
            *(adapter.file for adapter in m.adapters.values()),
        ]:
            self.file(name)
        for shape in m.shapes:
            if missing := [name for name in m.conditioned_by("constant") if not shape.constants.get(name)]:
                raise BundleError(f"{self.path}: {shape.size} has no constant {missing[0]!r}; export the bundle again")
            beside = controls_for(shape.graphs, [n for n, spec in shape.graphs.items() if spec.role == DENOISE])
            for name, graph in shape.graphs.items():
                if graph.role == CONTROL and name not in beside:
                    raise BundleError(f"{self.path}: graph {name!r} gives what no denoising graph takes")
                if graph.role == CONTROL:
                    check_control((shape.height, shape.width), shape.batch, name, graph)
        checks: dict[str, PlanCheck] = {}
        for name, golden in m.goldens.items():
            self.file(golden.file)
            graphs = m.shapes_of(golden.size)[0].graphs
            if golden.plan is not None:
                if golden.size not in checks:
                    checks[golden.size] = PlanCheck([graphs], m.carries)
                checks[golden.size](golden.plan)
            elif golden.graph not in graphs:
                raise BundleError(f"{self.path}: golden {name} names graph {golden.graph!r}, which is not there")

    def _check_shapes(self) -> None:
        """What is looked up by a name is there once: a shape by its size and batch, a graph by its file."""
        shapes: set[tuple[str, tuple[int, int]]] = set()
        graphs: dict[str, GraphSpec] = {}
        for shape in self.manifest.shapes:
            if (shape.size, shape.batch) in shapes:
                raise BundleError(f"{self.path}: there are two shapes {shape.size} of batch {list(shape.batch)}")
            shapes.add((shape.size, shape.batch))
            for spec in shape.graphs.values():
                if graphs.setdefault(spec.file, spec) != spec:
                    raise BundleError(f"{self.path}: {spec.file} is described twice, and differently")

    def _check_plans(self, plans: Mapping[str, Plan]) -> None:
        check = PlanCheck([shape.graphs for shape in self.manifest.shapes], self.manifest.carries)
        for name, plan in plans.items():
            if not is_word(name):
                raise PlanError(
                    f"a plan's name is 1 to {MOST_LETTERS} printable characters, got '{shown(name)}'; take another"
                )
            if plan.name != name:
                raise PlanError(f"plan {plan.name!r} is listed as {name!r}. Make it again with `tgate plan`.")
            if not self.manifest.takes_scale(plan.guidance_scale):
                raise PlanError(
                    f"plan {name!r} has guidance scale {plan.guidance_scale}, which does not fit a bundle "
                    f"{'with' if self.manifest.guided else 'without'} guidance. Make it again with `tgate plan`."
                )
            check(plan)
            missing = [b for b in plan.baselines if b not in self.manifest.plans]
            if missing:
                raise PlanError(
                    f"plan {name!r} names baseline {missing[0]!r}, which is not there. Make it again with `tgate plan`."
                )


def _with_adapters(bundle: Bundle, adapters: Mapping[str, Adapter], files: Mapping[str, FileDigest]) -> Bundle:
    """With those adapters, and of adapters' files those that they name."""
    named = {adapter.file for adapter in adapters.values()}
    gone = {adapter.file for adapter in bundle.manifest.adapters.values()} - named
    left = {name: digest for name, digest in files.items() if name not in gone}
    return replace(bundle, manifest=replace(bundle.manifest, adapters=adapters, files=left))


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file, in hex; read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read_manifest(root: Path) -> bytes:
    try:
        with open_inside(root, MANIFEST_FILE) as file:
            return read_most(file, MOST_BYTES)
    except FileNotFoundError:
        raise BundleError(f"{root} is not a bundle: it has no {MANIFEST_FILE}") from None
    except OSError as error:
        raise BundleError(
            f"{root} is not a bundle: {MANIFEST_FILE} cannot be read as a plain file ({error.strerror or error})"
        ) from None


def digests_of(root: Path) -> dict[str, FileDigest]:
    """Every file below ``root`` but the manifest, and what a killed run left, by its name inside the bundle."""
    files: dict[str, FileDigest] = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file() and not is_half_written(p.name)):
        name = path.relative_to(root).as_posix()
        if name != MANIFEST_FILE:
            files[check_name(name)] = FileDigest(sha256=sha256_of(path), bytes=path.stat().st_size)
    return files
