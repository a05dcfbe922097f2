"""One thread that draws: it owns the buffers of a session's requests and follows the scheduler.

Requests come from any thread, or from asyncio, and are checked before the thread hears of them. Between two calls
images join, leave and are moved. What an image becomes depends on its request alone: to the last bit where an engine
computes each image of a call as it would alone, as ort-cpu does.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tgate_engine.errors import EngineError, RequestError, TgateError, shown
from tgate_engine.graph import DECODE, Role
from tgate_engine.plan import Plan
from tgate_engine.plan import Step as PlanStep
from tgate_runtime.adapters import scales_of_adapters
from tgate_runtime.beginning import Beginning
from tgate_runtime.control import Steered
from tgate_runtime.decoder import decode
from tgate_runtime.finite import check_computed
from tgate_runtime.generators import check_generator, check_seed, in_dtype, in_step, noise
from tgate_runtime.inpainting import Around, draw_of
from tgate_runtime.preview import end_of
from tgate_runtime.request import check_mapping, check_several, numbers_of, scales_of
from tgate_runtime.runner import StepDone, advance
from tgate_runtime.session import PlanLike, Session
from tgate_runtime.state import State, most_at_once
from tgate_serve.added import GUESS, Added
from tgate_serve.handle import Cancelled, Drawn, Handle, Late, Step, Stopped
from tgate_serve.places import Lane, Place, planned_bytes, room_of
from tgate_serve.scheduler import Busy, Job, Scheduler, Tick

log = logging.getLogger("tgate")

_STEP_S = 0.1
"""How long a step of one image is taken to last before one has been measured."""
_NEW = 0.05
"""What a new measurement counts in the mean."""
_FAILED = "the server's worker has failed; its log says why; start it again"
"""Told to whoever asks. What it failed of may name paths of this host, and is for the log."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Images of one prompt, one for each of ``seeds``.

    ``conditioning``: ``<name>.<half>`` to [1, ...], as :func:`tgate_runtime.conditioning.conditioning_of` gives it.
    ``plan``, ``size``, ``guidance_scale`` and ``generator`` as :class:`~tgate_runtime.pipeline.Pipeline` has them.
    ``priority``: one of :data:`tgate_serve.scheduler.PRIORITIES`. ``within_s``: after so many seconds nobody wants it
    any more. ``came_s``: when it arrived, by :func:`time.monotonic`, if that was before it was encoded. ``looks``: the
    steps, by index, of which :class:`~tgate_serve.handle.Step` tells where the latents are heading. ``beginning``: what
    is begun from in place of noise, with what is left of ``plan``. ``around``: of an inpainting model, what lies around
    the mask. ``session``: of adapters, which the worker's gave
    (:meth:`~tgate_runtime.session.Session.adapted`); None is the worker's own. ``controls``: by ControlNet, as
    :func:`~tgate_runtime.control.steered` gives them for that plan.
    """

    conditioning: Mapping[str, NDArray[Any]]
    seeds: Sequence[int]
    plan: PlanLike = "default"
    size: str | None = None
    guidance_scale: float | None = None
    generator: str = "numpy"
    priority: int = 0
    within_s: float | None = None
    came_s: float | None = None
    looks: Iterable[int] = ()
    beginning: Beginning | None = None
    around: Around | None = None
    session: Session | None = None
    controls: Mapping[str, Steered] = field(default_factory=dict)


@dataclass(kw_only=True)
class Counts:
    """What a worker has done. ``calls``: by size, graph and images. ``moves``: of images from row to row, which copied
    ``moved_bytes``. ``images``: through; ``cancelled``, ``expired``, ``failed``: ended before; ``refused``: requests
    that found the queue full."""

    calls: Counter[tuple[str, str, int]] = field(default_factory=Counter)
    moves: int = 0
    moved_bytes: int = 0
    images: int = 0
    cancelled: int = 0
    expired: int = 0
    failed: int = 0
    refused: int = 0


@dataclass(kw_only=True)
class _Order:
    """A request as the worker keeps it: what is settled, and what has become of it."""

    handle: Handle
    request: Request
    plan: Plan
    size: str
    lane: str
    guidance_scale: float
    conditioning: Mapping[str, NDArray[Any]]  # <name>.<half> to [...]
    seeds: tuple[int, ...]
    looks: frozenset[int]
    came_s: float
    began_s: float = 0.0
    tickets: tuple[int, ...] = ()
    done: int = 0
    final: dict[int, NDArray[np.float32]] = field(default_factory=dict)  # latents by seed's place


class Worker:
    """The thread, and the buffers that it owns. Thread-safe.

    All buffers are allocated when it is made: what has no room fails then, and not under load. Those of requests with
    adapters alone are made when the first comes, since nobody knows which. The session stays the caller's, to close
    after :meth:`close`.
    """

    def __init__(
        self,
        session: Session,
        *,
        plans: Sequence[PlanLike] | None = None,
        rows: int | None = None,
        queue: int = 64,
        patience: int = 8,
        added: float | None = None,
        memory_bytes: int | None = None,
        adapted: int = 1,
        on_call: Callable[[str, str, int, float], None] | None = None,
    ) -> None:
        """``plans``: those that requests may follow; None takes every plan of the bundle. ``rows``: how many images of
        each size are in flight at most; None is twice what a call has, so that one call's can wait half done for
        another's.
        ``queue``, ``patience``: see :class:`~tgate_serve.scheduler.Scheduler`. ``added``: see
        :class:`~tgate_serve.scheduler.Room`; None learns it from the calls that are made. ``memory_bytes``: what
        :attr:`planned_bytes` may be. ``adapted``: how many combinations of size and adapters are in flight at most,
        beside requests without. ``on_call(size, graph, images, seconds)`` hears of each call, in the thread, with
        its time inside the engine.

        Raises :class:`RequestError` for what has no room, or a bundle whose calls take no single image, and
        :class:`EngineError` where the engine cannot allocate.
        """
        check_several(plans, "plans")
        chosen = session.manifest.plans if plans is None else plans
        self.session = session
        self.plans = tuple(session.plan(plan) for plan in chosen)
        rooms = {size: room_of(session, size, rows, GUESS if added is None else added) for size in session.sizes}
        self._most_adapted = adapted if session.manifest.adapters else 0
        self.planned_bytes = planned_bytes(session, self.plans, rooms, adapted=self._most_adapted)
        """What weights, buffers and the hungriest call take together; the engine's own memory is not in it."""
        if memory_bytes is not None and self.planned_bytes > memory_bytes:
            several = ", ".join(f"{room.rows} images of {size}" for size, room in rooms.items())
            raise RequestError(
                f"{several} at once take {self.planned_bytes} bytes, weights included, and {memory_bytes} are allowed; "
                "serve fewer rows, sizes or plans, or allow more"
            )
        self.counts = Counts()
        self._on_call = on_call
        self._scheduler = Scheduler(rooms, queue=queue, patience=patience)
        self._added = {size: Added() for size in rooms} if added is None else {}
        self._rooms = rooms
        self._lanes = {size: Lane.of(session, self.plans, size, room) for size, room in rooms.items()}
        self._entering = threading.Lock()
        self._orders: dict[int, _Order] = {}  # by ticket
        self._left: list[tuple[Place, int]] = []  # places and tickets of those whose rows may be freed
        self._step_s = _STEP_S
        self._open, self._closing = True, False
        self._told: list[_Order] = []  # whose images are through and taken from here, while they are told
        self._broken: Exception | None = None
        # Guards everything but the places, which are the thread's. No handle is told of anything under it.
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="tgate-worker", daemon=True)
        self._thread.start()

    # --- from any thread ------------------------------------------------------------------------

    def submit(self, request: Request) -> Handle:
        """Take a request; it is drawn when its turn comes.

        Raises :class:`~tgate_serve.scheduler.Busy` where the queue is full, :class:`RequestError` for what cannot be
        drawn, and :class:`~tgate_serve.handle.Stopped` where the worker takes no more.
        """
        order = self._settled(request)
        within_s = request.within_s
        graphs = tuple(step.graph for step in order.plan.steps)
        deadline = None if within_s is None else order.came_s + within_s
        job = Job(size=order.lane, graphs=graphs, priority=request.priority, deadline=deadline)
        own = request.session
        with self._lane_for(own, order.size) if own is not None and own.loras else nullcontext(), self._changed:
            if self._broken is not None:
                raise Stopped(_FAILED)
            if not self._open:
                raise Stopped("the server takes no more requests; ask another one")
            with self._refusals():
                order.tickets = self._scheduler.submit([job] * len(order.seeds))
            self._orders |= dict.fromkeys(order.tickets, order)
            self._changed.notify_all()
        return order.handle

    @contextmanager
    def _lane_for(self, session: Session, size: str) -> Iterator[None]:
        """While open, nobody closes the lane that images of a size have over the weights of a session with adapters; it
        is opened if need be, in place of one that nobody is in any more. Raises :class:`Busy` where all of them are."""
        name = Lane.name_of(size, session.loras)
        with self._entering:
            if name not in self._lanes:
                self._make_way()
                made = Lane.of(session, self.plans, size, self._rooms[size])
                with self._changed:
                    self._scheduler.open(name, self._rooms[size])
                    self._scheduler.added[name] = self._scheduler.added[size]
                    self._lanes[name] = made
            yield

    def _make_way(self) -> None:
        """Close lanes of adapters that nobody is in, until one more may be opened. Raises :class:`Busy` where all of
        them are needed."""
        with self._changed, self._refusals():
            others = [lane for lane in self._lanes.values() if lane.name not in self._rooms]
            while len(others) >= self._most_adapted:
                idle = next((lane for lane in others if self._scheduler.close(lane.name)), None)
                if idle is None:
                    raise Busy(
                        f"{len(others)} other combinations of adapters are drawn, as many as are served at once; ask "
                        "again later",
                        self._scheduler.steps_left,
                    )
                del self._lanes[idle.name]
                others.remove(idle)

    def adapted(self, size: str, loras: Mapping[str, float] | None) -> Session:
        """The session for a request's adapters: the one whose lane is open, or else as
        :meth:`~tgate_runtime.session.Session.adapted` gives it. Raises :class:`Busy` as :meth:`submit` does where there
        is no lane for it, before any weights are loaded that would then only be in the way."""
        scales = scales_of_adapters(loras, self.session.manifest)
        if scales:
            with self._entering:
                if lane := self._lanes.get(Lane.name_of(size, scales)):
                    return lane.session
                self._make_way()
        return self.session.adapted(loras)

    def check_room(self, size: str, images: int, *, entering: int = 0) -> None:
        """Raises as :meth:`submit` does where so many images of one request would find the queue full now, if
        ``entering`` of others, which are still on their way here, come first."""
        with self._changed, self._refusals():
            self._scheduler.check_room(size, images, entering=entering)

    @contextmanager
    def _refusals(self) -> Iterator[None]:
        """A full queue is counted, and told with a time."""
        try:
            yield
        except Busy as busy:
            self.counts.refused += 1
            after_s = self.seconds(busy.steps)
            raise Busy(f"{busy}, in {after_s:.0f} s", busy.steps, after_s) from None

    def seconds(self, steps: int) -> float:
        """How long so many steps of single images take, going by those of late; at least 1."""
        return max(1.0, steps * self._step_s)

    def ahead(self, handle: Handle) -> int:
        """How many images wait before the last one of a request; 0 where none of it waits."""
        with self._changed:
            return max(
                (self._scheduler.ahead(t) for t, order in self._orders.items() if order.handle is handle), default=0
            )

    def load(self) -> tuple[int, int]:
        """The images in flight, and those that wait."""
        with self._changed:
            return self._scheduler.running, self._scheduler.waiting

    @property
    def failed(self) -> bool:
        """Whether the thread has ended by a fault of its own: nothing is drawn any more."""
        return self._broken is not None

    def added(self) -> dict[str, float]:
        """What each further image of a size adds to a call, as a share of one for one image: as given, or learned."""
        with self._changed:
            return {size: self._scheduler.added[size] for size in self._rooms}

    def pictures(self, drawn: Drawn, role: Role = DECODE) -> list[list[Image.Image]]:
        """Of each image, its RGB picture, or a video's frames, decoded in the calling thread by the graph of a role.
        Raises :class:`RequestError` for a bundle without it."""
        graph = self.session.graph(role, drawn.size)
        if graph is None:
            raise RequestError("the bundle has no decoder (--components); export it with one, or take the latents")
        return [decode(self.session, graph, latents) for latents in drawn.latents]

    def drain(self, timeout_s: float | None = None) -> bool:
        """Take no more requests, and wait until all that were taken have ended; False where the time ran out."""
        with self._changed:
            self._open = False
            return self._changed.wait_for(lambda: not self._orders and not self._told, timeout_s)

    def close(self) -> None:
        """End what is not through with :class:`~tgate_serve.handle.Stopped`, and then the thread. Closing twice does
        nothing."""
        with self._changed:
            self._open, self._closing = False, True
            ended = self._let_go(list(self._orders))
            self._changed.notify_all()
        for order in ended:
            order.handle.fail(Stopped("the server has stopped; ask again"))
        self._thread.join()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _settled(self, request: Request) -> _Order:
        """What a request asks for, checked."""
        plan = self.session.plan(request.plan)
        if not any(plan is own or plan == own for own in self.plans):
            raise RequestError(
                f"plan {plan.name!r} is not served; there is {', '.join(own.name for own in self.plans)}"
            )
        size = self.session.shapes(request.size)[0].size
        check_several(request.seeds, "seeds")
        seeds = tuple(check_seed(seed) for seed in request.seeds)
        if not seeds:
            raise RequestError("a request has a seed for each image, and at least one; got none")
        check_generator(request.generator, self._lanes[size].place.latents)
        check_mapping(request.conditioning, "conditioning")
        arrays = {name: numbers_of(values, f"conditioning {name}") for name, values in request.conditioning.items()}
        if odd := [name for name, values in arrays.items() if values.shape[:1] != (1,)]:
            raise RequestError(f"conditioning {odd[0]} must be [1, ...], got shape {list(arrays[odd[0]].shape)}")
        within_s: object = request.within_s
        if within_s is not None and not (isinstance(within_s, (int, float)) and 0 < within_s < math.inf):
            raise RequestError(f"within_s is a number of seconds above 0, got {shown(within_s)}")
        return _Order(
            handle=Handle(self._cancel),
            request=request,
            plan=plan if request.beginning is None else request.beginning.plan,
            size=size,
            lane=Lane.name_of(size, () if request.session is None else request.session.loras),
            guidance_scale=scales_of(request.guidance_scale, 1, plan, self.session.manifest)[0],
            conditioning={name: values[0] for name, values in arrays.items()},
            seeds=seeds,
            looks=frozenset(request.looks),
            came_s=time.monotonic() if request.came_s is None else request.came_s,
        )

    def _cancel(self, handle: Handle) -> bool:
        with self._changed:
            there = [ticket for ticket, order in self._orders.items() if order.handle is handle]
            self.counts.cancelled += len(there)
            self._let_go(there)
        return handle.fail(Cancelled("the request was cancelled"))

    def _let_go(self, tickets: Iterable[int]) -> list[_Order]:
        """Take images out of everything but their rows, which the thread frees before its next call; their requests.
        Under the lock."""
        ended: dict[int, _Order] = {}
        for ticket in tickets:
            order = self._orders.pop(ticket)
            self._scheduler.cancel(ticket)
            self._left.append((self._lanes[order.lane].place, ticket))
            ended[id(order)] = order
        self._changed.notify_all()
        return list(ended.values())

    # --- the thread -----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except Exception as error:  # a fault of ours: whoever waits is told, and nobody is let in any more
            log.exception("the server's worker has failed")
            with self._changed:
                self._broken = error
                ended = self._let_go(list(self._orders))
            for order in [*ended, *self._told]:
                order.handle.fail(Stopped(_FAILED))
            with self._changed:
                self._told = []
                self._changed.notify_all()

    def _turn(self) -> bool:
        """One call, or a wait for something to do; False where the thread is to end."""
        with self._changed:
            late = [self._orders[ticket] for ticket in self._scheduler.expired(time.monotonic())]
            of_late = (
                [ticket for ticket, order in self._orders.items() if any(order is each for each in late)]
                if late
                else []
            )
            self.counts.expired += len(of_late)
            ended = self._let_go(of_late)
            for place, ticket in self._left:
                place.leave(ticket)
            self._left.clear()
            tick = self._scheduler.tick()
            joined = [(ticket, self._orders[ticket]) for ticket in tick.joined] if tick else []
            if tick is None and not ended:
                if self._closing:
                    return False
                self._changed.wait()
        for order in ended:
            order.handle.fail(Late(f"the request was not through within {order.request.within_s} s"))
        if tick is not None:
            for ticket, order in joined:
                self._begin(ticket, order)
            self._call(tick)
        return True

    def _begin(self, ticket: int, order: _Order) -> None:
        """Start an image in a row."""
        with self._changed:
            if ticket not in self._orders:  # called off since, or failed with another image of its request
                return
            place = self._lanes[order.lane].place  # once it is called off, the lane may go
        dtype = self.session.manifest.dtype
        seed, generator = order.seeds[order.tickets.index(ticket)], order.request.generator

        def drawn(draw: int) -> NDArray[np.float32]:
            return in_dtype(noise(seed, place.latents, draw=draw, generator=generator), generator, dtype)

        order.began_s = order.began_s or time.monotonic()
        row, beginning = place.rows.take(ticket), order.request.beginning
        first, mend, skipped = drawn(0), None, 0
        if beginning is not None:
            (first, mend), skipped = beginning.first(first, drawn(1)), beginning.draws
        conditioning = order.conditioning
        if (within := order.request.around) is not None:
            row_of = within.row(drawn(draw_of(beginning)))
            conditioning = {**conditioning, **{name: values[0] for name, values in row_of.items()}}
            skipped += 1
        try:
            place.state.begin(
                row,
                first,
                conditioning,
                guidance_scale=order.guidance_scale,
                plan=order.plan,
                step_noise=lambda index: drawn(skipped + in_step(index)),
                mend=mend,
                controls=order.request.controls,
            )
        except TgateError as error:
            self._fail(order, error)

    def _call(self, tick: Tick) -> None:
        """Take the steps of a tick, those of images that are still wanted."""
        begin_s = time.monotonic()
        with self._changed:
            lane = self._lanes.get(tick.size)
            wanted = [ticket for ticket in tick.tickets if ticket in self._orders]
        if lane is None:  # all of its images were let go, and it was closed
            return
        place = lane.place
        # Without those that were just let go a call may be of a number that the bundle does not take.
        wanted = wanted[: most_at_once(place.state.batches(), len(wanted))]
        if not wanted:
            return
        rows, moves = place.rows.gather(wanted)
        for old, new in moves:
            self.counts.moved_bytes += place.state.move(old, new)
        self.counts.moves += len(moves)
        try:
            self._took(lane, wanted, advance(place.state, rows))
        except EngineError as error:
            self._alone(lane, wanted, error)
            return
        seconds = time.monotonic() - begin_s
        self._step_s += _NEW * (seconds / len(wanted) - self._step_s)
        if learned := self._added.get(lane.size):
            with self._changed:
                added = learned.saw(tick.graph, rows, seconds * 1e3)
                for each in self._lanes.values():
                    if each.size == lane.size:
                        self._scheduler.added[each.name] = added

    def _alone(self, lane: Lane, tickets: Sequence[int], error: EngineError) -> None:
        """A call has failed: each image tries its step alone, so that it ends the request of the one it was for."""
        place = lane.place
        for ticket in tickets:
            row = place.rows.row(ticket)
            step = place.state.step(row)
            assert step is not None  # it was to be taken
            failed: TgateError = error
            # What a call reads it may not have written when it failed, or the step can't be tried again.
            if len(tickets) > 1 and not set(step.reads) & set(step.writes):
                try:
                    self._took(lane, [ticket], advance(place.state, range(row, row + 1)))
                    continue
                except EngineError as own:
                    failed = own
            with self._changed:
                order = self._orders.get(ticket)
            if order is not None:
                self._fail(order, failed)

    def _took(self, lane: Lane, tickets: Sequence[int], done: StepDone) -> None:
        """The steps of those images are taken: tell their requests, and end those that are through."""
        place = lane.place
        with self._changed:
            there = [ticket for ticket in tickets if ticket in self._orders]
            orders = {ticket: self._orders[ticket] for ticket in there}
            through = self._scheduler.advance(there)
            self._told = [orders[ticket] for ticket in through]
            for ticket in through:
                del self._orders[ticket]
            self._left += [(place, ticket) for ticket in through]
            self.counts.calls[lane.size, done.step.graph, len(tickets)] += 1
        if self._on_call is not None:
            self._on_call(lane.size, done.step.graph, len(tickets), done.elapsed_ms / 1000)
        for ticket, order in orders.items():
            row = place.rows.row(ticket)
            self._tell(
                order, ticket, done.steps[row - done.rows.start], len(tickets), done.elapsed_ms, place.state, row
            )
            if ticket in through:
                self._through(order, ticket, place.state.latents(row))
        with self._changed:
            self._told = []
            self._changed.notify_all()

    def _tell(
        self, order: _Order, ticket: int, step: PlanStep, company: int, elapsed_ms: float, state: State, row: int
    ) -> None:
        order.done += 1
        order.handle.add(
            Step(
                image=order.tickets.index(ticket),
                index=step.index,
                graph=step.graph,
                done=order.done,
                total=len(order.plan.steps) * len(order.seeds),
                company=company,
                elapsed_ms=elapsed_ms,
                towards=end_of(state, row, order.plan.steps[step.index + 1 :]) if step.index in order.looks else None,
            )
        )

    def _through(self, order: _Order, ticket: int, latents: NDArray[np.float32]) -> None:
        """An image is through, and the request with its last one."""
        image = order.tickets.index(ticket)
        try:
            check_computed(latents, f"the latents of image {image} after the last step of plan {order.plan.name!r}")
        except TgateError as error:
            self.counts.failed += 1
            self._fail(order, error)
            return
        self.counts.images += 1
        order.final[image] = latents
        if len(order.final) == len(order.seeds):
            order.handle.finish(
                Drawn(
                    latents=np.stack([order.final[i] for i in range(len(order.seeds))]),
                    seeds=order.seeds,
                    plan=order.plan,
                    size=order.size,
                    steps=Counter(step.graph for step in order.plan.steps),
                    waited_s=order.began_s - order.came_s,
                    drawn_s=time.monotonic() - order.began_s,
                )
            )

    def _fail(self, order: _Order, error: Exception) -> None:
        """End one request, and nobody else's."""
        with self._changed:
            there = [ticket for ticket in order.tickets if ticket in self._orders]
            self.counts.failed += len(there)
            self._let_go(there)
        order.handle.fail(error)
