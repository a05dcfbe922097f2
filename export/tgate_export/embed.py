"""A prompt encoded ahead of time, for bundles without a text encoder: ``tgate embed``."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tgate_engine.atomic import write_atomically
from tgate_engine.conditioning import halves
from tgate_engine.errors import ExportError
from tgate_engine.underway import unfinished
from tgate_export.checkpoints import Checkpoint, open_checkpoint
from tgate_export.conditioning import encode
from tgate_export.families import find_text_model, location
from tgate_export.families.base import Family, Size
from tgate_export.job import check_checkpoint
from tgate_export.libraries import refusing
from tgate_export.modules import real_module
from tgate_export.oracle import bare_pipeline
from tgate_export.quiet import quiet
from tgate_export.tokenizers import export_tokenizers, load, token_ids

Arrays = Mapping[str, NDArray[Any]]
"""Conditioning of one text by name, each [1, ...]."""


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
    encoders = {name: real_module(family, source, name, dtype) for name in family.text_components}
    guided = family.guidance(source, scale=2.0) == "classifier-free"  # with any scale that guides
    if negative_prompt is not None and not guided:
        raise ExportError(f"{model} has no negative half of guidance; leave out the negative prompt")
    nothing = negative_prompt
    if negative_prompt is None and not family.zero_negative(source):
        nothing = family.no_negative()
    texts = list(dict.fromkeys(prompts))
    if family.facts.text_graph:
        text = family.text([*encoders.values()], clip_skip)
        encoded = _by_graph(family, source, text, names, [*texts, *([] if nothing is None else [nothing])])
        negatives = {} if nothing is None else dict.fromkeys(texts, encoded[nothing])
    else:
        encoded, negatives = _by_pipeline(family, source, encoders, texts, nothing)
    own = [c.conditioning for c in inputs]
    rows = [halves(own, {}, encoded[prompt], negatives.get(prompt), guided=guided) for prompt in prompts]
    tensors = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    write_atomically(output, safetensors.numpy.save(tensors))
    return list(tensors)


def _by_graph(
    family: Family, source: Checkpoint, text: nn.Module, names: Sequence[str], texts: Sequence[str]
) -> dict[str, Arrays]:
    """What the module of a text graph makes of each text."""
    with tempfile.TemporaryDirectory() as folder, unfinished(Path(folder)):
        tokenizers = export_tokenizers(family, source, Path(folder))
        outputs = {
            t: encode(text, names, *token_ids(Path(folder), tokenizers, t).values()) for t in dict.fromkeys(texts)
        }
    return {t: _arrays(tensors) for t, tensors in outputs.items()}


def _by_pipeline(
    family: Family, source: Checkpoint, encoders: Mapping[str, nn.Module], texts: Sequence[str], nothing: str | None
) -> tuple[dict[str, Arrays], dict[str, Arrays]]:
    """What diffusers' own pipeline makes of each prompt, and of the negative prompt beside it, which some pipelines cut
    to the prompt's length."""
    loaded = {name: load(family, source, i) for i, name in enumerate(family.tokenizers)}
    cls = getattr(diffusers, family.pipeline(source))
    advice = "the checkpoint's text encoders and tokenizers do not fit each other"
    with quiet(), torch.no_grad(), refusing(f"{source.where}: {cls.__name__} does not encode prompts", advice):
        pipe = bare_pipeline(cls, source, **family.pipeline_parts(), **loaded, **encoders)
        pairs = {t: family.encode_with(pipe, t, nothing or "", 0) for t in texts}
    negatives = {} if nothing is None else {t: _arrays(negative) for t, (_, negative) in pairs.items()}
    return {t: _arrays(positive) for t, (positive, _) in pairs.items()}, negatives


def _arrays(tensors: Mapping[str, Tensor]) -> Arrays:
    return {name: value.float().numpy() for name, value in tensors.items()}
