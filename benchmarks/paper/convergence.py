"""Figures 2 and A4: how much cross-attention's outputs change from one step to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.paper.eager import STEPS, Eager


def convergence(eager: Eager, captions: Sequence[str], seed: int, batch: int) -> dict[str, Any]:
    """The L2 distance of each module's outputs at steps i and i + 1, averaged over captions and both halves.

    ``all``: the mean of the modules' and ``deviation``, of every caption, half and module about it; ``modules``: each
    one's. Lists of n - 1 numbers, and of ``relative`` ones: the same over the norm of the output at step i + 1.
    """
    modules = eager.attentions("cross")
    distances: dict[str, list[list[float]]] = {name: [[] for _ in range(STEPS - 1)] for name in modules}
    relative: dict[str, list[list[float]]] = {name: [[] for _ in range(STEPS - 1)] for name in modules}
    at = 0
    before: dict[tuple[str, str], torch.Tensor] = {}

    def watch(name: str) -> Any:
        def take(_module: object, _args: object, output: torch.Tensor) -> None:
            flat, key = output.detach().flatten(1), (name, eager.running)
            if at > 0:
                apart = (flat - before[key]).norm(dim=1)
                distances[name][at - 1] += apart.tolist()
                relative[name][at - 1] += (apart / flat.norm(dim=1)).tolist()
            before[key] = flat

        return take

    handles = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    try:
        for start in range(0, len(captions), batch):

            def rule(step: Any) -> torch.Tensor:
                nonlocal at
                at = step.i
                return torch.as_tensor(step.guided())

            eager.draw(captions[start : start + batch], seed + start, rule)
            before.clear()
    finally:
        for handle in handles:
            handle.remove()
    every = [torch.tensor([distances[name][i] for name in modules]) for i in range(STEPS - 1)]
    return {
        "all": [float(value.mean()) for value in every],
        "deviation": [float(value.std()) for value in every],
        "relative": [float(torch.tensor([relative[name][i] for name in modules]).mean()) for i in range(STEPS - 1)],
        "modules": {name: [sum(step) / len(step) for step in steps] for name, steps in distances.items()},
    }
