"""LoRAs, added into a checkpoint's weights before anything else sees them.

A weight is fused when it is read, in float32, one tensor at a time: W + scale * alpha / rank * up @ down. Graphs, names
and shapes stay as they are without a LoRA. How a file names what it changes is :mod:`tgate_export.lora_files`' matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_export.checkpoints.base import Checkpoint, Stored, Tensors
from tgate_export.lora_files import Change, LoraFile, Takes, read_lora
from tgate_export.settings import Lora

__all__ = ["FusedCheckpoint", "Lora", "fuse_loras"]

_KINDS_OF_LAYER = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def fuse_loras(
    checkpoint: Checkpoint,
    loras: Sequence[Lora],
    build: Callable[[Checkpoint, str], nn.Module],
    *,
    components: Iterable[str],
) -> Checkpoint:
    """``checkpoint`` with all of ``loras`` added to its weights, in their order; itself where there are none.

    ``build`` makes a component's module from a checkpoint's configuration: a family's own method. ``components``:
    those that will be read; what a LoRA changes in others is left out. Raises :class:`ExportError` for a file that is
    missing, damaged, no LoRA, for another architecture, or changes none of ``components``.
    """
    return FusedCheckpoint(checkpoint, loras, build, components=components) if loras else checkpoint


class FusedCheckpoint(Checkpoint):
    """A checkpoint whose weights include LoRAs.

    ``fused``: the components that they change. ``loras``: which, in their order.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        loras: Sequence[Lora],
        build: Callable[[Checkpoint, str], nn.Module],
        *,
        components: Iterable[str],
    ) -> None:
        """As :func:`fuse_loras`."""
        self._checkpoint = checkpoint
        self.where = checkpoint.where
        self.model_index: Mapping[str, Any] = checkpoint.model_index
        self.loras = tuple(loras)
        names = tuple(components)
        index = checkpoint.model_index
        unet = checkpoint.config("unet") if "unet" in index else None
        takes = Takes.of(str(index["_class_name"]), index, unet)
        files = [read_lora(lora.path, takes) for lora in self.loras]
        for file in files:
            if not set(file.components) & set(names):
                raise ExportError(
                    f"LoRA {file.path} changes {', '.join(file.components)} alone, and only {', '.join(names)} will "
                    "be exported; export more --components, or leave it out"
                )
        self.fused = tuple(name for name in names if any(name in file.components for file in files))
        self._added = {name: self._load(name, files, build) for name in self.fused}
        self._tensors: dict[str, Tensors] = {}

    def config(self, component: str) -> Mapping[str, Any]:
        return self._checkpoint.config(component)

    def scheduler_config(self) -> Mapping[str, Any]:
        return self._checkpoint.scheduler_config()

    def tensors(self, component: str) -> Tensors:
        if component not in self.fused:
            return self._checkpoint.tensors(component)
        if component not in self._tensors:
            where = f"{self.where}: {component} with {', '.join(str(lora.path) for lora in self.loras)}"
            self._tensors[component] = _FusedTensors(where, self._checkpoint.tensors(component), self._added[component])
        return self._tensors[component]

    def tokenizer(self, name: str) -> Path:
        return self._checkpoint.tokenizer(name)

    def token_limit(self, name: str) -> int | None:
        return self._checkpoint.token_limit(name)

    def further(self, file: str) -> Mapping[str, Any] | None:
        return self._checkpoint.further(file)

    def directory(self, component: str) -> Path | None:
        """None where LoRAs change the component: what lies there is without them."""
        return None if component in self.fused else self._checkpoint.directory(component)

    def licence(self) -> str:
        """The checkpoint's; a LoRA's file names none."""
        return self._checkpoint.licence()

    def _load(
        self, component: str, files: Sequence[LoraFile], build: Callable[[Checkpoint, str], nn.Module]
    ) -> Mapping[str, Sequence[_Addend]]:
        """What is added to each parameter, in the LoRAs' order."""
        with accelerate.init_empty_weights(include_buffers=False):
            layers = {name: Layer.of(module) for name, module in build(self._checkpoint, component).named_modules()}
        added: dict[str, list[_Addend]] = {}
        for lora, file in zip(self.loras, files, strict=True):
            seen: dict[str, str] = {}
            for change in file.changes:
                if change.component != component:
                    continue
                name = file.layer(change, layers)
                if name in seen:
                    raise ExportError(
                        f"LoRA {file.path} changes {component}.{name} twice, as {seen[name]!r} and {change.name!r}; "
                        "leave one of them out"
                    )
                seen[name] = change.name
                check_fits(file, change, name, layers.get(name))
                factor = lora.scale * file.strength(change, name)
                added.setdefault(f"{name}.weight", []).append(_Addend(factor, change.up, change.down))
                if change.bias is not None:
                    added.setdefault(f"{name}.bias", []).append(_Addend(factor, change.bias))
        return added


