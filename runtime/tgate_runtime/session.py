"""An opened bundle on one engine: the weights, once, for every request."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar, Unpack

from tgate_engine.bundle import Bundle
from tgate_engine.errors import BundleError, EngineError
from tgate_engine.manifest import Manifest
from tgate_engine.plan import Plan
from tgate_runtime.backends import Backend, Executable, OnBuild, Options, backend
from tgate_runtime.signatures import check_signatures

T = TypeVar("T")


class Session:
    """Loaded graphs and the manifest they came from. Thread-safe: open one, share it.

    What a request changes lies in its :class:`~tgate_runtime.binding.Binding`, which the session keeps for the next
    request of its kind (:meth:`lent`). Closing a session lets go of the graphs; bindings made before keep those they
    use until they are dropped themselves.
    """

    def __init__(self, bundle: Bundle, engine: Backend, executables: Mapping[str, Executable]) -> None:
        self.bundle = bundle
        self.backend = engine
        self._executables: Mapping[str, Executable] | None = executables
        self._idle: dict[Hashable, list[Any]] = {}
        self._lock = threading.Lock()

    @staticmethod
    def open(
        source: str | os.PathLike[str] | Bundle,
        *,
        engine: str = "ort-cpu",
        plans: Sequence[str | Plan] | None = None,
        graphs: Sequence[str] = (),
        check_digests: bool = True,
        on_build: OnBuild | None = None,
        **options: Unpack[Options],
    ) -> Session:
        """Check a bundle and load its graphs, so that what can fail fails here and not at the first step.

        ``source``: a bundle's directory, or a Bundle opened (and checked) before. ``engine``: one of
        :data:`tgate_runtime.backends.ENGINES`; ``options``: the fields of its
        :class:`~tgate_runtime.backends.EngineOptions`, such as ``threads=1``. ``on_build(done, total, graph)`` hears
        of graphs that an engine has to compile first.
        ``plans``: load the graphs of these plans alone (names, or plans that the bundle does not list), with the
        text or image graph and the decoder; None takes every plan of the bundle. ``graphs``: further graphs to load.

        Raises :class:`~tgate_engine.errors.BundleError`, ``PlanError`` or :class:`EngineError`.
        """
        loader = backend(engine, **options)
        bundle = source if isinstance(source, Bundle) else Bundle.open(source, check_digests=check_digests)
        return Session(bundle, loader, loader.load(bundle, graphs_of(bundle, plans, graphs), on_build))

    @property
    def manifest(self) -> Manifest:
        """The bundle's facts."""
        return self.bundle.manifest

    def graph(self, name: str) -> Executable:
        """A loaded graph. Raises :class:`EngineError` where it was not loaded, or the session is closed."""
        if self._executables is None:
            raise EngineError(f"the session of {self.bundle.path} is closed; open another one")
        if name not in self._executables:
            have = ", ".join(self._executables)
            raise EngineError(
                f"graph {name!r} is not loaded (loaded: {have}); name its plan in Session.open(plans=...)"
            )
        return self._executables[name]

    @contextmanager
    def lent(self, key: Hashable, make: Callable[[], T]) -> Iterator[T]:
        """What ``make()`` gave for ``key`` before and nobody uses now, or else what it gives; for one thread at a time.

        Making bindings costs buffers, and on a GPU a captured graph for each call, so they wait here for the next
        request: as many of a kind as there were at once. One whose engine fails is dropped.
        """
        with self._lock:
            idle = self._idle.get(key)
            found: T = idle.pop() if idle else None  # type: ignore[assignment]
        if found is None:
            found = make()
        sound = True
        try:
            yield found
        except EngineError:
            sound = False
            raise
        finally:
            with self._lock:
                if sound and self._executables is not None:
                    self._idle.setdefault(key, []).append(found)

    def trim(self) -> None:
        """Free the buffers of requests that have ended; the next ones make new ones."""
        with self._lock:
            self._idle.clear()

    def close(self) -> None:
        """Let go of the graphs, and of what waits for requests. A closed session stays closed; closing twice does
        nothing."""
        with self._lock:
            self._executables = None
            self._idle.clear()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def graphs_of(bundle: Bundle, plans: Sequence[str | Plan] | None = None, graphs: Sequence[str] = ()) -> tuple[str, ...]:
    """The graphs that a session of those plans loads, checked: see :meth:`Session.open`, which raises as this does."""
    manifest = bundle.manifest
    chosen = list(manifest.plans.values()) if plans is None else []
    for plan in plans or ():
        chosen.append(manifest.plan(plan) if isinstance(plan, str) else plan)
    for plan in chosen:
        plan.check(manifest)
    used = [name for plan in chosen for name in plan.graphs()]
    if not manifest.weights:
        raise BundleError(
            f"{bundle.path} was exported with --weights none: it can be inspected, not run; export it with weights"
        )
    around = [name for name in (manifest.text, manifest.image, manifest.decoder) if name]
    names = tuple(dict.fromkeys([*around, *used, *graphs]))
    check_signatures(manifest, names)
    return names
