"""What is done to final latents, against NumPy."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tgate_export.families.base import Scaling
from tgate_export.modules import Decoder


class Nothing(nn.Module):
    """An autoencoder that gives its latents back."""

    def decode(self, latents: Tensor, return_dict: bool, **further: Any) -> tuple[Tensor]:
        assert not return_dict
        return (latents,)


@pytest.mark.parametrize("scaling", [Scaling(scale=0.5), Scaling(scale=2.0, mean=(0.1, 0.2, 0.3), std=(1.5, 0.5, 2.0))])
def test_latents_are_scaled_as_the_pipeline_scales_them(scaling: Scaling) -> None:
    latents = torch.linspace(-1.2, 1.2, 3 * 4 * 2).reshape(1, 3, 4, 2)
    pictures, decoded = Decoder(Nothing(), scaling, torch.float32)(latents)
    std, mean = (np.resize(np.array(row, np.float32), 3)[None, :, None, None] for row in (scaling.std, scaling.mean))
    expected = latents.numpy() * std / scaling.scale + mean
    assert np.allclose(decoded.numpy(), expected, atol=1e-6)
    pixels = np.round(np.clip(decoded.numpy() / 2 + 0.5, 0, 1) * 255).astype(np.uint8)
    assert pictures.dtype == torch.uint8
    assert np.array_equal(pictures.numpy(), pixels.transpose(0, 2, 3, 1))


@pytest.mark.parametrize("axis", [1, 2])
def test_frames_become_pictures_of_one_video(axis: int) -> None:
    video = torch.rand(1, 5, 3, 4, 2)  # [1, F, C, h, w]
    pictures, decoded = Decoder(Nothing(), Scaling(scale=1.0), torch.float32, axis)(video.movedim(1, axis))
    assert pictures.shape == (1, 5, 4, 2, 3)
    assert torch.equal(decoded, video[0])
