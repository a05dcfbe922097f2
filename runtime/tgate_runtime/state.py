"""The state of requests: every buffer of their images' trajectories, allocated before the first step and bound once."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tgate_engine.conditioning import half_names
from tgate_engine.control import control_graph, nets_of, picture_name, scale_name
from tgate_engine.dtypes import encode, storage
from tgate_engine.errors import RequestError, shown
from tgate_engine.footprint import buffers
from tgate_engine.graph import GraphSpec
from tgate_engine.manifest import Shape
from tgate_engine.plan import Plan, Step
from tgate_engine.plan_check import PlanCheck
from tgate_engine.sampler import HISTORY
from tgate_engine.step import LATENTS, NEXT_LATENTS, NOISE, OUTPUT, STEP, STEP_OUTPUTS, past, step_row
from tgate_runtime.control import Steered
from tgate_runtime.engines.protocol import Buffer, Call
from tgate_runtime.finite import check_given
from tgate_runtime.request import check_call, check_mapping, check_row, check_scale, numbers_of, shown_names
from tgate_runtime.session import Session

StepNoise = Callable[[int], NDArray[np.float32]]
"""Standard normal noise [...] of one image, by the index of the step that adds it."""
_MOST_ADMITTED = 256
"""Plans beside its own that a state knows at a time."""
Mend = Callable[[int, NDArray[np.float32]], NDArray[np.float32]]
"""What an image's latents [...] become after a step, by its index and what it made of them."""


@dataclass(frozen=True)
class _Image:
    """Where one image is: the next step of its plan, and what is its own."""

    plan: Plan
    position: int
    guidance_scale: float
    step_noise: StepNoise | None
    mend: Mend | None
    controls: Mapping[str, Steered]
    reach: int  # how far back the plan's sampler looks
    live: tuple[tuple[str, ...], ...]  # the carries that are still to be read, at each position of the plan

    @property
    def step(self) -> Step | None:
        return self.plan.steps[self.position] if self.position < len(self.plan.steps) else None

    def scale(self, net: str) -> float:
        """Of a ControlNet at the next step."""
        own = self.controls.get(net)
        return 0.0 if own is None else own.scales[self.position]


