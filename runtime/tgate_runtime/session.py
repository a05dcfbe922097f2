"""An opened bundle on one engine: the weights, once, for every request."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TypeVar, Unpack

from tgate_engine.bundle import Bundle
from tgate_engine.control import controls_for
from tgate_engine.errors import BundleError, EngineError, RequestError, shown
from tgate_engine.graph import CONTROL, DENOISE, ENCODE, REFERENCE, GraphSpec, Role
from tgate_engine.manifest import Manifest, Shape
from tgate_engine.plain_files import Watched
from tgate_engine.plan import Plan
from tgate_engine.plan_check import PlanCheck
from tgate_runtime.adapters import Scales, scales_of_adapters, weights_with
from tgate_runtime.engines import open_engine
from tgate_runtime.engines.protocol import Engine, Executable, OnBuild, Options
from tgate_runtime.graph_check import reading
from tgate_runtime.mini import place_of
from tgate_runtime.request import check_call, check_several
from tgate_runtime.signatures import check_forms, check_ranges, check_signatures

T = TypeVar("T")

LATER: tuple[Role, ...] = (ENCODE, REFERENCE, CONTROL)
"""Roles of graphs that are loaded when a request first needs one: others do without their memory."""


class Session:
    """Loaded graphs and the manifest they came from. Thread-safe: open one, share it.

    What a request changes lies in its :class:`~tgate_runtime.state.State`, which the session keeps for the next
    request of its kind (:meth:`borrow`). Closing a session lets go of the graphs; states made before keep those they
    use until they are dropped themselves.
    """

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        executables: Mapping[str, Executable],
        shapes: Sequence[Shape],
        plans: Sequence[Plan] = (),
        adapted: int = 1,
    ) -> None:
        """``executables``: loaded graphs by their files; ``shapes``: those of the bundle that they belong to;
        ``plans``: what they were loaded for; ``adapted``: how many combinations of adapters are kept."""
        self.bundle = bundle
        self.engine = engine
        self._shapes = tuple(shapes)
        self._plans = tuple(plans)
        self._weights = Watched(bundle.path / bundle.manifest.weights) if bundle.manifest.weights else None
        self._executables: dict[str, Executable] | None = dict(executables)
        self._loading = threading.Lock()
        self._most_adapted = adapted
        self._adapted: OrderedDict[Scales, Session] = OrderedDict()
        self._plain: Session | None = None
        self.loras: Scales = ()
        """The adapters that its weights include, with their scales."""
        self._idle: dict[Hashable, list[Any]] = {}
        self._lock = threading.Lock()

    @staticmethod
    def open(
        source: str | os.PathLike[str] | Bundle,
        *,
        engine: str | Engine = "ort-cpu",
        plans: Sequence[PlanLike] | None = None,
        sizes: Sequence[str] | None = None,
        adapted: int = 1,
        check_digests: bool = True,
        on_build: OnBuild | None = None,
        **options: Unpack[Options],
    ) -> Session:
        """Check a bundle and load its graphs, so that what can fail fails here and not at the first step. What
        encodes a picture is loaded when a request first has one, and a ControlNet when one first is given a control
        picture: others do without their memory.

        ``source``: a bundle's directory, ``"mini"`` (:func:`~tgate_runtime.mini.place_of`), or a Bundle opened (and
        checked) before. ``engine``: one of
        :data:`tgate_runtime.engines.ENGINES`, with ``options``, the fields of its
        :class:`~tgate_runtime.engines.protocol.EngineOptions`, such as ``threads=1``; or an engine that
        :func:`~tgate_runtime.engines.open_engine` gave. ``on_build(done, total, graph)`` hears of graphs that an
        engine has to compile first.
        ``plans``: load the graphs of these plans alone (names, plans, or plan files), with those around the denoiser;
        None takes every plan of the bundle. ``sizes``: those that requests may name, such as
        ``"832x1216"``; None takes every size. ``adapted``: how many combinations of adapters are kept loaded beside the
        plain weights (:meth:`adapted`).

        Raises :class:`~tgate_engine.errors.BundleError`, ``PlanError`` or :class:`EngineError`, and
        :class:`RequestError` for arguments of another kind.
        """
        check_several(plans, "plans")
        check_several(sizes, "sizes")
        check_call(on_build, "on_build")
        kept: object = adapted
        if isinstance(kept, bool) or not isinstance(kept, int) or kept < 1:
            raise RequestError(f"adapted is a whole number of at least 1, got {shown(kept)}")
        if not isinstance(check_digests, bool):
            raise RequestError(f"check_digests must be True or False, got {shown(check_digests)}")
        loader = open_engine(engine, **options) if isinstance(engine, str) else engine
        if not callable(getattr(loader, "load", None)):
            raise EngineError(
                f"an engine is a name, or what open_engine gave, got {type(engine).__name__} {shown(engine)}"
            )
        bundle = source if isinstance(source, Bundle) else Bundle.open(place_of(source), check_digests=check_digests)
        chosen = None if plans is None else [plan_of(bundle.manifest, plan) for plan in plans]
        graphs = graphs_of(bundle, chosen, sizes)
        graphs = tuple(spec for spec in graphs if spec.role not in LATER)
        executables = loader.load(bundle, graphs, on_build)
        session = Session(bundle, loader, executables, shapes_of(bundle, sizes), chosen or (), adapted)
        # Engines open the weights by their name, and some of them the graphs: it led to what was checked all the while.
        bundle.check_unchanged([bundle.manifest.weights, *(spec.file for spec in graphs)])
        return session

    @property
    def manifest(self) -> Manifest:
        """The bundle's facts."""
        return self.bundle.manifest

    @property
    def sizes(self) -> tuple[str, ...]:
        """The sizes that are loaded, the default first."""
        return tuple(dict.fromkeys(shape.size for shape in self._shapes))

    def shapes(self, size: str | None = None) -> tuple[Shape, ...]:
        """The loaded shapes of a size, None being the first; smallest batches first. Raises :class:`RequestError`
        listing the sizes there are."""
        asked = self.sizes[0] if size is None else check_size(size)
        shapes = sorted((shape for shape in self._shapes if shape.size == asked), key=lambda shape: shape.batch)
        if not shapes:
            raise RequestError(
                f"size {asked!r} is not loaded; there is {', '.join(self.sizes)} (the bundle has "
                f"{', '.join(self.manifest.sizes)}; export it with --size for more)"
            )
        return tuple(shapes)

    def plan(self, plan: PlanLike) -> Plan:
        """The plan that is meant: a name means one that the session was opened with, or else the bundle's.

        Raises as :func:`plan_of` does, and :class:`RequestError` for a name that two of the session's plans have.
        """
        named = [own for own in dict.fromkeys(self._plans) if own.name == plan] if isinstance(plan, str) else []
        if len(named) > 1:
            raise RequestError(f"the session was opened with {len(named)} plans called {plan!r}; give the plan itself")
        return named[0] if named else plan_of(self.manifest, plan)

    def check_unchanged(self) -> None:
        """Nobody has written to the weights since the session was opened: engines read their pages when they need them.

        Asked at the start of every image. Raises :class:`~tgate_engine.errors.BundleError`.
        """
        if self._weights is not None:
            self._weights.check()

    def graph(self, role: Role, size: str | None = None) -> GraphSpec | None:
        """The graph of a role other than ``"denoise"``, at a size; None where the bundle has none."""
        return self.shapes(size)[0].graph(role)

    def executable(self, graph: GraphSpec) -> Executable:
        """A loaded graph; one of :data:`LATER` is loaded now. Raises :class:`EngineError` where it was not loaded, or
        the session is closed."""
        if graph.role in LATER:
            self._load_later(graph)
        if self._executables is None:
            raise EngineError(f"the session of {self.bundle.path} is closed; open another one")
        if graph.file not in self._executables:
            have = ", ".join(self._executables)
            raise EngineError(
                f"graph {graph.file} is not loaded (loaded: {have}); name its plan in Session.open(plans=...)"
            )
        return self._executables[graph.file]

    def _load_later(self, graph: GraphSpec) -> None:
        if self._plain is not None:  # no adapter changes it
            executable = self._plain.executable(graph)
            with self._lock:
                if self._executables is not None:
                    self._executables[graph.file] = executable
            return
        with self._loading:
            if self._executables is None or graph.file in self._executables:
                return
            self.check_unchanged()
            loaded = self.engine.load(self.bundle, [graph])
            self.bundle.check_unchanged([self.manifest.weights, graph.file])
            with self._lock:
                if self._executables is not None:
                    self._executables |= loaded

    @contextmanager
    def borrow(self, key: Hashable, make: Callable[[], T]) -> Iterator[T]:
        """What ``make()`` gave for ``key`` before and nobody uses now, or else what it gives; for one thread at a time.

        Making states costs buffers, and on a GPU a captured graph for each call, so they wait here for the next
        request: as many of a kind as there were at once. One whose engine fails is dropped.
        """
        self.check_unchanged()
        with self._lock:
            idle = self._idle.get(key)
            item: T = idle.pop() if idle else None  # type: ignore[assignment]
        if item is None:
            item = make()
        sound = True
        try:
            yield item
        except EngineError:
            sound = False
            raise
        finally:
            with self._lock:
                if sound and self._executables is not None:
                    self._idle.setdefault(key, []).append(item)

    def adapted(self, loras: Mapping[str, float] | None) -> Session:
        """A session of the same graphs, whose weights include the bundle's adapters of those names, times their scales;
        this one itself where there are none. It stays open as long as this one is: nobody else closes it.

        Graphs that the adapters change are loaded anew, over copies of the weights that they change, and nothing is
        written to this session's. The combinations of late are kept for the next request, as many as the session was
        opened for. Raises :class:`RequestError` for an adapter that is not there, and scales that change nothing or
        too much; :class:`~tgate_engine.errors.BundleError` for an adapter's file that fits no weights; and
        :class:`EngineError` where the engine takes none.
        """
        scales = scales_of_adapters(loras, self.manifest)
        if not scales:
            return self
        if self._plain is not None:
            raise RequestError("the session has adapters already; ask the one that it came from")
        with self._loading:
            if scales in self._adapted:
                self._adapted.move_to_end(scales)
                return self._adapted[scales]
            executables = self._executables
            if executables is None:
                raise EngineError(f"the session of {self.bundle.path} is closed; open another one")
            self.check_unchanged()
            with self._lock:
                while len(self._adapted) >= self._most_adapted:  # before the next one takes memory
                    self._adapted.popitem(last=False)  # who draws with it goes on
            instead = weights_with(self.bundle, scales)
            specs = {spec.file: spec for shape in self._shapes for spec in shape.graphs.values()}
            graphs = [specs[file] for file in executables if specs[file].role not in LATER]
            changed = reading(self.bundle, graphs, instead)
            loaded = self.engine.load(self.bundle, changed, instead=instead)
            self.bundle.check_unchanged([self.manifest.weights, *(spec.file for spec in changed)])
            session = Session(self.bundle, self.engine, {**executables, **loaded}, self._shapes, self._plans)
            session._plain, session.loras = self, scales
            with self._lock:
                if self._executables is None:
                    raise EngineError(f"the session of {self.bundle.path} is closed; open another one")
                self._adapted[scales] = session
            return session

    def trim(self) -> None:
        """Free the buffers of requests that have ended, and what adapters' requests had loaded; the next ones make new
        ones."""
        with self._lock:
            self._idle.clear()
            self._adapted.clear()

    def close(self) -> None:
        """Let go of the graphs, and of what waits for requests. A closed session stays closed; closing twice does
        nothing."""
        with self._lock:
            adapted = [*self._adapted.values()]
            self._adapted.clear()
            self._executables = None
            self._idle.clear()
        for session in adapted:
            session.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


