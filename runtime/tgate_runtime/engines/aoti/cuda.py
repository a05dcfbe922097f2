"""What the calls of one engine on an NVIDIA GPU share: their turns, and the memory of their CUDA graphs.

A call of a denoising graph is captured once, when it is bound, and is one launch from then on. All CUDA graphs of an
engine work in one pool of memory, since calls run one after another: the engine needs what its hungriest call does. A
CUDA graph keeps its places there for good and writes to them whenever it is replayed, whatever has them by then. So
nothing that has to last lies in the pool: a capture ends with copies of its results into buffers outside it.

No GPU has run it yet: on the one that tried, libraries did not load (``docs/engines.md``).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from tgate_engine.garbage import uncollected

# cuBLAS keeps its handles, and cuDNN what it chose for each shape, by threads: what is tried out in one thread is ready
# to be captured in that one alone.
_CAPTURING = ThreadPoolExecutor(1, "aoti-capture")
_REHEARSALS = 2  # the first run of a library loads kernels and makes workspaces; the second has nothing new to make


class Gpu:
    """One GPU's turns and captures, for one engine. Any thread may ask.

    CUDA's own errors are raised as torch raises them, RuntimeError for the most part.
    """

    def __init__(self, device: torch.device) -> None:
        """``device``: with its index."""
        self.device = device
        self._turns = threading.RLock()
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()
        self._keeper: tuple[Any, Any] | None = None
        self._failed: list[Any] = []

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        """While open, no other call of the engine runs; what was queued meanwhile is done when it closes.

        Work goes to the current stream, which is the one that buffers are written on.
        """
        with self._turns, torch.cuda.device(self.device):
            yield
            torch.cuda.current_stream().synchronize()

    def captured(self, work: Callable[[], None], rehearse: Callable[[], None] | None) -> Any:
        """``work`` as a ``torch.cuda.CUDAGraph``, to be replayed in a :meth:`turn`, and not to outlive this object.

        ``work`` only queues, and keeps nothing that it allocates. ``rehearse`` runs what it runs, for the first time
        with these shapes, and spoils no buffer; None where that was done before.
        """
        return _CAPTURING.submit(self._captured, work, rehearse).result()

    def _captured(self, work: Callable[[], None], rehearse: Callable[[], None] | None) -> Any:
        with self.turn(), uncollected():  # were a library collected now, unloading its kernels would end the capture
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                if rehearse is not None:
                    for _ in range(_REHEARSALS):
                        rehearse()
                    self._stream.synchronize()
                    torch.cuda.empty_cache()  # or the memory that they worked in would stay beside the pool
                if self._keeper is None:
                    # PyTorch will not capture into a pool again after the last CUDA graph in it has gone.
                    scratch = torch.zeros(1, device=self.device)
                    self._keeper = self._capture(scratch.zero_), scratch
                graph = self._capture(work)
            torch.cuda.current_stream().wait_stream(self._stream)
            return graph

    def _capture(self, work: Callable[[], Any]) -> Any:
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on with the GPU meanwhile: they write and read buffers.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            work()
            graph.capture_end()
        except BaseException:
            self._leave(graph)
            raise
        return graph

    def _leave(self, graph: Any) -> None:
        """Leave a capture that failed, as far as it was begun, so that stream and allocator are as they were."""
        self._failed.append(graph)  # allocators may go on asking it whether a stream is being captured
        with contextlib.suppress(Exception):
            graph.capture_end()
        with contextlib.suppress(Exception):
            torch._C._cuda_endAllocateToPool(self.device.index, self._pool)
