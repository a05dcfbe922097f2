"""The buffers of each size that is served, allocated once, and what they will take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tgate_engine.footprint import buffers, memory
from tgate_engine.plan import Plan
from tgate_runtime.adapters import Scales
from tgate_runtime.session import Session
from tgate_runtime.state import State
from tgate_serve.rows import Rows
from tgate_serve.scheduler import Room


@dataclass(frozen=True, kw_only=True)
class Place:
    """The buffers of one size, and who lies in which row."""

    state: State
    rows: Rows
    latents: tuple[int, ...]

    @staticmethod
    def of(session: Session, plans: Sequence[Plan], size: str, room: Room) -> Place:
        """Allocate them, with a spare row for moves. Raises :class:`~tgate_engine.errors.EngineError` where the engine
        cannot."""
        rows = Rows(room.rows)
        state = State(session, plans, rows.total, size=size)
        return Place(state=state, rows=rows, latents=session.shapes(size)[0].latents)

    def leave(self, ticket: int) -> None:
        """An image is gone; its row, where it ever had one, is free."""
        if ticket in self.rows:
            self.state.end(self.rows.free(ticket))


def room_of(session: Session, size: str, rows: int | None, added: float) -> Room:
    """What there is of a size; ``rows``: None is twice what a call has."""
    batches = tuple(shape.batch for shape in session.shapes(size))
    return Room(batches=batches, rows=2 * max(most for _, most in batches) if rows is None else rows, added=added)


@dataclass(frozen=True, kw_only=True)
class Lane:
    """What shares calls: images of one size over the same weights. ``name``: by which the scheduler knows it.
    ``session``: the one of the weights."""

    name: str
    size: str
    session: Session
    place: Place

    @staticmethod
    def name_of(size: str, loras: Scales) -> str:
        """A size's, or that of a size with adapters."""
        return " ".join([size, *(f"{name}:{scale!r}" for name, scale in loras)])

    @staticmethod
    def of(session: Session, plans: Sequence[Plan], size: str, room: Room) -> Lane:
        """With buffers of its own, as :meth:`Place.of` has them."""
        place = Place.of(session, plans, size, room)
        return Lane(name=Lane.name_of(size, session.loras), size=size, session=session, place=place)


def planned_bytes(session: Session, plans: Sequence[Plan], rooms: Mapping[str, Room], *, adapted: int = 0) -> int:
    """What weights, the buffers of every size and the hungriest graph, a decoder among them, take together; ``adapted``
    times more weights and buffers of the largest size, for as many combinations of adapters."""
    held, scratch, most = 0, 0, 0
    weights = 0
    for size, room in rooms.items():
        shape = session.shapes(size)[-1]
        own = sum(t.size_bytes(Rows(room.rows).total) for t in buffers(shape.graphs, plans).values())
        held, most = held + own, max(most, own)
        for plan in plans:
            planned = memory(plan, session.manifest, shape, batch=room.most)
            weights, scratch = planned["weights"], max(scratch, planned["scratch"])
    return weights + held + scratch + adapted * (weights + most)
