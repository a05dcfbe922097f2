"""What conditions the denoiser, in eager PyTorch: for goldens, and for prompts encoded ahead of time."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import tokenizers as tokenizers_library
import torch
from torch import Tensor, nn

from tgate_engine.manifest import Tokenizer
from tgate_export.checkpoints import Checkpoint
from tgate_export.families.base import ConditioningInput, Family
from tgate_export.tokenizers import export_tokenizer

Tensors = Mapping[str, Tensor]

log = logging.getLogger("tgate")


def export_tokenizers(family: Family, checkpoint: Checkpoint, root: Path) -> list[Tokenizer]:
    """Write a family's tokenizers below ``root``, one for each input ``ids.<i>`` of its text graph."""
    return [
        export_tokenizer(
            checkpoint,
            name,
            family.tokenizer_class,
            f"ids.{i}",
            family.token_length(checkpoint, i),
            root / "tokenizer" / f"{i}.json",
            lower=family.lower_prompts,
        )
        for i, name in enumerate(family.tokenizers)
    ]


def token_ids(root: Path, tokenizers: Sequence[Tokenizer], prompt: str) -> dict[str, Tensor]:
    """``ids.<i>``, int64 [1, T], of a prompt; too long a prompt is cut."""
    return {t.input: torch.tensor([_ids(root / t.file, t, prompt)]) for t in tokenizers}


def encode(module: nn.Module, inputs: Sequence[ConditioningInput], *arguments: Tensor) -> dict[str, Tensor]:
    """A text or image module's outputs by name, float32 [1, ...]."""
    with torch.no_grad():
        outputs = module(*arguments)
    return {c.conditioning.name: value.float() for c, value in zip(inputs, outputs, strict=True)}


def halves(
    inputs: Sequence[ConditioningInput], positive: Tensors, negative: Tensors | None, *, guided: bool
) -> dict[str, Tensor]:
    """``<name>.<half>`` to [1, ...]. ``negative`` None stands for zeros. Without guidance there is no negative half."""
    found: dict[str, Tensor] = {}
    for c in inputs:
        name = c.conditioning.name
        here = torch.tensor([c.conditioning.value]) if c.conditioning.source == "constant" else positive[name]
        found[f"{name}.positive"] = here
        if not guided:
            continue
        if c.conditioning.negative == "same" or c.conditioning.source == "constant":
            found[f"{name}.negative"] = here
        elif c.conditioning.negative == "zeros" or negative is None:
            found[f"{name}.negative"] = torch.zeros_like(here)
        else:
            found[f"{name}.negative"] = negative[name]
    return found


def _ids(file: Path, tokenizer: Tokenizer, prompt: str) -> list[int]:
    ids = list(tokenizers_library.Tokenizer.from_file(str(file)).encode(prompt).ids)
    if len(ids) > tokenizer.length:
        log.warning("the prompt has %d tokens, the model takes %d; the end is left out", len(ids), tokenizer.length)
        ids = [*ids[: tokenizer.length - 1], ids[-1]]
    return ids + [tokenizer.pad_id] * (tokenizer.length - len(ids))
