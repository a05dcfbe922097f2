"""Models that other processes draw by: what may be asked of them, and how they are."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from tgate_engine.bundle import Bundle
from tgate_engine.errors import RequestError
from tgate_engine.graph import DECODE
from tgate_engine.manifest import Manifest, Shape
from tgate_engine.plan import Plan
from tgate_runtime.session import Session, shapes_of
from tgate_serve.model import Model
from tgate_serve.places import room_of
from tgate_serve.ray.settings import Settings

State = tuple[int, int, bool]
"""The images of a model that run, those that wait, and whether its worker has failed."""


class Away(Model):
    """The facts of a model, by its bundle's manifest alone. It draws nothing: requests go to those who have it."""

    def __init__(self, name: str, bundle: Bundle, settings: Settings) -> None:
        """Raises :class:`~tgate_engine.errors.BundleError` for a plan or a size that the bundle does not have, and
        :class:`RequestError` for one that cannot be served so."""
        manifest = bundle.manifest
        if manifest.graph(DECODE) is None:
            raise RequestError(
                f"{name} has no decoder, and a server answers with pictures; export it with --components all"
            )
        if manifest.frames > 1:
            raise RequestError(
                f"{name} makes videos, which stay with the process that drew them, and replicas come and go; serve it "
                "with tgate serve"
            )
        self.name = name
        self.created_s = int(time.time())
        self.session = cast(Session, _Session(manifest, shapes_of(bundle, settings.sizes), _Engine(settings.engine)))
        self.worker: Any = _Worker(tuple(manifest.plan(plan) for plan in settings.plans or manifest.plans))
        self.rows = max(room_of(self.session, size, settings.rows, 1.0).rows for size in self.session.sizes)
        """Images of the size that a replica has the most rows for."""

    def told(self, states: Iterable[Mapping[str, State]]) -> None:
        """How it is at each replica that answered; one that does not have it in memory does not name it."""
        known = list(states)
        own = [state[self.name] for state in known if self.name in state]
        running, waiting = sum(state[0] for state in own), sum(state[1] for state in own)
        failed = not known or (bool(own) and all(state[2] for state in own))
        self.worker.now = running, waiting, failed


@dataclass(frozen=True)
class _Engine:
    name: str


@dataclass(frozen=True)
class _Session:
    manifest: Manifest
    all_shapes: tuple[Shape, ...]
    engine: _Engine

    @property
    def sizes(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(shape.size for shape in self.all_shapes))

    def shapes(self, size: str) -> list[Shape]:
        return [shape for shape in self.all_shapes if shape.size == size]


@dataclass
class _Worker:
    plans: tuple[Plan, ...]
    now: State = (0, 0, False)

    @property
    def failed(self) -> bool:
        return self.now[2]

    def load(self) -> tuple[int, int]:
        return self.now[:2]
