"""What the exporter asks of an architecture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn

from tgate_engine.manifest import Conditioning
from tgate_export.checkpoint import Checkpoint
from tgate_export.gating import AttentionSite


@dataclass(frozen=True)
class ConditioningInput:
    """One conditioning tensor of a family, per half: its shape without the batch, and where its value comes from.

    ``follows_dtype``: it has the network's dtype; otherwise it is float32.
    """

    conditioning: Conditioning
    shape: tuple[int, ...]
    follows_dtype: bool


class Family(Protocol):
    """One architecture. Modules are built from configs alone, so that their weights may be fake.

    ``pipeline_classes``: the ``_class_name`` values of model_index.json that it loads. ``denoiser``, ``decoder``,
    ``text_components`` and ``tokenizers`` name sub-directories of the checkpoint.
    """

    name: str
    pipeline_classes: tuple[str, ...]
    denoiser: str
    decoder: str
    text_components: tuple[str, ...]
    tokenizers: tuple[str, ...]

    def check(self, checkpoint: Checkpoint) -> None:
        """Raises :class:`~tgate_engine.errors.ExportError` where the configs are of another architecture."""

    def build(self, checkpoint: Checkpoint, component: str) -> nn.Module:
        """A component's module in evaluation mode, its weights uninitialised."""
        ...

    def attention(self, denoiser: nn.Module) -> tuple[AttentionSite, ...]:
        """The modules the method gates, in the order they run."""
        ...

    def denoise(
        self, denoiser: nn.Module, latents: Tensor, timesteps: Tensor, conditioning: Mapping[str, Tensor]
    ) -> Tensor:
        """One network call: latents [N, C, h, w], timesteps [N], conditioning [N, ...] by name -> [N, C, h, w]."""
        ...

    def conditioning(self, checkpoint: Checkpoint, height: int, width: int) -> Sequence[ConditioningInput]:
        """What :meth:`denoise` takes, for images of that size in pixels."""
        ...

    def text(self, encoders: Sequence[nn.Module]) -> nn.Module:
        """Token ids, one tensor [B, T] per tokenizer, to the conditioning of source "text".

        The module has ``output_names``, and its sub-modules carry the names of ``text_components``.
        """
        ...

    def size_multiple(self, checkpoint: Checkpoint) -> int:
        """Height and width must be multiples of this many pixels."""
        ...

    def default_size(self, checkpoint: Checkpoint) -> int:
        """Height and width in pixels where the user names none."""
        ...

    def zero_negative(self, checkpoint: Checkpoint) -> bool:
        """Whether a request without a negative prompt gets zeros for its text."""
        ...
