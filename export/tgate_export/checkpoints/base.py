"""What the exporter asks of a checkpoint, wherever it comes from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from tgate_engine.errors import ExportError
from tgate_export.checkpoints.files import quoted

_LIBRARIES = ("diffusers", "transformers")
_WITHIN = ("kolors",)
"""Pipelines of diffusers whose classes model_index.json names by the pipeline."""


@dataclass(frozen=True)
class Stored:
    """How a tensor is held: its dtype as safetensors writes it ("F32", "BF16", "I8", …), and its shape."""

    dtype: str
    shape: tuple[int, ...]


class Tensors(Protocol):
    """The tensors of one component, read one at a time."""

    def stored(self) -> Mapping[str, Stored]:
        """Every tensor there is, under the name that it has in storage. Reads no values."""
        ...

    def find(self, key: str) -> str:
        """The name in storage of a parameter of today's modules.

        Raises :class:`~tgate_engine.errors.ExportError` where there is none.
        """
        ...

    def read(self, key: str) -> Tensor:
        """The tensor of a parameter's name, on the CPU, in the checkpoint's dtype; the caller owns it.

        Raises :class:`~tgate_engine.errors.ExportError` where there is none.
        """
        ...

    def close(self) -> None:
        """Let go of files."""
        ...


class Holder(Protocol):
    """What holds tensors of components, whatever else it may be. ``where`` names it in messages."""

    where: str

    def tensors(self, component: str) -> Tensors:
        """A component's tensors."""
        ...


class Checkpoint(ABC):
    """A model's configurations and tensors, by component, in diffusers' terms.

    ``where`` names it in messages. Whatever is missing, unreadable or of the wrong kind raises
    :class:`~tgate_engine.errors.ExportError` naming it.
    """

    where: str
    model_index: Mapping[str, Any]

    def named_class(self, component: str) -> str | None:
        """The class that model_index.json names for a component, a tokenizer or the scheduler; None where it names
        none. Raises :class:`~tgate_engine.errors.ExportError` where it says that there is none."""
        entry = self.model_index.get(component)
        if entry is None:
            return None
        if not isinstance(entry, (list, tuple)) or len(entry) != 2 or not all(isinstance(e, str | None) for e in entry):
            raise ExportError(
                f"{self.where}: model_index.json has {component} = {quoted(entry)}; a library and a class are wanted"
            )
        library, name = entry
        if name is None:
            raise ExportError(f"{self.where}: model_index.json says that there is no {component}, which is needed")
        if library not in (*_LIBRARIES, *_WITHIN) or not name.isidentifier():
            raise ExportError(
                f"{self.where}: model_index.json has {component} = {quoted(entry)}, and classes are taken from "
                f"{' and '.join(_LIBRARIES)} alone: code of the checkpoint's own is never run"
            )
        return str(name)

    @abstractmethod
    def config(self, component: str) -> Mapping[str, Any]:
        """A component's config.json."""

    @abstractmethod
    def scheduler_config(self) -> Mapping[str, Any]:
        """The scheduler's configuration."""

    @abstractmethod
    def tensors(self, component: str) -> Tensors:
        """A component's tensors."""

    @abstractmethod
    def tokenizer(self, name: str) -> Path:
        """The directory of a tokenizer's files."""

    @abstractmethod
    def token_limit(self, name: str) -> int | None:
        """Tokens that a tokenizer's own configuration allows; None where it says nothing."""

    def further(self, file: str) -> Mapping[str, Any] | None:
        """A JSON file of no component, such as ``tokenizer/tokenizer_config.json``; None where there is none."""
        return None

    def directory(self, component: str) -> Path | None:
        """Where diffusers and transformers load a component from as it is read here; None where they could not."""
        return None

    @abstractmethod
    def licence(self) -> str:
        """The licence that the model's card names, or "unknown"."""
