"""Goes on with the decoder of the autoencoder alone: latents, and so the denoisers of both models, stay what they are.

    python -m training.train_decoder --work .cache/training --seconds 1300

It begins with the autoencoder of the folder, or with the embedded one where there is none, and leaves a whole one. It
takes whole pictures, since the decoder attends to all of one; errors count for more inside of items, and most inside of
small ones, whose corners are a few pixels.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from training.grammar import Scene, draw_scene
from training.parallel import launch
from training.pool import load_vae
from training.render import render
from training.settings import IMAGE_PX, SETTINGS, Settings
from training.train_vae import fit, save_vae, to_model

_LARGEST_PX = 28.5
_BATCH = 4  # of a worker
_LATENT_NOISE = 0.03  # of their deviation: what a denoiser leaves is no encoder's latent
_LR = 1.5e-3


def weights_of(scenes: Sequence[Scene]) -> torch.Tensor:
    """How much the error of a pixel counts, float32 [B, 1, 128, 128]: 1 beside items, and the more inside of one the
    smaller it is."""
    rows, columns = np.mgrid[:IMAGE_PX, :IMAGE_PX]
    maps = np.ones((len(scenes), 1, IMAGE_PX, IMAGE_PX), np.float32)
    for picture, scene in zip(maps[:, 0], scenes, strict=True):
        for item in scene.items:
            inside = (columns - item.x_px) ** 2 + (rows - item.y_px) ** 2 <= (item.radius_px + 2) ** 2
            picture[inside] += 3 * (_LARGEST_PX / item.radius_px) ** 2
    return torch.from_numpy(maps)


def decoder_loss(
    restored: torch.Tensor, images: torch.Tensor, weights: torch.Tensor, settings: Settings
) -> torch.Tensor:
    """Of pictures [B, 3, H, W] in [-1, 1]: their errors, and those of their edges, by ``weights`` [B, 1, H, W]."""
    error = restored - images
    edges = [error.diff(dim=axis).abs() * weights.narrow(axis, 1, IMAGE_PX - 1) for axis in (-1, -2)]
    plain = (error.abs() + error.square()) * weights
    return (plain.mean() + settings.vae_edge_weight * sum(each.mean() for each in edges)) / weights.mean()


def train(rank: int, work: Path, seconds: float, settings: Settings) -> None:
    """Train as worker `rank` for `seconds` in all; resumes decoder.ckpt. Worker 0 leaves vae.safetensors, vae.scale."""
    vae = load_vae(work, settings)
    for part in (vae.decoder, vae.post_quant_conv):
        part.requires_grad_()

    def loss_of(rng: random.Random, _share: float) -> tuple[torch.Tensor, dict[str, float]]:
        scenes = [draw_scene(rng) for _ in range(_BATCH)]
        images = to_model(np.stack([render(scene) for scene in scenes]))
        with torch.no_grad():
            latents = vae.encode(images).latent_dist.mode()
            latents += torch.randn_like(latents) * _LATENT_NOISE / vae.config.scaling_factor
        return decoder_loss(vae.decode(latents).sample, images, weights_of(scenes), settings), {}

    fit(rank, work, "decoder", vae, loss_of, seconds=seconds, lr=_LR, settings=settings)
    if rank == 0:
        save_vae(vae, vae.config.scaling_factor, work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".cache/training"), help="folder of the checkpoints")
    parser.add_argument("--seconds", type=float, default=1300.0, help="wall-clock budget of all runs together")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    launch(train, SETTINGS.workers, arguments.work, arguments.seconds, SETTINGS)


if __name__ == "__main__":
    main()
