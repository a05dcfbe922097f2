"""A pool of training scenes as latents; the scenes themselves are regenerated from their index."""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from training.grammar import Scene, draw_scene
from training.models import build_vae
from training.parallel import launch
from training.render import render
from training.settings import SETTINGS, Settings
from training.train_vae import to_model

MINI_SDXL = Path(__file__).parents[1] / "tgate_engine/models/mini-sdxl"


def pool_scene(index: int, seed: int) -> Scene:
    """Scene number `index` of the pool."""
    return draw_scene(random.Random(f"pool-{seed}-{index}"))


def load_vae(work: Path, settings: Settings = SETTINGS) -> AutoencoderKL:
    """The autoencoder trained in `work`, its scaling factor set so that latents have unit deviation.

    Where `work` holds none, that of the embedded `mini-sdxl`: every embedded model has the same one.
    """
    if not (work / "vae.safetensors").exists():
        vae = AutoencoderKL.from_pretrained(MINI_SDXL / "vae", torch_dtype=torch.float32)
        return vae.eval().requires_grad_(False)
    vae = build_vae(settings)
    vae.load_state_dict(load_file(work / "vae.safetensors"))
    vae.register_to_config(scaling_factor=float((work / "vae.scale").read_text()))
    return vae.eval().requires_grad_(False)


@torch.no_grad()
def encode_shard(rank: int, work: Path, settings: Settings) -> None:
    """Write pool-<rank>.safetensors: scaled latents, float16 [N / workers, 4, 16, 16], of every workers-th scene."""
    vae = load_vae(work, settings)
    mine = range(rank, settings.pool_scenes, settings.workers)
    parts = []
    for start in range(0, len(mine), 16):
        images = np.stack([render(pool_scene(index, settings.seed)) for index in mine[start : start + 16]])
        parts.append((vae.encode(to_model(images)).latent_dist.mode() * vae.config.scaling_factor).half())
    save_file({"latents": torch.cat(parts).contiguous()}, work / f"pool-{rank}.safetensors")


def encode_pool(work: Path, settings: Settings = SETTINGS) -> torch.Tensor:
    """Encode the pool in all workers and write pool.safetensors; returns its latents, float16 [N, 4, 16, 16]."""
    work.mkdir(parents=True, exist_ok=True)
    launch(encode_shard, settings.workers, work, settings)
    shards = [load_file(work / f"pool-{rank}.safetensors")["latents"] for rank in range(settings.workers)]
    latents = torch.empty(settings.pool_scenes, *shards[0].shape[1:], dtype=shards[0].dtype)
    for rank, shard in enumerate(shards):
        latents[rank :: settings.workers] = shard
    save_file({"latents": latents}, work / "pool.safetensors")
    return latents


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".cache/training"), help="folder of the checkpoints")
    parser.add_argument("--scenes", type=int, default=SETTINGS.pool_scenes)
    arguments = parser.parse_args()
    latents = encode_pool(arguments.work, replace(SETTINGS, pool_scenes=arguments.scenes))
    print(f"{len(latents)} latents, mean {latents.float().mean():.3f}, deviation {latents.float().std():.3f}")


if __name__ == "__main__":
    main()
