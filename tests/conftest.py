"""Bundles that several test files share, each exported once for a whole run."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

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