class _InTurn:
    """Calls that are made one after another, as one: ControlNets', and that of the graph that takes what they gave."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = tuple(calls)

    @property
    def addresses(self) -> Mapping[str, int]:
        return {name: address for call in self._calls for name, address in call.addresses.items()}

    def __call__(self) -> None:
        for call in self._calls:
            call()


def most_at_once(batches: Iterable[tuple[int, int]], images: int) -> int:
    """How many of so many images one call may have, at most; 0 where it may not have so few. ``batches``: the ranges
    that calls may have, as (least, most)."""
    return max((min(most, images) for least, most in batches if least <= images), default=0)


def shape_for(shapes: Sequence[Shape], images: int) -> Shape:
    """The first of a size's shapes that takes so many images in a call. Raises :class:`RequestError` listing what they
    take."""
    for shape in shapes:
        if shape.batch[0] <= images <= shape.batch[1]:
            return shape
    batches = (shape.batch for shape in shapes)
    ranges = " or ".join(f"{least} to {most}" if least < most else str(least) for least, most in batches)
    raise RequestError(f"the bundle takes {ranges} images at once, got {images}; export with --batch")


def _live(plan: Plan) -> tuple[tuple[str, ...], ...]:
    """The carries that the steps from each position on read before they write them; none behind the last step."""
    live: list[tuple[str, ...]] = [()]
    for step in reversed(plan.steps):
        kept = [name for name in live[-1] if name not in step.writes]
        live.append(tuple(dict.fromkeys([*step.reads, *kept])))
    return tuple(reversed(live))


class State:
    """Room for images of one size, a row for each in every buffer, and the engine calls on ranges of rows.

    An image has a plan, a position in it, a guidance scale and noise of its own. Images in neighbouring rows whose
    next steps run the same graph can share a call, whatever their plans and positions (:meth:`take`). Every carry has
    one buffer, which the writing step's graph fills and later steps' graphs read in place; after a step an image's
    history moves back by one place, which copies a few of its latents.

    The state owns all its buffers and may be used for one request after another; between requests the last
    one's latents stay readable. One thread at a time; :meth:`claim` guards that. It keeps alive the graphs that it
    uses, not the session.
    """

    def __init__(
        self, session: Session, plans: Plan | Sequence[Plan], rows: int = 1, *, size: str | None = None
    ) -> None:
        """Allocate ``rows`` rows for images that follow any of ``plans``, and bind the calls on all of them.

        ``size``: None is the session's default. Raises :class:`RequestError` for a size that is not loaded, and
        :class:`~tgate_engine.errors.EngineError` where the session did not load a graph of a plan.
        """
        count: object = rows
        if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
            raise RequestError(f"a state has at least 1 row, got {shown(rows)}")
        several: object = [plans] if isinstance(plans, Plan) else plans
        if not isinstance(several, (list, tuple)) or not all(isinstance(plan, Plan) for plan in several):
            raise RequestError(
                f"a state is for plans, as session.plan(NAME) gives them, got {type(plans).__name__} {shown(plans)}"
            )
        self.plans: tuple[Plan, ...] = tuple(several)
        self.rows = rows = int(rows)
        self._shapes = session.shapes(size)
        self._session = session
        self._lock = threading.Lock()
        graphs = self._shapes[0].graphs
        check = PlanCheck([graphs], session.manifest.carries)
        for plan in self.plans:
            check(plan)
        self._buffers: dict[str, Buffer] = {
            name: session.engine.allocate(tensor.resolve(rows), tensor.dtype)
            for name, tensor in buffers(graphs, self.plans).items()
        }
        self._halves = [name for name in half_names(session.manifest.conditioning) if name in self._buffers]
        self._images: list[_Image | None] = [None] * rows
        self._nets = {name: nets_of(graphs[name]) for plan in self.plans for name in plan.graphs()}
        self._live = {plan: _live(plan) for plan in self.plans}
        self._views: dict[tuple[int, int], dict[str, Buffer]] = {}
        self._calls: dict[tuple[str, frozenset[str], int, int], Call] = {}
        if any(least <= rows <= most for least, most in self.batches()):
            for step in (step for plan in self.plans for step in plan.steps):
                self._call(step.graph, frozenset(step.writes), 0, rows)

    # --- images ---------------------------------------------------------------------------------

    def claim(self) -> threading.Lock:
        """The lock of a run, taken. Raises :class:`RequestError` while another run uses this state."""
        if not self._lock.acquire(blocking=False):
            raise RequestError("this state is in use by another run; make one state for each")
        return self._lock

    def begin(
        self,
        row: int,
        noise: NDArray[np.float32],
        conditioning: Mapping[str, NDArray[Any]],
        *,
        guidance_scale: float,
        plan: Plan | None = None,
        step_noise: StepNoise | None = None,
        mend: Mend | None = None,
        controls: Mapping[str, Steered] | None = None,
    ) -> None:
        """Start an image in a row: x_0 is ``noise`` times the sampler's initial scale, its history zeros.

        ``noise``: standard normal, float32 [...]. ``conditioning``: ``<name>.<half>`` to [...]; float32 numbers, which
        are rounded to the graph's dtype, or that dtype's bits already. Names that no plan uses are ignored.
        ``guidance_scale``: ignored by graphs that have no guidance. ``plan``: one of the state's, or one that takes no
        buffer beside theirs, such as what is left of one; None where it has one alone. ``step_noise``: needed where the
        sampler is stochastic. ``mend``: what becomes of the image's latents after each step, read from the device and
        written back; None leaves them there. ``controls``: by ControlNet, the picture that it looks at and its scale at
        each step (:func:`tgate_runtime.control.steered`); one that is not named adds nothing. All arrays are copied.
        Raises :class:`RequestError` naming what is missing, misshapen or not finite.
        """
        self._session.check_unchanged()
        chosen = self._plan(plan)
        if chosen.sampler.stochastic and step_noise is None:
            raise RequestError(f"sampler {chosen.sampler.name!r} draws noise in its steps; give step_noise")
        scale = check_scale(guidance_scale)
        check_call(step_noise, "step_noise")
        check_call(mend, "mend")
        check_mapping(conditioning, "conditioning")
        row = check_row(row, self.rows)
        missing = [name for name in self._halves if name not in conditioning]
        if missing:
            raise RequestError(
                f"the plan's graphs take conditioning {', '.join(missing)}; got {shown_names(conditioning)}"
            )
        own = self._view(row, 1)
        for name in self._history():
            own[name].write(np.zeros(1, np.float32))
        drawn = numbers_of(noise, "the initial latents")
        self._write(own[LATENTS], drawn * np.float32(chosen.sampler.initial_scale), "the initial latents")
        for name in self._halves:
            self._write(own[name], conditioning[name], f"conditioning {name}")
        for net, steered in (controls or {}).items():
            self._check_control(net, steered, chosen)
            self._write(own[picture_name(net)], steered.picture, f"the control picture of {net}")
        reach, live = chosen.sampler.reach, self._live[chosen]
        self._images[row] = _Image(chosen, 0, scale, step_noise, mend, dict(controls or {}), reach, live)

    def end(self, row: int) -> None:
        """Let the image in a row go, through or not; what its latents were stays readable until another one begins
        there, or is moved there. Where there is none, nothing happens."""
        self._images[check_row(row, self.rows)] = None

    def move(self, row: int, to: int) -> int:
        """Move an image to a row that has none, between two steps: the bytes that were copied.

        Its latents and history move, its conditioning and control pictures, and of the carries those that its plan has
        still to read. Raises :class:`RequestError` where there is no image in the one row, or one in the other.
        """
        row, to = check_row(row, self.rows), check_row(to, self.rows)
        image = self._images[row]
        if image is None or self._images[to] is not None:
            raise RequestError(
                f"an image moves to a row without one; row {row} has {'one' if image else 'none'}, row {to} "
                f"{'none' if self._images[to] is None else 'one'}"
            )
        old, new = self._view(row, 1), self._view(to, 1)
        trajectory = (past(name, lag) for name in (LATENTS, OUTPUT) for lag in range(HISTORY + 1))
        copied = 0
        pictures = (picture_name(net) for net in image.controls)
        for name in (*trajectory, *self._halves, *pictures, *image.live[image.position]):
            if name in new:
                new[name].copy(old[name])
                copied += math.prod(new[name].shape) * storage(new[name].dtype).itemsize
        self._images[to], self._images[row] = image, None
        return copied

    def step(self, row: int) -> Step | None:
        """The next step of the image in a row; None where its plan is at its end, or there is no image."""
        image = self._images[check_row(row, self.rows)]
        return None if image is None else image.step

    def latents(self, row: int | None = None) -> NDArray[np.float32]:
        """A copy of the latents after the last step taken, float32: [...] of one row, or [rows, ...] of all."""
        if row is None:
            return self._buffers[LATENTS].read()
        array: NDArray[np.float32] = self._view(check_row(row, self.rows), 1)[LATENTS].read()[0]
        return array

    def history(self, row: int) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Copies of what a row's next step i goes on from: x_i, x_{i-1}, … as float32 [4, ...], and e_{i-1}, e_{i-2}, …
        as float32 [3, ...]. Zeros where there is none yet, or the plan's sampler does not look back so far."""
        row = check_row(row, self.rows)
        own, image = self._view(row, 1), self._images[row]
        latents, outputs = (np.zeros((n, *own[LATENTS].shape[1:]), np.float32) for n in (HISTORY + 1, HISTORY))
        latents[0], outputs[0] = own[LATENTS].read()[0], own[OUTPUT].read()[0]
        for lag in range(1, image.reach + 1 if image else 1):
            latents[lag] = own[past(LATENTS, lag)].read()[0]
            outputs[lag - 1] = own[past(OUTPUT, lag)].read()[0]
        return latents, outputs

    def replace_latents(self, row: int, latents: NDArray[np.float32]) -> None:
        """Put float32 [...] in place of a row's latents; its next step goes on from them."""
        self._write(self._view(check_row(row, self.rows), 1)[LATENTS], latents, "the latents")

    # --- steps ----------------------------------------------------------------------------------

    def batches(self) -> tuple[tuple[int, int], ...]:
        """The ranges of images that one call may have, each as (least, most)."""
        return tuple(shape.batch for shape in self._shapes)

    def together(self) -> list[range]:
        """Ranges of neighbouring rows whose next steps run the same graph, as long as calls may be."""
        ranges: list[range] = []
        row = 0
        while row < self.rows:
            step = self.step(row)
            stop = row + 1
            while step and stop < self.rows and (other := self.step(stop)) and other.graph == step.graph:
                stop += 1
            while step and row < stop:
                count = most_at_once(self.batches(), stop - row) or stop - row
                ranges.append(range(row, row + count))
                row += count
            row = stop
        return ranges

    def take(self, rows: range) -> tuple[Call, tuple[Step, ...]]:
        """Write the rows' next steps into their buffers; the call that takes them, and the steps.

        :meth:`turn` has to follow the call. Raises :class:`RequestError` where the rows' next steps do not run one
        graph, or the bundle was not exported for so many images in a call.
        """
        self._check_rows(rows)
        images = [image for row in rows if (image := self._images[row]) is not None]
        steps = [image.step for image in images if image.step is not None]
        if not steps or len(steps) < len(rows):
            raise RequestError(f"rows {rows.start} to {rows.stop - 1} do not all have a step to take")
        graphs = dict.fromkeys(step.graph for step in steps)
        if len(graphs) > 1:
            raise RequestError(f"images that share a call run one graph; got {', '.join(graphs)}")
        graph = steps[0].graph
        call = self._call(graph, frozenset(n for s in steps for n in s.writes), rows.start, len(rows))
        call = self._with_controls(call, graph, images, rows)
        numbers = np.stack([step_row(s.call, i.guidance_scale) for s, i in zip(steps, images, strict=True)])
        self._view(rows.start, len(rows))[STEP].write(numbers)
        if NOISE in self._buffers:
            for row, step, image in zip(rows, steps, images, strict=True):
                if step.call.noise and image.step_noise is not None:
                    drawn = image.step_noise(step.index)
                    self._write(self._view(row, 1)[NOISE], drawn, f"the noise of step {step.index}")
        return call, tuple(steps)

    def turn(self, rows: range) -> None:
        """After the call of :meth:`take`: each image's history moves on, and so does its position."""
        self._check_rows(rows)
        own = self._view(rows.start, len(rows))
        reach = 0
        for row in rows:
            image = self._images[row]
            assert image is not None  # take() has seen it
            reach = max(reach, image.reach)
            self._images[row] = replace(image, position=image.position + 1)
        for lag in range(reach, 0, -1):
            for name in (LATENTS, OUTPUT):
                if past(name, lag) in own:
                    own[past(name, lag)].copy(own[past(name, lag - 1)])
        own[LATENTS].copy(own[NEXT_LATENTS])
        for row in rows:
            image = self._images[row]
            if image is not None and image.mend is not None:
                index = image.plan.steps[image.position - 1].index
                self.replace_latents(row, image.mend(index, self.latents(row)))

    def _with_controls(self, call: Call, graph: str, images: Sequence[_Image], rows: range) -> Call:
        """``call``, and before it those of the ControlNets that some of its images want; their scales are written."""
        calls: list[Call] = []
        for net in self._nets[graph]:
            scales = np.array([image.scale(net) for image in images], np.float32)
            self._view(rows.start, len(rows))[scale_name(net)].write(scales)
            if scales.any():
                spec = control_graph(shape_for(self._shapes, len(rows)).graphs, graph, net)
                calls.append(self._bound((spec.file, frozenset(), rows.start, len(rows)), spec, spec.output_names()))
        return _InTurn([*calls, call]) if calls else call

    def _check_control(self, net: str, control: Steered, plan: Plan) -> None:
        if picture_name(net) not in self._buffers:
            raise RequestError(f"the plan's graphs take nothing of a ControlNet {shown(net)!r}")
        if len(control.scales) != len(plan.steps):
            raise RequestError(
                f"ControlNet {net!r} has {len(control.scales)} scales, and plan '{shown(plan.name)}' takes "
                f"{len(plan.steps)} steps"
            )

    # --- buffers --------------------------------------------------------------------------------

    def carries(self) -> dict[str, Buffer]:
        """The carries' buffers, by name; owned by this state."""
        names = dict.fromkeys(name for plan in self.plans for name in plan.carries())
        return {name: self._buffers[name] for name in names}

    def conditioning(self) -> tuple[str, ...]:
        """The conditioning that the plans' graphs take, as ``<name>.<half>``."""
        return tuple(self._halves)

    def calls(self) -> dict[tuple[str, frozenset[str], int, int], Call]:
        """The engine calls bound until now, by (graph, carries written, first row, rows)."""
        return dict(self._calls)

    def _check_rows(self, rows: object) -> None:
        if not isinstance(rows, range) or rows.step != 1 or not 0 <= rows.start <= rows.stop <= self.rows:
            raise RequestError(f"the state has rows 0 to {self.rows - 1}, got {shown(rows)}; give a range of them")

    def _plan(self, plan: Plan | None) -> Plan:
        if plan is None:
            if len(self.plans) > 1:
                raise RequestError(f"the state has {len(self.plans)} plans; name the image's")
            return self.plans[0]
        if not isinstance(plan, Plan):
            raise RequestError(f"the image's plan must be one of the state's plans, got {shown(plan)}")
        if plan not in self._live:
            self._admit(plan)
        return plan

    def _admit(self, plan: Plan) -> None:
        """Let images follow a plan that there are buffers for already, such as what is left of one of the state's."""
        graphs = self._shapes[0].graphs
        ran = {name for own in self.plans for name in own.graphs()}
        if not ran.issuperset(plan.graphs()) or not self._buffers.keys() >= buffers(graphs, [plan]).keys():
            raise RequestError(f"plan {plan.name!r} is none of the state's: {', '.join(p.name for p in self.plans)}")
        PlanCheck([graphs], self._session.manifest.carries)(plan)
        if len(self._live) >= len(self.plans) + _MOST_ADMITTED:
            self._live = {own: self._live[own] for own in self.plans}
        self._live[plan] = _live(plan)

    def _history(self) -> Iterable[str]:
        return (name for name in self._buffers if name.partition(".")[0] in (LATENTS, OUTPUT, NOISE))

    def _call(self, graph: str, writes: frozenset[str], first: int, count: int) -> Call:
        spec = shape_for(self._shapes, count).graphs[graph]
        return self._bound((graph, writes, first, count), spec, (*STEP_OUTPUTS, *sorted(writes)))

    def _bound(self, key: tuple[str, frozenset[str], int, int], spec: GraphSpec, gives: Iterable[str]) -> Call:
        """The call of a graph on the rows of its key, bound once."""
        if key not in self._calls:
            own = self._view(*key[2:])
            inputs = {t.name: own[t.name] for t in spec.inputs}
            self._calls[key] = self._session.executable(spec).bind(inputs, {name: own[name] for name in gives})
        return self._calls[key]

    def _view(self, first: int, count: int) -> dict[str, Buffer]:
        key = (first, count)
        if key not in self._views:
            if not 0 <= first < first + count <= self.rows:
                raise RequestError(f"the state has rows 0 to {self.rows - 1}, got {first} to {first + count - 1}")
            self._views[key] = {name: buffer.rows(first, count) for name, buffer in self._buffers.items()}
        return self._views[key]

    def _write(self, buffer: Buffer, array: NDArray[Any], what: str) -> None:
        """Write one image's ``array`` [...] into a view [1, ...]."""
        array = numbers_of(array, what)
        if array.shape != buffer.shape[1:]:
            raise RequestError(f"{what} must have shape {list(buffer.shape[1:])}, got {list(array.shape)}")
        if array.dtype == np.float32:
            with np.errstate(over="ignore"):  # what overflows is told below
                array = encode(array, buffer.dtype)
        if array.dtype != storage(buffer.dtype):
            raise RequestError(f"{what} must be {buffer.dtype}, got {array.dtype}")
        check_given(array, what, dtype=buffer.dtype)
        buffer.write(array[np.newaxis])
