"""What a request's sender holds: its steps as they are taken, its end, and the means to call it off."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tgate_engine.errors import TgateError
from tgate_engine.plan import Plan


class Gone(TgateError):
    """A request ended before it was through."""


class Cancelled(Gone):
    """Somebody called it off."""


class Late(Gone):
    """It was not through within its time."""


class Stopped(Gone):
    """The server has stopped, or is about to: another one may take it."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One step of one image.

    ``image``: which of the request's. ``index``: the step's in its plan. ``done`` of ``total`` steps of the whole
    request are taken. ``company``: the images of the call, of all requests; ``elapsed_ms``: its time inside the engine.
    ``towards``: where the latents are heading, float32 [...], to be decoded, where the request asked to look: what the
    plan would end in if the network gave from now on what it gave last (:func:`tgate_runtime.preview.end_of`).
    """

    image: int
    index: int
    graph: str
    done: int
    total: int
    company: int
    elapsed_ms: float
    towards: NDArray[np.float32] | None


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """A request that is through. ``latents``: float32 [N, ...], final, before decoding. ``seeds``: of each image.
    ``steps``: how many of each graph one image took. ``waited_s``: until the first image had a row; ``drawn_s``: from
    then on."""

    latents: NDArray[np.float32]
    seeds: tuple[int, ...]
    plan: Plan
    size: str
    steps: Mapping[str, int]
    waited_s: float
    drawn_s: float


class Handle:
    """A request that a worker has taken. Thread-safe; may be waited for by any number of threads and tasks at once.

    Steps are kept until the handle goes, a plan's number of them for each image, so that a slow reader misses none and
    keeps nobody waiting.
    """

    def __init__(self, cancel: Callable[[Handle], bool]) -> None:
        """``cancel``: what :meth:`cancel` calls. Workers make handles."""
        self._cancel = cancel
        self._future: Future[Drawn] = Future()
        self._steps: list[Step] = []
        self._news = threading.Condition()
        self._bells: list[Callable[[], None]] = []
        self._future.set_running_or_notify_cancel()
        self._future.add_done_callback(lambda _: self._ring())

    def cancel(self) -> bool:
        """Call the request off: its rows are free for others from the next call on. False where it had ended before:
        what is through stays so."""
        return self._cancel(self)

    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._future.done()

    def result(self, timeout_s: float | None = None) -> Drawn:
        """Wait for the end. Raises :class:`TimeoutError` where the time runs out first, :class:`Gone` where it ended
        early, and whatever :class:`~tgate_engine.errors.TgateError` ended it."""
        return self._future.result(timeout_s)

    async def drawn(self) -> Drawn:
        """The same from asyncio. A task that is cancelled while it waits leaves the request as it is."""
        awaited = asyncio.wrap_future(self._future)
        # A task that has been cancelled asks no more how it ended; asyncio would log that as a fault.
        awaited.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
        return await asyncio.shield(awaited)

    def latest(self) -> Step | None:
        """The step that was taken last; None before the first."""
        with self._news:
            return self._steps[-1] if self._steps else None

    def steps(self) -> Iterator[Step]:
        """Every step from the first on, until the request ends; how it ended says :meth:`result`."""
        seen = 0
        while True:
            with self._news:
                while len(self._steps) == seen and not self._future.done():
                    self._news.wait()
                fresh = self._steps[seen:]
            yield from fresh
            seen += len(fresh)
            if not fresh:
                return

    async def steps_async(self) -> AsyncIterator[Step]:
        """The same from asyncio."""
        loop, news, seen = asyncio.get_running_loop(), asyncio.Event(), 0

        def bell() -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody reads there any more
                loop.call_soon_threadsafe(news.set)

        with self._news:
            self._bells.append(bell)
        try:
            while True:
                news.clear()
                with self._news:
                    over, fresh = self._future.done(), self._steps[seen:]
                for step in fresh:
                    yield step
                seen += len(fresh)
                if not fresh:
                    if over:
                        return
                    await news.wait()
        finally:
            with self._news:
                self._bells.remove(bell)

    # --- from the worker ------------------------------------------------------------------------

    def add(self, step: Step) -> None:
        """A step was taken."""
        with self._news:
            self._steps.append(step)
        self._ring()

    def finish(self, drawn: Drawn) -> None:
        """The request is through; nothing where it has ended before."""
        with self._news:
            if not self._future.done():
                self._future.set_result(drawn)

    def fail(self, error: Exception) -> bool:
        """The request has ended; False, and nothing, where it had before."""
        with self._news:
            if self._future.done():
                return False
            self._future.set_exception(error)
            return True

    def _ring(self) -> None:
        with self._news:
            self._news.notify_all()
            bells = list(self._bells)
        for bell in bells:
            bell()
