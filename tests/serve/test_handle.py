"""A handle: steps for any number of readers, one end, and whoever is slow keeps nobody waiting."""

from __future__ import annotations

import asyncio
import gc
import threading
from typing import Any

import numpy as np
import pytest

from tgate_serve.handle import Drawn, Gone, Handle, Step

WAIT_S = 30.0


def step(done: int) -> Step:
    return Step(image=0, index=done, graph="f", done=done, total=3, company=1, elapsed_ms=1.0, towards=None)


def drawn() -> Drawn:
    latents = np.zeros((1, 2), np.float32)
    plan: Any = None
    return Drawn(latents=latents, seeds=(1,), plan=plan, size="s", steps={}, waited_s=0.0, drawn_s=0.0)


def handle() -> Handle:
    return Handle(lambda _: True)


def test_every_reader_gets_every_step() -> None:
    """Early, late, and after the end."""
    asked = handle()
    got: list[Step] = []
    early = threading.Thread(target=lambda: got.extend(asked.steps()))
    early.start()
    for done in range(3):
        asked.add(step(done))
    late = asked.steps()
    assert next(late).done == 0
    asked.finish(drawn())
    early.join(WAIT_S)
    assert [each.done for each in got] == [0, 1, 2]
    assert [each.done for each in late] == [1, 2]
    assert [each.done for each in asked.steps()] == [0, 1, 2]


def test_there_is_one_end() -> None:
    asked = handle()
    assert not asked.done()
    with pytest.raises(TimeoutError):
        asked.result(0.01)
    asked.fail(Gone("first"))
    asked.finish(drawn())
    asked.fail(Gone("second"))
    assert asked.done()
    for _ in range(2):
        with pytest.raises(Gone, match="first"):
            asked.result(0)


def test_a_cancel_is_the_workers_to_follow() -> None:
    called: list[Handle] = []

    def cancel(one: Handle) -> bool:
        called.append(one)
        return False

    asked = Handle(cancel)
    assert not asked.cancel()
    assert called == [asked]
    assert not asked.done()


def test_tasks_wait_beside_threads() -> None:
    """A task that gives up leaves the request and its other readers as they are."""
    asked = handle()

    async def read() -> tuple[list[int], Drawn]:
        quitter = asyncio.create_task(asked.drawn())
        reader = asyncio.create_task(collect())
        await asyncio.sleep(0.01)
        quitter.cancel()
        thread = threading.Thread(target=work)
        thread.start()
        result = await asked.drawn()
        thread.join()
        return await reader, result

    async def collect() -> list[int]:
        return [each.done async for each in asked.steps_async()]

    def work() -> None:
        for done in range(3):
            asked.add(step(done))
        asked.finish(drawn())

    done, result = asyncio.run(asyncio.wait_for(read(), WAIT_S))
    assert done == [0, 1, 2]
    assert result.seeds == (1,)
    assert not asked._bells


def test_who_gave_up_is_no_fault() -> None:
    """Of a request that then ends early: nobody is left who could ask why, and asyncio must not call that a fault."""
    faults: list[dict[str, Any]] = []

    async def read() -> None:
        asked = handle()
        asyncio.get_running_loop().set_exception_handler(lambda _, fault: faults.append(fault))
        quitter = asyncio.create_task(asked.drawn())
        await asyncio.sleep(0.01)
        quitter.cancel()
        await asyncio.sleep(0.01)
        asked.fail(Gone("called off"))
        await asyncio.sleep(0.01)
        del asked, quitter
        gc.collect()

    asyncio.run(read())
    assert not faults


def test_a_loop_that_is_closed_hears_nothing_more() -> None:
    asked = handle()
    loop = asyncio.new_event_loop()
    reader = asked.steps_async()
    asked.add(step(0))
    assert loop.run_until_complete(anext(reader)).done == 0
    loop.close()
    asked.add(step(1))
    asked.finish(drawn())
    assert [each.done for each in asked.steps()] == [0, 1]
