"""AlexNet's weights drawn at random, by torchvision's names: as large as they are, for no smaller ones fit."""

from __future__ import annotations

import math

import torch

SHAPES = {0: (64, 3, 11, 11), 3: (192, 64, 5, 5), 6: (384, 192, 3, 3), 8: (256, 384, 3, 3), 10: (256, 256, 3, 3)}
"""Its convolutions, by their place among its features."""


def alexnet(seed: int = 0) -> dict[str, torch.Tensor]:
    """Tensors by name; one of them is of the classifier, at which LPIPS does not look."""
    generator, weights = torch.Generator().manual_seed(seed), dict[str, torch.Tensor]()
    for place, shape in SHAPES.items():
        scale = math.sqrt(2 / math.prod(shape[1:]))
        weights[f"features.{place}.weight"] = torch.randn(shape, generator=generator) * scale
        weights[f"features.{place}.bias"] = torch.randn(shape[0], generator=generator) / 10
    return weights | {"classifier.6.bias": torch.zeros(1000)}
