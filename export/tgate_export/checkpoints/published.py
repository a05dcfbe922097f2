"""The published configurations of a model, without its weights: to measure and to count, offline."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_export.checkpoints.base import Checkpoint, Stored, Tensors


class PublishedCheckpoint(Checkpoint):
    """What a model's authors published about its structure, carried in ``families/published``.

    Its tensors are random: normal, with a deviation that keeps activations of the order of one, and the same for
    the same component and key. Its vocabulary is not here, so it has no tokenizers.
    """

    def __init__(self, model: str, build: Callable[[Checkpoint, str], nn.Module]) -> None:
        """``build`` makes a component's module from this checkpoint's configuration: a family's own method."""
        self._facts = facts(model)
        self._build = build
        self._tensors: dict[str, _RandomTensors] = {}
        self.where = f"the published configuration of {model}"
        self.model_index: Mapping[str, Any] = self._facts["model_index"]

    def config(self, component: str) -> Mapping[str, Any]:
        try:
            config: Mapping[str, Any] = self._facts["components"][component]
        except KeyError:
            raise ExportError(f"{self.where} has no component {component!r}") from None
        return config

    def scheduler_config(self) -> Mapping[str, Any]:
        return self.config("scheduler")

    def tensors(self, component: str) -> Tensors:
        if component not in self._tensors:
            with accelerate.init_empty_weights(include_buffers=False):
                module = self._build(self, component)
            parameters = module.named_parameters(remove_duplicate=False)
            self._tensors[component] = _RandomTensors(component, {name: tuple(p.shape) for name, p in parameters})
        return self._tensors[component]

    def tokenizer(self, name: str) -> Path:
        raise ExportError(f"{self.where} holds no {name}; export without text: --components denoiser,decoder")

    def token_limit(self, name: str) -> int | None:
        limit = self._facts["components"].get(name, {}).get("model_max_length")
        return None if limit is None else int(limit)

    def further(self, file: str) -> Mapping[str, Any] | None:
        config: Mapping[str, Any] | None = self._facts["components"].get(Path(file).parts[0])
        return config

    def licence(self) -> str:
        return str(self._facts["licence"])


def facts(model: str) -> Mapping[str, Any]:
    """What is carried of a model: ``model_index``, ``licence``, and ``components`` by name."""
    file = resources.files("tgate_export.families") / "published" / f"{model}.json"
    if not file.is_file():
        raise ExportError(f"no published configuration of {model!r} is carried; use --weights checkpoint")
    content: Mapping[str, Any] = json.loads(file.read_text("utf-8"))
    return content


class _RandomTensors:
    """Random values by key, made when they are asked for."""

    def __init__(self, component: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._component = component
        self._shapes = shapes

    def stored(self) -> Mapping[str, Stored]:
        return {key: Stored("F32", shape) for key, shape in self._shapes.items()}

    def find(self, key: str) -> str:
        return key

    def read(self, key: str) -> Tensor:
        return random_tensor(self._component, key, self._shapes[key])

    def close(self) -> None:
        """Nothing is open."""


def random_tensor(component: str, key: str, shape: tuple[int, ...]) -> Tensor:
    """The random values of one tensor, in float32."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{component}.{key}".encode()))
    values = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        return values.mul_(_fan_in(shape) ** -0.5)
    return values.mul_(0.02).add_(1.0 if key.endswith("weight") else 0.0)


def _fan_in(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape[1:]:
        count *= size
    return count
