"""The worker: what a request draws is its own, whoever comes and goes, fails or is called off beside it."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.serve.requests import Wish, plans
from tgate_engine.errors import EngineError, RequestError
from tgate_engine.footprint import memory
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.runner import advance
from tgate_runtime.session import Session
from tgate_runtime.state import State
from tgate_serve.added import GUESS
from tgate_serve.handle import Gone, Handle
from tgate_serve.scheduler import Busy
from tgate_serve.worker import Worker

WAIT_S = 120.0


@pytest.fixture
def worker(session: Session) -> Iterator[Worker]:
    with Worker(session, plans=list(plans(session).values()), rows=6, added=0.1) as made:
        yield made


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While this event is not set, no call is made."""
    event, real = threading.Event(), State.take

    def take(self: State, rows: range) -> Any:
        assert event.wait(WAIT_S)
        return real(self, rows)

    monkeypatch.setattr(State, "take", take)
    yield event
    event.set()


def same(handle: Handle, wish: Wish, session: Session) -> None:
    np.testing.assert_array_equal(handle.result(WAIT_S).latents, wish.alone(session))


def until(true: Callable[[], bool]) -> bool:
    """Whether it comes true in time."""
    end_s = time.monotonic() + WAIT_S
    while not true() and time.monotonic() < end_s:
        time.sleep(0.01)
    return true()


# --- company ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_a_request_is_the_same_alone_and_in_any_company(session: Session, seed: int) -> None:
    """Random plans, seeds, texts, scales, priorities, times of arrival and cancels, in few rows: bit for bit."""
    rng = np.random.default_rng(seed)
    names = list(plans(session))
    asked: list[tuple[Handle, Wish, bool]] = []
    with Worker(
        session, plans=list(plans(session).values()), rows=int(rng.integers(3, 7)), patience=2, added=0.1
    ) as worker:
        for _ in range(14):
            wish = Wish(
                plan=names[rng.integers(len(names))],
                seeds=tuple(int(s) for s in rng.integers(4, size=rng.integers(1, 4))),
                text=int(rng.integers(3)),
                guidance_scale=float(rng.choice([2.0, 7.5])),
            )
            handle = worker.submit(wish.request(session, priority=int(rng.integers(3))))
            cancelled = bool(rng.random() < 0.25)
            asked.append((handle, wish, cancelled))
            time.sleep(float(rng.exponential(0.05)))
            if cancelled:
                handle.cancel()
        for handle, wish, cancelled in asked:
            if cancelled and isinstance(handle._future.exception(WAIT_S), Gone):
                continue
            same(handle, wish, session)
        assert worker.load() == (0, 0)
        counts = worker.counts
        assert any(images > 1 for _, _, images in counts.calls)
        assert counts.images + counts.cancelled == sum(len(wish.seeds) for _, wish, _ in asked)
        assert counts.failed == counts.expired == 0


def test_requests_at_other_steps_of_other_plans_share_calls(session: Session, worker: Worker) -> None:
    """One is two steps on when the other comes; both end as they would alone."""
    first = Wish("ungated", (1,))
    handle = worker.submit(first.request(session))
    steps = handle.steps()
    next(steps), next(steps)
    second = Wish("long", (2,), text=1)
    other = worker.submit(second.request(session))
    same(handle, first, session)
    same(other, second, session)
    assert any(step.company == 2 for step in handle.steps())


def test_rows_that_stay_together_stay_where_they_are(session: Session) -> None:
    """Four that come together move nothing; where one of them leaves, one moves."""
    with Worker(session, plans=list(plans(session).values()), rows=4, added=0.1) as worker:
        wishes = [Wish("long", (seed,)) for seed in range(4)]

        def together() -> list[Handle]:
            with worker._changed:  # the thread hears of all of them at once
                return [worker.submit(wish.request(session)) for wish in wishes]

        for handle, wish in zip(together(), wishes, strict=True):
            same(handle, wish, session)
        assert worker.counts.moves == worker.counts.moved_bytes == 0
        handles = together()
        next(handles[1].steps())
        handles[1].cancel()
        for index in (0, 2, 3):
            same(handles[index], wishes[index], session)
        assert worker.counts.moves == 1
        assert (
            0
            < worker.counts.moved_bytes
            <= memory(plans(session)["long"], session.manifest, session.shapes()[0])["request"]
        )


