"""Data-parallel training in single-threaded processes.

On a shared machine one thread per process is several times cheaper than one process with many threads,
whose OpenMP barriers burn the time of every thread that the scheduler has taken off a core.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def _worker(rank: int, work: Callable[..., None], count: int, rendezvous: str, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=count)
    try:
        work(rank, *arguments)
    finally:
        dist.destroy_process_group()


def launch(work: Callable[..., None], count: int, *arguments: Any) -> None:
    """Run `work(rank, *arguments)` in `count` processes; raises if any of them fails."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_worker, args=(work, count, os.path.join(folder, "rendezvous"), arguments), nprocs=count)


@torch.no_grad()
def average_gradients(parameters: list[torch.nn.Parameter], number: float) -> float:
    """Average gradients over the workers in place, and with them `number`, whose mean is returned."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    flat = torch.cat([gradient.reshape(-1) for gradient in gradients] + [torch.tensor([number])])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    start = 0
    for gradient in gradients:
        gradient.copy_(flat[start : start + gradient.numel()].view_as(gradient))
        start += gradient.numel()
    return float(flat[-1])
