"""Small checkpoints as they are written today, and copies of them to be changed into what others wrote."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.tiny_families import make_tiny
from tests.tiny_models import make_tiny_sdxl
from tgate_engine.errors import ExportError
from tgate_export.checkpoints.directory import DirectoryCheckpoint
from tgate_export.families import find_model
from tgate_export.job import ExportSettings, Job, prepare
from tgate_export.modules import real_module

SD, PIXART, SDXL = "sd21_v", "pixart_alpha_1024", "sdxl"
MODELS = {SD: "sd21", PIXART: "pixart-alpha", SDXL: "sdxl"}
DIFFUSERS, TRANSFORMERS = "diffusion_pytorch_model", "model"
"""What the files of weights are called, by the library that wrote them."""

Copy = Callable[[str], Path]
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Copy:
    """Small checkpoints as they are written today. Read only."""

    @functools.cache
    def make(variant: str) -> Path:
        target = tmp_path_factory.mktemp(variant) / "checkpoint"
        return make_tiny_sdxl(target, "conv_projection") if variant == SDXL else make_tiny(target, variant)

    return make


@pytest.fixture
def copy(whole: Copy, tmp_path: Path) -> Copy:
    """The same, to be changed."""

    def make(variant: str) -> Path:
        target = tmp_path / variant
        shutil.copytree(whole(variant), target)
        return target

    return make


def rewrite(folder: Path, change: Callable[[Tensors], Tensors], stem: str = DIFFUSERS) -> None:
    """Write a component's one file of weights again, as old versions did: without metadata."""
    path = folder / f"{stem}.safetensors"
    tensors = change(load_file(path))
    path.unlink()
    save_file({name: value.contiguous() for name, value in tensors.items()}, path)


def change_json(path: Path, **changes: Any) -> None:
    """Set entries of a JSON file; None as a value is null, ``...`` leaves the entry out."""
    content = json.loads(path.read_text("utf-8")) | changes
    kept = {key: value for key, value in content.items() if value is not ...}
    path.write_text(json.dumps(kept, indent=2), "utf-8")


def read(directory: Path, variant: str, component: str, **options: Any) -> Tensors:
    """A component's weights and buffers as the exporter reads them."""
    checkpoint = DirectoryCheckpoint(directory, **options)
    return dict(real_module(find_model(MODELS[variant]).family, checkpoint, component).state_dict())


def same(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    assert got.keys() == want.keys()
    assert [name for name in want if not torch.equal(got[name], want[name])] == []


def job(directory: Path, variant: str, **more: Any) -> Job:
    return prepare(ExportSettings(model=MODELS[variant], checkpoint=str(directory), **more))


def refused(directory: Path, variant: str, **options: Any) -> str:
    """The one line of a checkpoint that is refused before any work starts."""
    with pytest.raises(ExportError) as caught:
        job(directory, variant, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
