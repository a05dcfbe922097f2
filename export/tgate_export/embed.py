"""A prompt encoded ahead of time, for bundles without a text encoder: ``tgate embed``."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy
import torch

from tgate_engine.atomic import write_atomically
from tgate_engine.conditioning import halves
from tgate_engine.errors import ExportError
from tgate_engine.underway import unfinished
from tgate_export.checkpoints import open_checkpoint
from tgate_export.conditioning import encode
from tgate_export.families import find_text_model, location
from tgate_export.families.base import Size
from tgate_export.job import check_checkpoint
from tgate_export.modules import real_module
from tgate_export.tokenizers import export_tokenizers, token_ids


def embed(
    model: str,
    prompts: Sequence[str],
    output: Path,
    *,
    checkpoint: str | None = None,
    negative_prompt: str | None = None,
    clip_skip: int = 0,
    half: bool = False,
) -> list[str]:
    """Write what the text encoder of a model makes of prompts, and return the tensors' names.

    ``output``: a safetensors file of ``<name>.<half>`` to [N, ...], float32, for N prompts; written whole or not at
    all. ``negative_prompt``: None is the model's convention for none. ``clip_skip``: last layers of CLIP's text
    encoders to leave out. ``half``: keep the encoder's weights in bfloat16
    while it runs, which T5 needs half the memory for and costs it little.
    Raises :class:`~tgate_engine.errors.ExportError`.
    """
    entry = find_text_model(model)
    family = entry.family
    source = open_checkpoint(
        model,
        checkpoint or location(model),
        weights="checkpoint",
        components=(*family.text_components, *family.tokenizers),
        build=family.build,
        elsewhere={} if checkpoint else entry.elsewhere,
        prefer_half=half,
    )
    check_checkpoint(family, source, family.text_components)
    family.check_clip_skip(source, clip_skip)
    side = family.size_multiple(source)
    every = family.conditioning(source, Size(height=side, width=side, frames=family.default_frames(source)))
    inputs = [c for c in every if c.conditioning.source == "text"]
    names = [*(c.conditioning.name for c in inputs), *(f"{name}.negative" for name in family.negative_text(clip_skip))]
    dtype = torch.bfloat16 if half else torch.float32
    text = family.text([real_module(family, source, c, dtype) for c in family.text_components], clip_skip)
    guided = family.guidance(source, scale=2.0) == "classifier-free"  # with any scale that guides
    if negative_prompt is not None and not guided:
        raise ExportError(f"{model} has no negative half of guidance; leave out the negative prompt")
    nothing = None if negative_prompt is None and family.zero_negative(source) else negative_prompt or ""
    with tempfile.TemporaryDirectory() as folder, unfinished(Path(folder)):
        tokenizers = export_tokenizers(family, source, Path(folder))
        texts = dict.fromkeys([*prompts, *([] if nothing is None else [nothing])])
        outputs = {t: encode(text, names, *token_ids(Path(folder), tokenizers, t).values()) for t in texts}
    encoded = {t: {name: value.numpy() for name, value in tensors.items()} for t, tensors in outputs.items()}
    negative = None if nothing is None else encoded[nothing]
    own = [c.conditioning for c in inputs]
    rows = [halves(own, {}, encoded[prompt], negative, guided=guided) for prompt in prompts]
    tensors = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    write_atomically(output, safetensors.numpy.save(tensors))
    return list(tensors)