PlanLike = str | os.PathLike[str] | Plan
"""A plan's name, a :class:`Plan`, or a file that ``tgate plan --output`` wrote: a path, or a text that ends in .json
and is no plan's name."""


def plan_of(manifest: Manifest, plan: PlanLike) -> Plan:
    """The plan that is meant. Raises :class:`BundleError` for a name that is not there, ``PlanError`` for a file that
    holds no plan, :class:`RequestError` for what is neither."""
    if isinstance(plan, Plan):
        return plan
    if not isinstance(plan, (str, os.PathLike)):
        raise RequestError(f"a plan is a name, a Plan or a plan file, got {type(plan).__name__} {shown(plan)}")
    is_name = isinstance(plan, str) and (plan in manifest.plans or not plan.endswith(".json"))
    return manifest.plan(str(plan)) if is_name else Plan.load(plan)


def check_size(size: object) -> str:
    """``size``, if it is a text, as sizes are. Raises :class:`RequestError`."""
    if not isinstance(size, str):
        raise RequestError(f'a size is a text such as "832x1216", got {type(size).__name__} {shown(size)}')
    return size


def shapes_of(bundle: Bundle, sizes: Sequence[str] | None = None) -> tuple[Shape, ...]:
    """The bundle's shapes of those sizes, all where None. Raises :class:`BundleError` for a size that is not there."""
    manifest = bundle.manifest
    check_several(sizes, "sizes")
    names = manifest.sizes if sizes is None else tuple(dict.fromkeys(check_size(size) for size in sizes))
    return tuple(shape for size in names for shape in manifest.shapes_of(size))


