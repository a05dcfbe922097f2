"""The videos of a server: drawn while nobody waits, and kept for a while.

They are in the memory of the process that took them, and gone with it: whoever wants one fetches it before its server
stops. See :func:`tgate_serve.server.serve` for what a server that is to stop still waits for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, get_args

from tgate_serve.api.errors import ApiError, api_error
from tgate_serve.api.schemas import Report, VideoFormat, VideoStatus
from tgate_serve.handle import Cancelled
from tgate_serve.model import Drawing


@dataclass(frozen=True, kw_only=True)
class Made:
    """What came of a job. ``content``: the video's file. ``thumbnail``: its first frame, WebP."""

    content: bytes
    thumbnail: bytes
    report: Report


@dataclass(kw_only=True, eq=False)
class Job:
    """One video. Of its drawing, which holds all of its steps and latents, nothing is kept once it has ended.

    ``seconds``: its length. ``created_s``, ``ended_s``: Unix time in seconds. ``error``: why there is no video.
    ``fetched``: whether somebody has the whole of it.
    """

    identity: str
    drawing: Drawing | None
    model: str
    prompt: str | None
    size: str
    seconds: str
    seed: int
    form: VideoFormat
    created_s: float
    ended_s: float | None = None
    made: Made | None = None
    error: ApiError | None = None
    fetched: bool = False
    _stood: int = field(default=0, repr=False)

    @property
    def status(self) -> VideoStatus:
        """``queued`` until its first step is taken, ``in_progress`` until its file is there."""
        if self.made is not None:
            return "completed"
        if self.error is not None:
            return "cancelled" if self.error.code == "cancelled" else "failed"
        assert self.drawing is not None
        return "queued" if self.drawing.handle.latest() is None else "in_progress"

    @property
    def progress(self) -> int:
        """The steps that are taken, in percent; 100 once its file is there."""
        if self.drawing is None:
            return self._stood
        latest = self.drawing.handle.latest()
        return 0 if latest is None else min(99, 100 * latest.done // latest.total)

    @property
    def ahead(self) -> int | None:
        """How many images wait before it; None once its first step is taken."""
        if self.drawing is None or self.drawing.handle.latest() is not None:
            return None
        return self.drawing.model.worker.ahead(self.drawing.handle)

    @property
    def wanted(self) -> bool:
        """Whether it is under way, or completed and not fetched."""
        return self.ended_s is None or (self.made is not None and not self.fetched)

    def left_s(self) -> float:
        """How long its own steps take that are not taken yet, going by those of late."""
        if self.drawing is None:
            return 0.0
        latest, steps = self.drawing.handle.latest(), len(self.drawing.plan.steps)
        return self.drawing.model.worker.seconds(steps if latest is None else latest.total - latest.done)

    def end(self, outcome: Made | Exception, now_s: float) -> None:
        """It has ended with a file, or without; nothing where it had before."""
        if self.ended_s is not None:
            return
        self._stood, self.ended_s, self.drawing = self.progress, now_s, None
        if isinstance(outcome, Made):
            self._stood, self.made = 100, outcome
        else:
            self.error = api_error(outcome)


class Jobs:
    """All that are kept, the oldest first. For the event loop's thread alone.

    What they hold is bounded: ``most`` files, and as many drawings at most.
    """

    def __init__(self, most: int, keep_s: float, clock: Callable[[], float] = time.time) -> None:
        """``most``: how many are kept. ``keep_s``: for how long after their end. ``clock``: Unix time in seconds."""
        self.most, self.keep_s, self.clock = most, keep_s, clock
        self._jobs: dict[str, Job] = {}
        self._entering = 0
        self._tasks: set[asyncio.Task[None]] = set()

    def __iter__(self) -> Iterator[Job]:
        """Those that are there; a finished one is not once its time is over."""
        now_s = self.clock()
        for job in list(self._jobs.values()):
            if job.ended_s is not None and now_s >= job.ended_s + self.keep_s:
                del self._jobs[job.identity]
        return iter(list(self._jobs.values()))

    def find(self, identity: str) -> Job:
        """The job of an id. Raises :class:`~tgate_serve.api.errors.ApiError`."""
        for job in self:
            if job.identity == identity:
                return job
        raise ApiError(
            404, f"no video of that id is here; one is kept for {self.keep_s:.0f} s after its end", code="not_found"
        )

    def counts(self) -> Mapping[str, int]:
        """How many there are of every status."""
        counts = dict.fromkeys(get_args(VideoStatus), 0)
        for job in self:
            counts[job.status] += 1
        return counts

    @contextmanager
    def entrance(self) -> Iterator[None]:
        """A place for a job that :meth:`start` begins inside, while it is made ready. Raises
        :class:`~tgate_serve.api.errors.ApiError` where all places are of jobs that have not ended."""
        busy = [job for job in self if job.ended_s is None]
        if len(busy) + self._entering >= self.most:
            after_s = max(1.0, min((job.left_s() for job in busy), default=1.0))
            message = f"{self.most} videos are under way, as many as are kept; ask again in {after_s:.0f} s"
            raise ApiError(429, message, code="jobs_full", retry_s=after_s)
        self._entering += 1
        try:
            yield
        finally:
            self._entering -= 1

    def start(self, job: Job, made: Coroutine[Any, Any, Made]) -> None:
        """Keep a job, and wait for what ``made`` comes to. Of too many, those go that ended first."""
        ended = sorted((other for other in self if other.ended_s is not None), key=lambda other: other.ended_s or 0.0)
        for other in ended[: max(0, len(self._jobs) + 1 - self.most)]:
            del self._jobs[other.identity]
        self._jobs[job.identity] = job
        task = asyncio.get_running_loop().create_task(self._wait(job, made))
        self._tasks.add(task)  # the loop alone would let it be collected
        task.add_done_callback(self._tasks.discard)

    async def _wait(self, job: Job, made: Coroutine[Any, Any, Made]) -> None:
        try:
            outcome: Made | Exception = await made
        except Exception as error:
            outcome = error
        job.end(outcome, self.clock())

    def cancel(self, job: Job) -> None:
        """Call one off, if it has not ended: its rows are free from the next call on, and it stays listed."""
        if job.drawing is not None:
            job.drawing.handle.cancel()
            job.end(Cancelled("the video was cancelled"), self.clock())

    def forget(self, job: Job) -> None:
        """Call one off, if it has not ended, and keep it no longer."""
        self.cancel(job)
        del self._jobs[job.identity]

    def close(self) -> None:
        """Call off all that have not ended."""
        for job in self:
            self.cancel(job)