@pytest.mark.parametrize("share", [0.3, 1.2])
def test_what_an_image_adds_is_learned_from_the_calls(
    session: Session, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    """By a clock that only calls move; unless it is given."""
    now_s = [0.0]

    def timed(state: State, rows: range) -> Any:
        now_s[0] += 0.01 * (1 + share * (len(rows) - 1))
        return advance(state, rows)

    monkeypatch.setattr("tgate_serve.worker.advance", timed)
    monkeypatch.setattr("tgate_serve.worker.time", SimpleNamespace(monotonic=lambda: now_s[0]))
    wishes = [Wish("long", (seed,)) for seed in range(3)]
    for given, learned in ((None, share), (0.7, 0.7)):
        with Worker(session, plans=list(plans(session).values()), rows=4, added=given) as worker:
            size = session.sizes[0]
            assert worker.added() == {size: GUESS if given is None else given}
            for several in [wishes[:1], wishes] * 4:
                handles = [worker.submit(wish.request(session)) for wish in several]
                for handle, wish in zip(handles, several, strict=True):
                    same(handle, wish, session)
            assert worker.added()[size] == pytest.approx(learned)


# --- cancels, deadlines, ends -------------------------------------------------------------------


def test_a_cancelled_request_touches_nobody(session: Session, worker: Worker) -> None:
    wishes = [Wish("long", (seed,)) for seed in range(3)]
    handles = [worker.submit(wish.request(session)) for wish in wishes]
    next(handles[1].steps())
    handles[1].cancel()
    handles[1].cancel()
    with pytest.raises(Gone, match="was cancelled"):
        handles[1].result(WAIT_S)
    same(handles[0], wishes[0], session)
    same(handles[2], wishes[2], session)
    assert worker.counts.cancelled == 1
    assert len(list(handles[1].steps())) < 7
    handles[0].cancel()  # it is through
    same(handles[0], wishes[0], session)


def test_a_request_whose_time_is_up_is_let_go(session: Session, worker: Worker, held: threading.Event) -> None:
    """All of its images; the others go on."""
    wish = Wish("short", (1,))
    handle = worker.submit(wish.request(session))
    late = worker.submit(replace(wish, seeds=(2, 3)).request(session, within_s=0.01))
    time.sleep(0.05)
    held.set()
    with pytest.raises(Gone, match=r"not through within 0\.01 s"):
        late.result(WAIT_S)
    same(handle, wish, session)
    assert worker.counts.expired == 2


def test_a_full_queue_refuses_and_says_how_long(session: Session, held: threading.Event) -> None:
    with Worker(session, plans=list(plans(session).values()), rows=1, queue=2) as worker:
        wish = Wish("short", (1,))
        handles = [worker.submit(wish.request(session)) for _ in range(3)]
        with pytest.raises(Busy, match=r"2 places, and 1 more are wanted; ask again later, in \d+ s") as busy:
            worker.submit(wish.request(session))
        assert worker.seconds(busy.value.steps) >= 1
        assert until(lambda: worker.load() == (1, 2))
        assert (worker.counts.refused, worker.ahead(handles[0]), worker.ahead(handles[2])) == (1, 0, 1)
        held.set()
        for handle in handles:
            same(handle, wish, session)


def test_a_drained_worker_ends_what_it_has_and_takes_no_more(session: Session, worker: Worker) -> None:
    wish = Wish("short", (1, 2))
    handle = worker.submit(wish.request(session))
    assert worker.drain(WAIT_S)
    assert handle.done()
    same(handle, wish, session)
    with pytest.raises(Gone, match="takes no more requests"):
        worker.submit(wish.request(session))


def test_a_drain_has_its_time(session: Session, worker: Worker, held: threading.Event) -> None:
    handle = worker.submit(Wish("short", (1,)).request(session))
    assert not worker.drain(0.05)
    held.set()
    assert worker.drain(WAIT_S)
    assert handle.done()


def test_a_closed_worker_has_ended_everything(session: Session) -> None:
    worker = Worker(session, plans=list(plans(session).values()))
    handles = [worker.submit(Wish("long", (seed,)).request(session)) for seed in range(20)]
    worker.close()
    worker.close()
    assert not worker._thread.is_alive()
    errors = [handle._future.exception(0) for handle in handles]
    assert any(isinstance(error, Gone) for error in errors)
    assert all(error is None or "has stopped" in str(error) for error in errors)


# --- errors reach one request alone -------------------------------------------------------------


def test_conditioning_that_does_not_fit_ends_its_request_alone(session: Session, worker: Worker) -> None:
    wish = Wish("short", (1,))
    handle = worker.submit(wish.request(session))
    request = wish.request(session)
    (name, *_) = request.conditioning
    broken = [
        {n: v for n, v in request.conditioning.items() if n != name},
        {**request.conditioning, name: np.zeros((1, 2, 3), np.float32)},
        {**request.conditioning, name: np.full_like(request.conditioning[name], np.nan)},
    ]
    for conditioning in broken:
        other = worker.submit(replace(request, conditioning=conditioning, seeds=(5, 6)))
        with pytest.raises(RequestError):
            other.result(WAIT_S)
    same(handle, wish, session)
    assert worker.load() == (0, 0)
    assert worker.counts.failed == 2 * len(broken)


@pytest.mark.parametrize("poisoned", [0, 1])
def test_a_call_that_fails_ends_the_request_it_fails_for(
    session: Session, held: threading.Event, monkeypatch: pytest.MonkeyPatch, poisoned: int
) -> None:
    """The engine refuses every call that has one image among its own; the others take their step alone."""

    def failing(state: State, rows: range) -> Any:
        seeds = [state._images[row].guidance_scale for row in rows]  # type: ignore[union-attr]
        if 7.0 in seeds:
            raise EngineError("the graph failed")
        return advance(state, rows)

    monkeypatch.setattr("tgate_serve.worker.advance", failing)
    with Worker(session, plans=list(plans(session).values()), rows=4, added=0.1) as worker:
        wishes = [Wish("long", (seed,), guidance_scale=7.0 if seed == poisoned else 3.0) for seed in range(3)]
        handles = [worker.submit(wish.request(session)) for wish in wishes]
        held.set()
        for index, (handle, wish) in enumerate(zip(handles, wishes, strict=True)):
            if index == poisoned:
                with pytest.raises(EngineError, match="the graph failed"):
                    handle.result(WAIT_S)
            else:
                same(handle, wish, session)
        assert worker.counts.failed == 1


def test_what_is_not_finite_ends_its_request_alone(session: Session, worker: Worker, held: threading.Event) -> None:
    wishes = [Wish("short", (1,)), Wish("short", (2,), guidance_scale=9.0)]
    handles = [worker.submit(wish.request(session)) for wish in wishes]
    state = next(iter(worker._lanes.values())).place.state
    real = state.latents

    def latents(row: int | None = None) -> Any:
        values = real(row)
        image = None if row is None else state._images[row]
        return values * np.float32(np.nan) if image is not None and image.guidance_scale == 9.0 else values

    state.latents = latents  # type: ignore[method-assign]
    held.set()
    with pytest.raises(EngineError, match="not finite"):
        handles[1].result(WAIT_S)
    same(handles[0], wishes[0], session)


def test_a_fault_of_ours_leaves_nobody_waiting(
    session: Session, worker: Worker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fault(*_: object) -> None:
        raise ZeroDivisionError("a fault")

    monkeypatch.setattr(worker, "_call", fault)
    handle = worker.submit(Wish("short", (1,)).request(session))
    with pytest.raises(Gone, match=r"^the server's worker has failed; its log says why; start it again$"):
        handle.result(WAIT_S)
    with pytest.raises(Gone, match=r"^the server's worker has failed; its log says why; start it again$"):
        worker.submit(Wish("short", (1,)).request(session))
    assert "ZeroDivisionError: a fault" in caplog.text
    assert worker.drain(1.0)


def test_a_fault_after_the_last_step_leaves_nobody_waiting(session: Session, held: threading.Event) -> None:
    """The image has left the scheduler then, and its request is not told yet."""
    calls = []

    def called(*_: object) -> None:
        calls.append(True)
        if len(calls) == 4:
            raise MemoryError

    with Worker(session, plans=list(plans(session).values()), rows=2, on_call=called) as worker:
        handle = worker.submit(Wish("short", (1,)).request(session))
        held.set()
        with pytest.raises(Gone, match="has failed"):
            handle.result(5.0)
        assert worker.drain(5.0)


def test_a_call_for_nobody_is_still_of_a_size(session: Session, held: threading.Event) -> None:
    """All of its images were called off while it was made."""
    sizes: list[str] = []
    with Worker(
        session, plans=list(plans(session).values()), rows=2, on_call=lambda size, *_: sizes.append(size)
    ) as worker:
        handle = worker.submit(Wish("short", (1,)).request(session))
        assert until(lambda: worker.load() == (1, 0))
        threading.Event().wait(0.1)  # for the call to begin
        handle.cancel()
        held.set()
        assert until(lambda: bool(sizes))
    assert set(sizes) == {"128x128"}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda r: replace(r, plan="default"), "plan 'default' is not served; there is short, long"),
        (lambda r: replace(r, plan="nobody"), "nobody"),
        (lambda r: replace(r, size="64x64"), "size '64x64' is not loaded"),
        (lambda r: replace(r, seeds=()), "at least one; got none"),
        (lambda r: replace(r, seeds=(-1,)), "got -1"),
        (lambda r: replace(r, seeds=5), "seeds must be a list"),
        (lambda r: replace(r, guidance_scale=0.5), "above 1"),
        (lambda r: replace(r, generator="dice"), "no generator 'dice'"),
        (lambda r: replace(r, conditioning=5), "conditioning must be tensors"),
        (lambda r: replace(r, conditioning={"a": None}), "conditioning a must be an array of numbers"),
        (lambda r: replace(r, conditioning={"a": np.float32(1)}), r"conditioning a must be \[1, ...\], got shape \[\]"),
        (lambda r: replace(r, priority=10), "priority from 0 to 9"),
        (lambda r: replace(r, within_s=0), "seconds above 0, got 0"),
        (lambda r: replace(r, within_s=float("nan")), "seconds above 0, got nan"),
        (lambda r: replace(r, seeds=range(200)), "may have 70 images here, got 200"),
    ],
)
def test_what_cannot_be_drawn_is_refused_at_once(
    session: Session, worker: Worker, change: Callable[[Any], Any], says: str
) -> None:
    with pytest.raises(Exception, match=says):
        worker.submit(change(Wish("short", (1,)).request(session)))
    assert worker.load() == (0, 0)