@dataclass(frozen=True, eq=False)
class _Addend:
    """``factor`` times a bias [outputs], or times up [outputs, rank, ...] @ down [rank, inputs, ...]."""

    factor: float
    up: Tensor
    down: Tensor | None = None

    @property
    def size(self) -> int:
        return self.up.shape[0] * (1 if self.down is None else self.down[0].numel())

    def add_to(self, values: Tensor) -> None:
        change = self.up.float() if self.down is None else self.up.float().flatten(1) @ self.down.float().flatten(1)
        values += (change * self.factor).reshape(values.shape)


class _FusedTensors:
    """One component's tensors, those that LoRAs change fused when they are read: in float32, whatever the checkpoint's
    dtype, so that nothing of a LoRA is lost before the bundle's own.
    """

    def __init__(self, where: str, wrapped: Tensors, added: Mapping[str, Sequence[_Addend]]) -> None:
        self._where = where
        self._wrapped = wrapped
        self._added = added

    def stored(self) -> Mapping[str, Stored]:
        return self._wrapped.stored()

    def find(self, key: str) -> str:
        return self._wrapped.find(key)

    def read(self, key: str) -> Tensor:
        tensor = self._wrapped.read(key)
        if key not in self._added:
            return tensor
        if not tensor.is_floating_point():
            raise ExportError(
                f"{self._where}: {key!r} is stored as {tensor.dtype}, and a LoRA is added to floating-point numbers "
                "alone; give a checkpoint that is not quantized"
            )
        values = tensor.to(torch.float32, copy=True)
        if not torch.isfinite(values).all():
            raise ExportError(f"{self._where}: {key!r} holds NaN or infinity without a LoRA; download it again")
        for addend in self._added[key]:
            if addend.size != values.numel():
                raise ExportError(
                    f"{self._where}: {key!r} has shape {list(values.shape)}, which is not the model's; the "
                    "checkpoint is of another architecture than its config.json says"
                )
            addend.add_to(values)
        if not torch.isfinite(values).all():
            raise ExportError(f"{self._where}: {key!r} does not fit into float32; choose a smaller LoRA scale")
        return values

    def close(self) -> None:
        self._wrapped.close()


@dataclass(frozen=True, kw_only=True)
class Layer:
    """What a LoRA has to fit. ``kind``: what it is, for people. ``weight``: [outputs, inputs, kernel ...] of a layer
    that a LoRA can change; empty for others. ``bias``: its shape, if it has one."""

    kind: str
    weight: tuple[int, ...] = ()
    bias: tuple[int, ...] | None = None

    @staticmethod
    def of(module: nn.Module) -> Layer:
        """That of a module."""
        kind = type(module).__name__
        if not isinstance(module, _KINDS_OF_LAYER) or getattr(module, "groups", 1) != 1:
            return Layer(kind=kind)
        bias = None if module.bias is None else tuple(module.bias.shape)
        return Layer(kind=kind, weight=tuple(module.weight.shape), bias=bias)


def check_fits(file: LoraFile, change: Change, name: str, layer: Layer | None) -> None:
    """Raises :class:`ExportError` where a change does not belong to a model's layer."""
    where = f"LoRA {file.path} is for another architecture: it changes {change.component}.{name}"
    if layer is None or not layer.weight:
        has = "which this model has not" if layer is None else f"which is a {layer.kind} in this model"
        raise ExportError(f"{where}, {has}; give a LoRA of this model")
    outputs, inputs, *kernel = layer.weight
    for what, got, expected in (
        ("inputs", change.down.shape[1], inputs),
        ("outputs", change.up.shape[0], outputs),
        ("elements of kernel", change.down[0, 0].numel(), math.prod(kernel)),
        ("elements of kernel upwards", change.up[0, 0].numel(), 1),
    ):
        if got != expected:
            raise ExportError(f"{where} with {got} {what}, and this model's has {expected}; give a LoRA of this model")
    if change.bias is not None and (layer.bias is None or tuple(change.bias.shape) != layer.bias):
        had = "none" if layer.bias is None else list(layer.bias)
        raise ExportError(
            f"{where} with a bias {list(change.bias.shape)}, and this model's is {had}; give a LoRA of this model"
        )
