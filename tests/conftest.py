"""Bundles that several test files share, each exported once for a whole run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny_families import FAMILY_VARIANTS, make_tiny
from tests.tiny_models import make_tiny_sdxl, tiny_model
from tgate_engine.report import Silent
from tgate_export.build import ExportSettings, export

# Small networks on two cores: threads of eager PyTorch would only wait for one another.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def mini_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, exported as ``tgate-export --model mini-sdxl --m 10 --k 5`` does. Read only."""
    target = tmp_path_factory.mktemp("mini") / "bundle"
    return export(ExportSettings(model="mini-sdxl", m=10, k=5, output=target), Silent())


@pytest.fixture(scope="session")
def mini_full_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with every graph there is (``--fidelity-interval 2``). Read only."""
    target = tmp_path_factory.mktemp("mini-full") / "bundle"
    return export(ExportSettings(model="mini-sdxl", fidelity_interval=2, output=target), Silent())


@pytest.fixture(scope="session")
def family_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """(checkpoint, bundle with every graph there is) of the small models of every family, by variant. Read only."""

    @functools.cache
    def make(variant: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp(variant)
        checkpoint = make_tiny(folder / "checkpoint", variant)
        return checkpoint, export(family_settings(variant, checkpoint, folder / "bundle"), Silent())

    return make


def family_settings(variant: str, checkpoint: Path, output: Path, **more: Any) -> ExportSettings:
    """How a small model of ``tests/tiny_families.py`` is exported, at its own size."""
    tiny = FAMILY_VARIANTS[variant]
    height, width = (size * tiny.vae_factor for size in tiny.latents[-2:])
    frames = {"svd": tiny.latents[0], "opensora": tiny.latents[1]}.get(tiny.model)
    return ExportSettings(
        model=tiny.model,
        checkpoint=str(checkpoint),
        fidelity_interval=2,
        height=height,
        width=width,
        frames=frames,
        output=output,
        **more,
    )


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directories of the small random-weight SDXL checkpoints, by variant. Read only."""

    @functools.cache
    def make(variant: str) -> Path:
        return make_tiny_sdxl(tmp_path_factory.mktemp(variant) / "checkpoint", variant)

    return make


@pytest.fixture(scope="session")
def tiny_bundle(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path]
) -> Callable[..., Path]:
    """Bundles of those checkpoints, with every graph there is (``--fidelity-interval 2``). Read only."""

    @functools.cache
    def make(variant: str, *, guidance_scale: float = 5.0, batch: tuple[int, int] = (1, 1)) -> Path:
        model = tiny_model(variant)
        height, width = (size * model.vae_factor for size in model.latent_size)
        settings = ExportSettings(
            model="sdxl",
            checkpoint=str(tiny_checkpoint(variant)),
            fidelity_interval=2,
            guidance_scale=guidance_scale,
            height=height,
            width=width,
            batch=batch,
            output=tmp_path_factory.mktemp(variant) / "bundle",
        )
        return export(settings, Silent())

    return make