# --- what it takes, and what it gives -----------------------------------------------------------


def test_admission_is_by_planned_memory(session: Session) -> None:
    """Weights once, the buffers of all rows and the spare one, and the hungriest call."""
    plan, shape = session.plan("default"), session.shapes()[0]
    one, most = (memory(plan, session.manifest, shape, batch=n) for n in (1, 4))
    with Worker(session, plans=[plan], rows=5) as worker:
        planned = worker.planned_bytes
        assert planned == one["weights"] + 6 * one["request"] + most["scratch"]
        state = next(iter(worker._lanes.values())).place.state
        held = sum(buffer.read().nbytes for buffer in state._buffers.values())
        assert held == 6 * one["request"]
    Worker(session, plans=[plan], rows=5, memory_bytes=planned).close()
    with pytest.raises(RequestError, match=rf"5 images of 128x128 at once take {planned} bytes, .* {planned - 1} are"):
        Worker(session, plans=[plan], rows=5, memory_bytes=planned - 1)


def test_a_drawn_request_says_what_ran(session: Session, worker: Worker) -> None:
    wish = Wish("long", (3, 4))
    handle = worker.submit(wish.request(session, looks=[2, 6]))
    drawn = handle.result(WAIT_S)
    assert drawn.steps == {"full": 3, "reuse_self": 1, "reuse_cross": 3}
    assert (drawn.seeds, drawn.size, drawn.plan.name) == ((3, 4), "128x128", "long")
    assert drawn.waited_s >= 0
    assert drawn.drawn_s > 0
    steps = list(handle.steps())
    assert [step.done for step in steps] == list(range(1, 15))
    assert {step.total for step in steps} == {14}
    assert sorted((step.image, step.index) for step in steps) == [(i, j) for i in range(2) for j in range(7)]
    looks = {(step.image, step.index): step.towards for step in steps if step.towards is not None}
    assert looks.keys() == {(image, index) for image in range(2) for index in (2, 6)}
    np.testing.assert_array_equal(np.stack([looks[0, 6], looks[1, 6]]), drawn.latents)
    pictures = worker.pictures(drawn)
    alone = Pipeline(session)(
        prompt_embeds=wish.embeds(session), seed=4, plan=plans(session)["long"], guidance_scale=5.0
    )
    assert np.array_equal(np.asarray(pictures[1][0]), np.asarray(alone.images[0]))


def test_requests_from_asyncio(session: Session, worker: Worker) -> None:
    """Steps as they come, the end awaited; a reader that stops reading stops nothing."""

    async def ask() -> None:
        wish = Wish("short", (1, 2))
        handle = worker.submit(wish.request(session))
        impatient = asyncio.create_task(handle.drawn())
        await asyncio.sleep(0)
        impatient.cancel()
        steps = [step async for step in handle.steps_async()]
        assert [step.done for step in steps] == list(range(1, 9))
        drawn = await handle.drawn()
        np.testing.assert_array_equal(drawn.latents, wish.alone(session))
        assert [step.done async for step in handle.steps_async()] == list(range(1, 9))
        assert not handle._bells

    asyncio.run(asyncio.wait_for(ask(), WAIT_S))


def test_threads_may_ask_at_once(session: Session, worker: Worker) -> None:
    wishes = [Wish(name, (seed,)) for seed in range(3) for name in ("short", "early")]
    handles: dict[int, Handle] = {}

    def ask(index: int) -> None:
        handles[index] = worker.submit(wishes[index].request(session))

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(wishes))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, wish in enumerate(wishes):
        same(handles[index], wish, session)
