"""Bundles that several test files share, each exported once for a whole run, by whichever process asks first."""

from __future__ import annotations

import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import filelock
import pytest
import torch

from tests.tiny_families import FAMILY_VARIANTS, make_tiny
from tests.tiny_ip_adapter import FILE, save_ip_adapter
from tests.tiny_models import make_tiny_sdxl, tiny_model
from tgate_engine.bundle import DEFAULT
from tgate_engine.report import Silent
from tgate_export.build import ExportSettings, export
from tgate_export.methods import find_method
from tgate_export.plans import add_plan
from tgate_runtime.mini import MINI, MODELS, assemble

collect_ignore = ["cuda_stub"]  # has an environment of its own: make cuda-stub

# Small networks on two cores: threads of eager PyTorch would only wait for one another.
torch.set_num_threads(1)


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A directory that ``make`` fills, given it: once for all processes that run tests at the same time."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared" / name
    folder.parent.mkdir(exist_ok=True)
    done = folder.with_suffix(".done")
    with filelock.FileLock(folder.with_suffix(".lock")):
        if not done.is_file():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


@pytest.fixture(scope="session")
def mini_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with every graph there is (``--fidelity-interval 2``), its plans those of ``tgate-export
    --model mini-sdxl --m 10 --k 5 --batch 1``: a batch that may vary takes three times as long to trace, and is what
    :func:`shipped_bundle` has. Read only."""

    def make(folder: Path) -> None:
        bundle = folder / "bundle"
        settings = ExportSettings(model="mini-sdxl", m=10, k=5, fidelity_interval=2, batches=[(1, 1)], output=bundle)
        add_plan(export(settings, Silent()), name=DEFAULT, m=10, k=5, force=True)

    return once(tmp_path_factory, "mini", make) / "bundle"


@pytest.fixture(scope="session")
def shipped_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle that ships: a real network, which nothing has to trace, for one to four images. Read only."""

    def make(folder: Path) -> None:
        (folder / "bundle").mkdir()
        assemble(MODELS / MINI, folder / "bundle")

    return once(tmp_path_factory, "shipped", make) / "bundle"


@pytest.fixture(scope="session")
def family_bundle(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., tuple[Path, Path]]:
    """(checkpoint, bundle with every graph of a method) of the small models of every family, by variant. Read only."""

    def get(variant: str, *, method: str = "tgate") -> tuple[Path, Path]:
        def write(folder: Path) -> None:
            make_tiny(folder / "checkpoint", variant)

        def make(folder: Path) -> None:
            export(family_settings(variant, checkpoint, folder / "bundle", method=method), Silent())

        checkpoint = once(tmp_path_factory, f"family-{variant}", write) / "checkpoint"
        return checkpoint, once(tmp_path_factory, f"family-{variant}-{method}", make) / "bundle"

    return functools.cache(get)


def family_settings(variant: str, checkpoint: Path, output: Path, **more: Any) -> ExportSettings:
    """How a small model of ``tests/tiny_families.py`` is exported, at its own size, with every graph of its method."""
    tiny = FAMILY_VARIANTS[variant]
    height, width = (size * tiny.vae_factor for size in tiny.latents[-2:])
    frames = {"svd": tiny.latents[0], "opensora": tiny.latents[1]}.get(tiny.model)
    return ExportSettings(
        model=tiny.model,
        checkpoint=str(checkpoint),
        fidelity_interval=every_graph(more.get("method", "tgate")),
        height=height,
        width=width,
        frames=frames,
        output=output,
        **more,
    )


def every_graph(method: str) -> int | None:
    """The fidelity interval of an export with every graph that a method has."""
    return 2 if "f" in find_method(method).takes else None


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directories of the small random-weight SDXL checkpoints, by variant. Read only."""

    def get(variant: str) -> Path:
        def make(folder: Path) -> None:
            make_tiny_sdxl(folder / "checkpoint", variant)

        return once(tmp_path_factory, f"sdxl-{variant}", make) / "checkpoint"

    return functools.cache(get)


@pytest.fixture(scope="session")
def ip_adapter_bundle(
    tmp_path_factory: pytest.TempPathFactory,
    family_bundle: Callable[..., tuple[Path, Path]],
    tiny_checkpoint: Callable[[str], Path],
) -> Callable[[str, bool], tuple[Path, Path, Path]]:
    """(checkpoint, an IP-Adapter's file, bundle with every graph) by family, "sd" or "sdxl", and whether the adapter is
    a Plus one. Read only."""

    def get(family: str, plus: bool) -> tuple[Path, Path, Path]:
        checkpoint = family_bundle("sd15_a")[0] if family == "sd" else tiny_checkpoint("conv_projection")

        def make(folder: Path) -> None:
            adapter = save_ip_adapter(checkpoint, folder / "adapter", plus=plus, side=224 if plus else 32)
            of_all: dict[str, Any] = {"ip_adapter": adapter, "batches": [(1, 1)]}
            if family == "sd":
                export(family_settings("sd15_a", checkpoint, folder / "bundle", **of_all), Silent())
                return
            own: dict[str, Any] = {"model": "sdxl", "checkpoint": str(checkpoint), "fidelity_interval": 2, **of_all}
            export(ExportSettings(**own, output=folder / "bundle"), Silent())

        folder = once(tmp_path_factory, f"ip-adapter-{family}-{'plus' if plus else 'plain'}", make)
        return checkpoint, folder / "adapter" / FILE, folder / "bundle"

    return functools.cache(get)


@pytest.fixture(scope="session")
def tiny_bundle(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Callable[[str], Path]
) -> Callable[..., Path]:
    """Bundles of those checkpoints, with every graph of a method (``--fidelity-interval 2``). Read only.

    ``sizes``: (width, height) of each, the default first, with the graphs of f = 1 alone; None is the variant's own.
    """

    def get(
        variant: str,
        *,
        guidance_scale: float = 5.0,
        batch: tuple[int, int] = (1, 1),
        method: str = "tgate",
        sizes: tuple[tuple[int, int], ...] | None = None,
    ) -> Path:
        model = tiny_model(variant)
        height, width = (size * model.vae_factor for size in model.latent_size)
        pairs = ((width, height),) if sizes is None else sizes

        def make(folder: Path) -> None:
            settings = ExportSettings(
                model="sdxl",
                checkpoint=str(tiny_checkpoint(variant)),
                method=method,
                fidelity_interval=every_graph(method) if sizes is None else None,
                guidance_scale=guidance_scale,
                sizes=pairs,
                batches=[batch],
                output=folder / "bundle",
            )
            export(settings, Silent())

        words = [variant, f"{guidance_scale:g}", *map(str, batch), method, *(f"{w}x{h}" for w, h in pairs)]
        return once(tmp_path_factory, f"sdxl-{'-'.join(words)}".replace(".", "_"), make) / "bundle"

    return functools.cache(get)
