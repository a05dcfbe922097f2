"""The turns and captures of AOTInductor's calls, over a stand-in for PyTorch's CUDA that keeps a diary."""

from __future__ import annotations

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from tgate_runtime.engines.aoti import cuda
from tgate_runtime.engines.aoti.cuda import Gpu

POOL = (0, 1)


class Diary(list[str]):
    """What was done, in its order, by stream. ``fails``: what raises."""

    def __init__(self) -> None:
        super().__init__()
        self.streams = ["default"]
        self.fails: set[str] = set()
        self.pools: list[object] = []

    def note(self, what: str) -> None:
        self.append(f"{what} on {self.streams[-1]}")
        if what in self.fails:
            raise RuntimeError(what)

    def stream(self, name: str) -> SimpleNamespace:
        return SimpleNamespace(
            name=name,
            synchronize=lambda: self.append(f"wait for {name}"),
            wait_stream=lambda other: self.append(f"{name} waits for {other.name}"),
        )

    @contextlib.contextmanager
    def on(self, stream: SimpleNamespace) -> Iterator[None]:
        self.streams.append(stream.name)
        try:
            yield
        finally:
            self.streams.pop()

    def graph(self) -> SimpleNamespace:
        def begin(*, pool: object, capture_error_mode: str) -> None:
            self.pools.append(pool)
            self.note(f"begin {capture_error_mode}")

        return SimpleNamespace(capture_begin=begin, capture_end=lambda: self.note("end"))

    def cuda(self) -> SimpleNamespace:
        return SimpleNamespace(
            Stream=lambda _: self.stream("side"),
            CUDAGraph=self.graph,
            current_stream=lambda: self.stream(self.streams[-1]),
            device=lambda _: contextlib.nullcontext(),
            stream=self.on,
            empty_cache=lambda: self.append("empty cache"),
            graph_pool_handle=lambda: POOL,
        )


@pytest.fixture
def diary(monkeypatch: pytest.MonkeyPatch) -> Diary:
    kept = Diary()
    over = SimpleNamespace(_cuda_endAllocateToPool=lambda device, pool: kept.append(f"give {pool} of {device} back"))
    scratch = SimpleNamespace(zero_=lambda: kept.note("keeper"))
    stand_in = SimpleNamespace(cuda=kept.cuda(), _C=over, zeros=lambda *_, **__: scratch)
    monkeypatch.setattr(cuda, "torch", stand_in)
    return kept


@pytest.fixture
def gpu(diary: Diary) -> Gpu:
    return Gpu(torch.device("cuda", 3))


def noting(diary: Diary, what: str) -> Callable[[], None]:
    return lambda: diary.note(what)


def test_what_is_new_is_rehearsed_before_it_is_captured(gpu: Gpu, diary: Diary) -> None:
    gpu.captured(noting(diary, "work"), noting(diary, "rehearse"))
    assert diary == [
        "side waits for default",
        "rehearse on side",
        "rehearse on side",
        "wait for side",
        "empty cache",
        "begin thread_local on side",
        "keeper on side",
        "end on side",
        "begin thread_local on side",
        "work on side",
        "end on side",
        "default waits for side",
        "wait for default",
    ]
    diary.clear()
    gpu.captured(noting(diary, "work"), None)
    assert diary[1:-2] == ["begin thread_local on side", "work on side", "end on side"]
    assert diary.pools == [POOL] * 3


def test_one_thread_captures_and_collects_no_garbage(gpu: Gpu) -> None:
    seen = []

    def work() -> None:
        seen.append((threading.current_thread().name, gc.isenabled()))

    for _ in range(2):
        thread = threading.Thread(target=gpu.captured, args=(work, work))
        thread.start()
        thread.join()
    assert len(set(seen)) == 1
    assert seen[0][0].startswith("aoti-capture")
    assert not seen[0][1]
    assert gc.isenabled()


def test_a_turn_is_one_thread_s_and_ends_with_a_wait(gpu: Gpu, diary: Diary) -> None:
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with gpu.turn():
            diary.append("first")
            inside.set()
            assert leave.wait(10)

    first = threading.Thread(target=hold)
    second = threading.Thread(target=gpu.captured, args=(noting(diary, "second"), None))
    first.start()
    assert inside.wait(10)
    second.start()
    second.join(0.1)
    assert second.is_alive()
    assert diary == ["first"]
    leave.set()
    first.join()
    second.join()
    assert diary[:3] == ["first", "wait for default", "side waits for default"]


@pytest.mark.parametrize("fault", ["work", "end"])
def test_a_capture_that_fails_is_left(gpu: Gpu, diary: Diary, fault: str) -> None:
    gpu.captured(noting(diary, "fine"), None)
    diary.clear()
    diary.fails = {fault}
    with pytest.raises(RuntimeError, match=f"^{fault}$") as error:
        gpu.captured(noting(diary, "work"), None)
    assert error.value.__context__ is None
    assert diary[-2:] == ["end on side", f"give {POOL} of 3 back"]
    assert diary.streams == ["default"]
    diary.fails = set()
    gpu.captured(noting(diary, "work"), None)
