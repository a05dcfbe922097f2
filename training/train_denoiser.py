"""Trains a denoiser and its text encoders jointly on pool latents: noise prediction, min-SNR-5 weights, EMA."""

from __future__ import annotations

import argparse
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from training.budget import Budget, append_row, save_checkpoint, set_lr
from training.denoisers import Denoiser, PixArtDenoiser, SdxlDenoiser
from training.grammar import Scene, training_caption
from training.models import training_noise
from training.parallel import average_gradients, launch
from training.pool import pool_scene
from training.settings import LATENT_PX, MODELS, PIXART_SETTINGS, SETTINGS, PixArtSettings, Settings

_MIN_SNR = 5.0
_LOG_EVERY = 20
_SAVE_EVERY_S = 150.0
_CLOSE_UP = 8  # side of a close-up, in latents
_LAYOUT_FROM = 500  # timesteps from here on decide where things lie


def loss_weights(alphas_cumprod: torch.Tensor) -> torch.Tensor:
    """min(SNR, 5) / SNR for every timestep [1000] (Hang et al. 2023, section 3.4, epsilon prediction)."""
    snr = alphas_cumprod / (1 - alphas_cumprod)
    return snr.clamp(max=_MIN_SNR) / snr


@torch.no_grad()
def update_ema(average: dict[str, torch.Tensor], model: nn.Module, step: int, decay: float) -> None:
    """Move `average` towards the model's weights in place; the decay itself warms up over the first steps."""
    keep = min(decay, (1 + step) / (10 + step))
    for name, value in model.state_dict().items():
        if value.is_floating_point():
            average[name].lerp_(value, 1 - keep)


