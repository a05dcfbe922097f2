"""Trains the autoencoder on renders: 64-pixel crops for most of the budget, whole pictures for the rest."""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import save_file
from torch.nn import functional

from training.budget import Budget, append_row, save_checkpoint, set_lr
from training.grammar import draw_scene
from training.models import build_vae
from training.parallel import average_gradients, launch
from training.render import render
from training.settings import IMAGE_PX, LATENT_CHANNELS, SETTINGS, Settings

_CROP_PX = 64
_CROP_SHARE = 0.6


def to_model(images: np.ndarray) -> torch.Tensor:
    """uint8 [B, H, W, 3] to float32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def to_pixels(images: torch.Tensor) -> np.ndarray:
    """float [B, 3, H, W] in [-1, 1] to uint8 [B, H, W, 3]."""
    scaled = images.detach().float().clamp(-1, 1).add(1).mul(127.5).round()
    return np.asarray(scaled.permute(0, 2, 3, 1).to(torch.uint8).cpu().numpy())


def _batch(rng: random.Random, count: int, side_px: int) -> torch.Tensor:
    """Windows [count, 3, side_px, side_px] of new renders, each near a random shape of its scene."""
    pictures = []
    for _ in range(count):
        scene = draw_scene(rng)
        item = rng.choice(scene.items)
        x, y = (
            min(max(round(centre + rng.uniform(-30, 30)) - side_px // 2, 0), IMAGE_PX - side_px)
            for centre in (item.x_px, item.y_px)
        )
        pictures.append(render(scene)[y : y + side_px, x : x + side_px])
    return to_model(np.stack(pictures))


@torch.no_grad()
def start_transparent(vae: AutoencoderKL) -> None:
    """Bias the fresh weights so that coarse colour passes straight through; detail remains to be learned.

    Damped residual branches, identity added to every other convolution, averaging downsamplers, and little
    posterior noise. A budget of minutes is too short to find this from the usual initialisation.
    """
    for name, module in vae.named_modules():
        if not isinstance(module, torch.nn.Conv2d):
            continue
        if name.endswith(("conv1", "conv2")):
            module.weight *= 1.0 if name.endswith("conv1") else 0.2
            continue
        kept = range(min(module.weight.shape[:2]))
        module.weight *= 0.3
        if "downsamplers" in name:
            module.weight[kept, kept, :2, :2] += 0.25
        else:
            centre = module.kernel_size[0] // 2
            module.weight[kept, kept, centre, centre] += 1.0
    vae.quant_conv.bias[LATENT_CHANNELS:] = -5.0


def vae_loss(vae: AutoencoderKL, images: torch.Tensor, settings: Settings) -> tuple[torch.Tensor, torch.Tensor]:
    """(total, mean absolute error) of one reparameterised pass; errors are on the [-1, 1] scale."""
    posterior = vae.encode(images).latent_dist
    restored = vae.decode(posterior.sample()).sample
    absolute = functional.l1_loss(restored, images)
    error = restored - images
    edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
    coarse = functional.avg_pool2d(error, 8).abs().mean()
    total = (
        absolute
        + error.square().mean()
        + coarse
        + settings.vae_edge_weight * edges
        + settings.vae_kl_weight * posterior.kl().mean()
    )
    return total, absolute


@torch.no_grad()
def _preview(vae: AutoencoderKL, path: Path) -> None:
    rng = random.Random("preview")
    pictures = np.stack([render(draw_scene(rng)) for _ in range(8)])
    restored = to_pixels(vae.decode(vae.encode(to_model(pictures)).latent_dist.mode()).sample)
    rows = [np.concatenate(list(row), axis=1) for row in (pictures, restored)]
    Image.fromarray(np.concatenate(rows, axis=0)).save(path)


@torch.no_grad()
def latent_scale(vae: AutoencoderKL, count: int = 128) -> float:
    """The factor that gives the latents of `count` renders a standard deviation of one."""
    rng = random.Random("scale")
    latents = [vae.encode(_batch(rng, 16, IMAGE_PX)).latent_dist.sample() for _ in range(count // 16)]
    return float(1.0 / torch.cat(latents).std())


def fit(
    rank: int,
    work: Path,
    name: str,
    vae: AutoencoderKL,
    loss_of: Callable[[random.Random, float], tuple[torch.Tensor, dict[str, float]]],
    *,
    seconds: float,
    lr: float,
    settings: Settings,
) -> None:
    """Train what of ``vae`` takes gradients, as worker `rank` for `seconds` in all; resumes <name>.ckpt.

    ``loss_of``: from a random source and the share of the seconds that is spent, the loss of a new batch and what the
    log says of it.
    """
    parameters = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.99), weight_decay=1e-4)
    checkpoint, step, spent = work / f"{name}.ckpt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        vae.load_state_dict(state["vae"])
        optimizer.load_state_dict(state["optimizer"])
        step, spent = state["step"], state["spent_s"]
    budget = Budget(seconds=seconds, peak_lr=lr, warmup_steps=50, spent_s=spent)
    rng = random.Random(f"{name}-{settings.seed}-{step}-{rank}")
    torch.manual_seed(settings.seed * 1_000_003 + step * settings.workers + rank)
    spent = budget.spent_s
    while spent < seconds:
        loss, told = loss_of(rng, spent / seconds)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        spent = average_gradients(parameters, budget.spent_s)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        set_lr(optimizer, budget.lr(step, spent))
        optimizer.step()
        step += 1
        if rank == 0 and step % 25 == 0:
            append_row(work / f"{name}.csv", {"step": step, "spent_s": round(spent, 1), "loss": loss.item(), **told})
        if rank == 0 and (step % 200 == 0 or spent >= seconds):
            _preview(vae, work / f"{name}.png")
            state = {"vae": vae.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(checkpoint, {**state, "step": step, "spent_s": spent})


def save_vae(vae: AutoencoderKL, scale: float, work: Path) -> None:
    """Write vae.safetensors, and vae.scale, the factor that gives its latents a standard deviation of one."""
    save_file({key: value.contiguous() for key, value in vae.state_dict().items()}, work / "vae.safetensors")
    (work / "vae.scale").write_text(f"{scale:.6f}\n")


def train(rank: int, work: Path, seconds: float, settings: Settings) -> None:
    """Train as worker `rank` for `seconds` in all; resumes vae.ckpt. Worker 0 leaves vae.safetensors and vae.scale."""
    torch.manual_seed(settings.seed)
    vae = build_vae(settings)
    start_transparent(vae)
    crops = settings.vae_batch // settings.workers

    def loss_of(rng: random.Random, share: float) -> tuple[torch.Tensor, dict[str, float]]:
        crop = share < _CROP_SHARE
        images = _batch(rng, crops if crop else max(1, crops // 4), _CROP_PX if crop else IMAGE_PX)
        loss, absolute = vae_loss(vae, images, settings)
        return loss, {"l1": absolute.item()}

    fit(rank, work, "vae", vae, loss_of, seconds=seconds, lr=settings.vae_lr, settings=settings)
    if rank == 0:
        save_vae(vae, latent_scale(vae), work)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path(".cache/training"), help="folder of the checkpoints")
    parser.add_argument("--seconds", type=float, default=600.0, help="wall-clock budget of all runs together")
    arguments = parser.parse_args()
    arguments.work.mkdir(parents=True, exist_ok=True)
    launch(train, SETTINGS.workers, arguments.work, arguments.seconds, SETTINGS)


if __name__ == "__main__":
    main()
