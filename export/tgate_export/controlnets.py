"""ControlNets beside a model's checkpoint: each in a directory of its own, read as a component of the model.

Two nets of one architecture are two components. What they must have in common with the denoiser is looked at in a call
without weights, before any work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from tgate_engine.errors import ExportError
from tgate_export.checkpoints.base import Checkpoint, Tensors
from tgate_export.checkpoints.directory import TensorFiles, locate
from tgate_export.checkpoints.files import check_inside, present, read_json
from tgate_export.families.base import Family, Size, control_component
from tgate_export.modules import fake_module
from tgate_export.settings import ControlNet

__all__ = ["ControlNet", "ControlledCheckpoint", "residual_shapes", "with_controls"]


def with_controls(checkpoint: Checkpoint, nets: Sequence[ControlNet], *, prefer_half: bool) -> Checkpoint:
    """``checkpoint`` with ControlNets as further components; itself where there are none.

    ``prefer_half``: of a net that has both, read its fp16 file. Raises :class:`ExportError` for what is no directory of
    one ControlNet.
    """
    if not nets:
        return checkpoint
    return ControlledCheckpoint(checkpoint, {n.name: _folder(n, prefer_half) for n in nets}, prefer_half=prefer_half)


def _folder(net: ControlNet, prefer_half: bool) -> Path:
    try:
        folder = locate(net.location, [""], prefer_half=prefer_half)
    except ExportError as error:
        raise ExportError(f"ControlNet {net.name}: {str(error).replace('--checkpoint', '--controlnet')}") from None
    if present(folder / "model_index.json"):
        raise ExportError(
            f"ControlNet {net.name}: {folder} holds a whole pipeline; --controlnet wants the directory of the "
            "ControlNet alone, with its config.json"
        )
    if not present(folder / "config.json"):
        raise ExportError(
            f"ControlNet {net.name}: {folder} has no config.json; --controlnet wants a ControlNet in diffusers layout"
        )
    return folder


class ControlledCheckpoint(Checkpoint):
    """A checkpoint with ControlNets, each a component by :func:`~tgate_export.families.base.control_component`."""

    def __init__(self, checkpoint: Checkpoint, folders: Mapping[str, Path], *, prefer_half: bool) -> None:
        self._checkpoint = checkpoint
        self.where = checkpoint.where
        self.model_index: Mapping[str, Any] = checkpoint.model_index
        self._folders = {control_component(name): folder for name, folder in folders.items()}
        self._prefer_half = prefer_half
        self._configs: dict[str, dict[str, Any]] = {}
        self._tensors: dict[str, TensorFiles] = {}

    def named_class(self, component: str) -> str | None:
        return None if component in self._folders else self._checkpoint.named_class(component)

    def config(self, component: str) -> Mapping[str, Any]:
        if component not in self._folders:
            return self._checkpoint.config(component)
        if component not in self._configs:
            folder = self._folders[component]
            check_inside(folder, folder / "config.json")
            self._configs[component] = read_json(folder / "config.json")
        return self._configs[component]

    def tensors(self, component: str) -> Tensors:
        if component not in self._folders:
            return self._checkpoint.tensors(component)
        if component not in self._tensors:
            self._tensors[component] = TensorFiles.open(self._folders[component], self._prefer_half)
        return self._tensors[component]

    def directory(self, component: str) -> Path | None:
        return self._folders.get(component) or self._checkpoint.directory(component)

    def scheduler_config(self) -> Mapping[str, Any]:
        return self._checkpoint.scheduler_config()

    def tokenizer(self, name: str) -> Path:
        return self._checkpoint.tokenizer(name)

    def token_limit(self, name: str) -> int | None:
        return self._checkpoint.token_limit(name)

    def further(self, file: str) -> Mapping[str, Any] | None:
        return self._checkpoint.further(file)

    def licence(self) -> str:
        """The model's; a ControlNet's card says its own."""
        return self._checkpoint.licence()


def residual_shapes(family: Family, checkpoint: Checkpoint, net: str, size: Size) -> tuple[tuple[int, ...], ...]:
    """The shapes [C, h, w] of what a ControlNet adds to the denoiser's own, seen in one call of both without weights,
    which proves that they fit. Raises :class:`ExportError` where they do not."""
    where, rows = f"{checkpoint.where}: ControlNet {net}", 2
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    control, denoiser = (
        fake_module(mode, family, checkpoint, component, torch.float32)
        for component in (control_component(net), family.denoiser)
    )
    with mode, torch.no_grad():
        conditioning = family.conditioning(checkpoint, size)
        inputs = {c.conditioning.name: torch.zeros(rows, *c.shape) for c in conditioning}
        noised, numbers = torch.zeros(rows, *family.latents(checkpoint, size)), torch.ones(rows)
        picture = torch.zeros(1, 3, size.height, size.width)
        residuals = _called(where, lambda: family.look(control, noised, numbers, inputs, picture))
        _called(where, lambda: family.steered(denoiser, noised, numbers, numbers, inputs, residuals))
    return tuple(tuple(map(int, residual.shape[1:])) for residual in residuals)


def _called(where: str, call: Any) -> Any:
    try:
        return call()
    except ExportError as error:
        raise ExportError(f"{where}: {error}") from None
    except Exception as error:  # PyTorch and diffusers raise many kinds for shapes that do not fit
        message = " ".join(str(error).split())
        raise ExportError(
            f"{where} does not fit the model ({type(error).__name__}: {message:.300}); a ControlNet belongs to one "
            "architecture: give one of this model's"
        ) from None