def graphs_of(
    bundle: Bundle, plans: Sequence[PlanLike] | None = None, sizes: Sequence[str] | None = None
) -> tuple[GraphSpec, ...]:
    """The graphs that such a session loads, each once and checked: see :meth:`Session.open`, which raises as this
    does."""
    manifest = bundle.manifest
    check_several(plans, "plans")
    chosen = list(manifest.plans.values()) if plans is None else [plan_of(manifest, plan) for plan in plans]
    if not manifest.weights:
        raise BundleError(
            f"{bundle.path} was exported with --weights none: it can be inspected, not run; export it with weights"
        )
    shapes = shapes_of(bundle, sizes)
    check = PlanCheck([shape.graphs for shape in shapes], manifest.carries)
    for plan in chosen:
        check(plan)
    used = {name for plan in chosen for name in plan.graphs()}
    graphs: dict[str, GraphSpec] = {}
    for shape in shapes:
        beside = controls_for(shape.graphs, used)
        kept = {
            name: spec
            for name, spec in shape.graphs.items()
            if (name in used if spec.role == DENOISE else spec.role != CONTROL or name in beside)
        }
        check_signatures(manifest, kept)
        check_forms(shape, kept)
        graphs |= {spec.file: spec for spec in kept.values()}
    for size in dict.fromkeys(shape.size for shape in shapes):
        check_ranges(manifest.shapes_of(size), sorted(used))
    return tuple(graphs.values())
