"""Random weights for small modules, drawn so that what goes in decides what comes out."""

from __future__ import annotations

from typing import Any

import torch


@torch.no_grad()
def draw(module: Any, seed: str) -> Any:
    """Random weights of unit gain in place of the class's own, and norms and biases a little off ones and zeros."""
    generator = torch.Generator().manual_seed(int.from_bytes(seed.encode()[-7:], "big"))
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
            if name.endswith("SelfAttention.q.weight"):  # T5 does not scale its scores
                parameter.mul_((parameter.shape[1] // 4) ** -0.5)
            if name.endswith("scale_shift_table") and parameter.shape[-2] == 6:
                parameter[..., [2, 5], :] += 1.0  # the gates of attention and feed-forward
        else:
            parameter.normal_(std=0.05, generator=generator)
            if name.endswith("weight"):
                parameter.add_(1.0)
    return module
