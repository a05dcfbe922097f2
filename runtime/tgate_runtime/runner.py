"""Takes steps of plans. It knows steps and rows, not prompts, not the engine and not the method."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tgate_engine.errors import RequestError
from tgate_engine.plan import Plan, Step
from tgate_runtime.control import Steered
from tgate_runtime.request import check_call, check_mapping, numbers_of
from tgate_runtime.state import Mend, State


@dataclass(frozen=True, kw_only=True)
class StepDone:
    """A call that was made: the step of each image in ``rows``, in their order. ``elapsed_ms`` is the time inside the
    engine alone, which began at ``begin_s`` of :func:`time.perf_counter`."""

    rows: range
    steps: tuple[Step, ...]
    begin_s: float
    elapsed_ms: float

    @property
    def step(self) -> Step:
        """The first image's step; every image's, where they go together."""
        return self.steps[0]

    @property
    def index(self) -> int:
        """That step's index in its plan."""
        return self.step.index


def advance(state: State, rows: range | None = None) -> StepDone:
    """Take the next step of the images in ``rows`` (None: all rows) in one call.

    They must run the same graph next; plans and positions may differ. Raises
    :class:`~tgate_engine.errors.RequestError` where they do not, or the state is in use, and
    :class:`~tgate_engine.errors.EngineError` where the graph fails.
    """
    lock = state.claim()
    try:
        return _advance(state, range(state.rows) if rows is None else rows)
    finally:
        lock.release()


def run(
    state: State,
    *,
    latents: NDArray[np.float32],
    conditioning: Mapping[str, NDArray[Any]],
    guidance_scale: float | Sequence[float],
    plan: Plan | None = None,
    step_noise: Callable[[int, int], NDArray[np.float32]] | None = None,
    mend: Sequence[Mend | None] | None = None,
    controls: Sequence[Mapping[str, Steered]] | None = None,
) -> Generator[StepDone]:
    """Begin an image in every row of ``state`` and take all steps of its plan, one call for each item asked for.

    ``latents``: standard normal noise, float32 [rows, ...]; x_0 is this times the sampler's ``initial_scale``.
    ``conditioning``: ``<name>.<half>`` to [rows, ...], or [1, ...] for all rows alike; see :meth:`State.begin`.
    ``guidance_scale``: one for all, or one for each row. ``plan``: see :meth:`State.begin`.
    ``step_noise``: standard normal noise [...] by row and index of the step, asked for where the sampler is stochastic.
    ``mend``, ``controls``: each row's, see :meth:`State.begin`.

    Yields after each call; ``state.latents()`` then gives that step's result, and after the last step the
    final latents. Between items nothing runs: closing the generator (or dropping it) stops the work, and frees
    the state for the next run. Raises :class:`~tgate_engine.errors.RequestError` at the first item for inputs
    that do not fit, or a state in use, and :class:`~tgate_engine.errors.EngineError` where a graph fails.
    """
    lock = state.claim()
    try:
        several = isinstance(guidance_scale, (list, tuple)) or np.ndim(guidance_scale) == 1
        scales: list[Any] = [*guidance_scale] if several else [guidance_scale] * state.rows  # type: ignore[misc]
        start = numbers_of(latents, "the initial latents")
        check_mapping(conditioning, "conditioning")
        check_call(step_noise, "step_noise")
        if len(scales) != state.rows or start.shape[:1] != (state.rows,):
            raise RequestError(
                f"the state has {state.rows} rows; got latents of shape {list(start.shape)} and {len(scales)} "
                "guidance scales"
            )
        for row in range(state.rows):
            state.begin(
                row,
                start[row],
                {name: _row(name, values, row, state.rows) for name, values in conditioning.items()},
                guidance_scale=scales[row],
                plan=plan,
                step_noise=None if step_noise is None else _of_row(step_noise, row),
                mend=None if mend is None else mend[row],
                controls=None if controls is None else controls[row],
            )
        while ranges := state.together():
            for rows in ranges:
                yield _advance(state, rows)
    finally:
        lock.release()


def _advance(state: State, rows: range) -> StepDone:
    call, steps = state.take(rows)
    begin_s = time.perf_counter()
    call()
    elapsed_ms = (time.perf_counter() - begin_s) * 1e3
    state.turn(rows)
    return StepDone(rows=rows, steps=steps, begin_s=begin_s, elapsed_ms=elapsed_ms)


def _row(name: str, values: NDArray[Any], row: int, rows: int) -> NDArray[Any]:
    values = numbers_of(values, f"conditioning {name}")
    if values.shape[:1] not in ((1,), (rows,)):
        raise RequestError(f"conditioning {name} must have {rows} rows or 1, got shape {list(values.shape)}")
    array: NDArray[Any] = values[row if len(values) == rows else 0]
    return array


def _of_row(step_noise: Callable[[int, int], NDArray[np.float32]], row: int) -> Callable[[int], NDArray[np.float32]]:
    return lambda step: step_noise(row, step)