def close_up(scene: Scene, rng: random.Random, grid: int) -> tuple[Scene, int, int] | None:
    """A window of 8x8 latents that holds one whole item and no other: (scene of that item, column, row).

    Columns and rows are multiples of `grid` latents, the side of the denoiser's patches.

    None if the drawn item has a neighbour in every window tried. Close-ups cost a quarter of a whole picture
    and are all object; training starts with them.
    """
    item = rng.choice(scene.items)
    for _ in range(4):
        column, row = (
            min(max(round((centre + rng.uniform(-8, 8)) / 8 / grid) * grid - _CLOSE_UP // 2, 0), LATENT_PX - _CLOSE_UP)
            for centre in (item.x_px, item.y_px)
        )
        left, top, side = column * 8, row * 8, _CLOSE_UP * 8
        whole = (
            left <= item.x_px - item.radius_px + 2
            and item.x_px + item.radius_px - 2 <= left + side
            and top <= item.y_px - item.radius_px + 2
            and item.y_px + item.radius_px - 2 <= top + side
        )
        alone = all(
            other is item
            or other.x_px + other.radius_px < left
            or other.x_px - other.radius_px > left + side
            or other.y_px + other.radius_px < top
            or other.y_px - other.radius_px > top + side
            for other in scene.items
        )
        if whole and alone:
            return replace(scene, items=(item,), layout="centre"), column, row
    return None


def draw_index(scenes: list[Scene], rng: random.Random, crowded: float) -> int:
    """Any scene, or with probability `crowded` one of several items."""
    several = rng.random() < crowded
    while True:
        index = rng.randrange(len(scenes))
        if not several or len(scenes[index].items) > 1:
            return index


def draw_batch(
    latents: torch.Tensor,
    scenes: list[Scene],
    rng: random.Random,
    count: int,
    *,
    close_ups: bool,
    grid: int,
    crowded: float,
) -> tuple[torch.Tensor, list[Scene], torch.Tensor | None]:
    """Clean latents, float [count, 4, 16, 16] or close-ups [3 * count, 4, 8, 8]; their scenes; close-ups' corners."""
    if not close_ups:
        chosen = [draw_index(scenes, rng, crowded) for _ in range(count)]
        return latents[chosen].float(), [scenes[index] for index in chosen], None
    windows: list[torch.Tensor] = []
    shown: list[Scene] = []
    corners: list[tuple[int, int]] = []
    while len(windows) < 3 * count:
        index = rng.randrange(len(scenes))
        found = close_up(scenes[index], rng, grid)
        if found is not None:
            scene, column, row = found
            windows.append(latents[index, :, row : row + _CLOSE_UP, column : column + _CLOSE_UP].float())
            shown.append(scene)
            corners.append((column, row))
    return torch.stack(windows), shown, torch.tensor(corners)


def draw_timesteps(count: int, layout_share: float, generator: torch.Generator) -> torch.Tensor:
    """int64 [count] of 0 to 999; with probability `layout_share` of 500 to 999."""
    anywhere = torch.randint(0, 1000, (count,), generator=generator)
    late = torch.randint(_LAYOUT_FROM, 1000, (count,), generator=generator)
    return torch.where(torch.rand(count, generator=generator) < layout_share, late, anywhere)


def captions_for(scenes: list[Scene], rng: random.Random, dropout: float) -> list[str]:
    """A fresh wording of each scene, or the empty caption with probability `dropout`."""
    return ["" if rng.random() < dropout else training_caption(scene, rng) for scene in scenes]


def build(model: str, **changes: Any) -> tuple[Denoiser, Settings | PixArtSettings]:
    """The denoiser named `model` with fresh weights from its seed, and its settings with `changes`."""
    if model == "mini-sdxl":
        torch.manual_seed(SETTINGS.seed)
        settings = replace(SETTINGS, **changes)
        return SdxlDenoiser(settings), settings
    torch.manual_seed(PIXART_SETTINGS.seed)
    pixart_settings = replace(PIXART_SETTINGS, **changes)
    return PixArtDenoiser(pixart_settings), pixart_settings


_SHIPPED = {
    "mini-sdxl": {
        "unet": "unet/diffusion_pytorch_model.safetensors",
        "text_1": "text_encoder/model.safetensors",
        "text_2": "text_encoder_2/model.safetensors",
    },
    "mini-pixart": {
        "transformer": "transformer/diffusion_pytorch_model.safetensors",
        "text": "text_encoder/model.safetensors",
    },
}


def shipped_weights(name: str, folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a pipeline directory under the names of the denoiser's parts, to go on from."""
    return {
        f"{part}.{key}": value.float()
        for part, file in _SHIPPED[name].items()
        for key, value in load_file(folder / file).items()
    }


def train(
    rank: int,
    name: str,
    work: Path,
    seconds: float,
    start_from: Path | None,
    compiled: bool,
    changes: dict[str, Any],
) -> None:
    """Train `name` as worker `rank` for `seconds` in all; resumes its checkpoint, which worker 0 writes.

    Without a checkpoint it goes on from the pipeline directory `start_from`, without close-ups, or begins with the
    warm text encoder. `changes` are settings by name; `compiled` hands the denoiser to torch.compile.
    """
    denoiser, settings = build(name, **changes)
    grid = settings.patch if isinstance(settings, PixArtSettings) else 1
    model = denoiser.parts
    first = load_file(work / f"{name}-text.safetensors") if start_from is None else shipped_weights(name, start_from)
    model.load_state_dict(first, strict=False)
    if compiled:
        model["unet" if name == "mini-sdxl" else "transformer"].compile()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.lr, betas=(0.9, 0.99), weight_decay=settings.weight_decay, fused=True
    )
    average = {name: value.clone() for name, value in model.state_dict().items()}
    checkpoint, step, spent = work / f"{name}.ckpt", 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average, step, spent = state["ema"], state["step"], state["spent_s"]

    latents = load_file(work / "pool.safetensors")["latents"]
    scenes = [pool_scene(index, SETTINGS.seed) for index in range(len(latents))]
    noise_levels = training_noise()
    weights = loss_weights(noise_levels.alphas_cumprod)
    batch = settings.batch // settings.workers
    rng = random.Random(f"denoiser-{settings.seed}-{step}-{rank}")
    generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + step * settings.workers + rank)
    budget = Budget(seconds=seconds, peak_lr=settings.lr, warmup_steps=settings.warmup_steps, spent_s=spent)
    spent = saved = budget.spent_s
    running: list[tuple[float, float]] = []
    while spent < seconds:
        close_ups = start_from is None and spent < settings.close_up_share * seconds
        clean, shown, corners = draw_batch(
            latents, scenes, rng, batch, close_ups=close_ups, grid=grid, crowded=settings.crowded_share
        )
        noise = torch.randn(clean.shape, generator=generator)
        steps_t = draw_timesteps(len(clean), settings.layout_share, generator)
        noisy = noise_levels.add_noise(clean, noise, steps_t)
        captions = captions_for(shown, rng, settings.caption_dropout)
        errors, beside = denoiser.errors(noisy, noise, steps_t, captions, shown, corners)
        loss = (errors * weights[steps_t] + beside).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()

        spent = average_gradients(parameters, budget.spent_s)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        set_lr(optimizer, budget.lr(step, spent))
        optimizer.step()
        step += 1
        update_ema(average, model, step, settings.ema_decay)
        running.append((loss.item(), errors.mean().item()))
        if rank == 0 and len(running) == _LOG_EVERY:
            weighted, plain = (sum(column) / len(running) for column in zip(*running, strict=True))
            row = {"step": step, "spent_s": round(spent, 1), "close_ups": int(close_ups)} | {
                "weighted_mse": round(weighted, 5),
                "mse": round(plain, 5),
            }
            append_row(work / f"{name}.csv", row)
            running = []
        if rank == 0 and (spent - saved > _SAVE_EVERY_S or spent >= seconds):
            saved = spent
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "ema": average}
            save_checkpoint(checkpoint, {**state, "step": step, "spent_s": spent})
            save_file({k: v.contiguous() for k, v in average.items()}, work / f"{name}-ema.safetensors")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=MODELS, default="mini-sdxl")
    parser.add_argument("--work", type=Path, default=Path(".cache/training"), help="folder of the checkpoints")
    parser.add_argument("--seconds", type=float, default=4200.0, help="wall-clock budget of all runs together")
    parser.add_argument("--start-from", type=Path, metavar="DIR", help="pipeline directory whose weights to go on from")
    parser.add_argument("--compile", action="store_true", help="torch.compile: minutes first, a fifth faster after")
    for name, kind in (("workers", int), ("batch", int), ("lr", float), ("crowded_share", float)):
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help="in place of the settings'")
    arguments = parser.parse_args()
    names = ("workers", "batch", "lr", "crowded_share")
    changes = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    launch(
        train,
        changes.get("workers", SETTINGS.workers),
        arguments.model,
        arguments.work,
        arguments.seconds,
        arguments.start_from,
        arguments.compile,
        changes,
    )


if __name__ == "__main__":
    main()
