"""Tokenizers as single JSON files that the ``tokenizers`` library reads without transformers.

Each is compared with transformers' own before it is used: what a prompt becomes has to be the same.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
from diffusers.loaders import TextualInversionLoaderMixin
from tokenizers import normalizers
from torch import Tensor

from tgate_engine.errors import ExportError
from tgate_engine.manifest import Tokenizer
from tgate_engine.tokenizer_check import ENDS, check_tokenizer
from tgate_export.checkpoints import Checkpoint
from tgate_export.checkpoints.files import plain, quoted
from tgate_export.checkpoints.vocabularies import checked_vocabulary
from tgate_export.families.base import Family
from tgate_export.libraries import refusing
from tgate_export.quiet import quiet

_DAMAGED = "it is damaged, or another model's"

_PRIVATE_USE = 0xE000
"""The first of Unicode's characters that mean nothing; they stand for vectors of textual inversions."""

_PROBES = (
    "",
    "a large red circle above a small blue square",
    "  An ORANGE\tstar,\n\nnext to   the Moon -- 42 (really!) é ü 漢字 🙂 ",
    "<pad> a </s> b <unk> c <|startoftext|> d <|endoftext|> e ! [PAD]",
    "\x1cA <PAD> b </S> c <|STARTOFTEXT|>  </s> \x1f\u3000",
    " ".join(f"word{i}" for i in range(400)),
)
"""Texts of all kinds that a tokenizer has to treat as transformers does."""

log = logging.getLogger("tgate")


def export_tokenizers(family: Family, checkpoint: Checkpoint, root: Path) -> list[Tokenizer]:
    """Write a family's tokenizers below ``root``, one for each input ``ids.<i>`` of its text graph.

    Equal ones share a file. Raises :class:`ExportError` where one does not load, or would not do what transformers'
    does.
    """
    return [_export(family, checkpoint, i, root / "tokenizer" / f"{i}.json") for i in range(len(family.tokenizers))]


def load(family: Family, checkpoint: Checkpoint, index: int) -> Any:
    """Tokenizer ``index`` of a family as transformers loads it. Raises :class:`ExportError`.

    Which end of a prompt is filled up and cut is checked where run time does it; elsewhere the pipeline sees to it.
    """
    name = family.tokenizers[index]
    directory = checkpoint.tokenizer(name)
    kind = family.tokenizer_kind(index)
    with checked_vocabulary(directory, kind.vocab_files_names.values(), family.brought) as checked:
        _check_class(family, checkpoint, index)
        with quiet(), refusing(f"{directory} does not load as a {kind.__name__}", _DAMAGED):
            loaded: Any = kind.from_pretrained(checked, local_files_only=True)
    encoder, largest = family.text_components[index], max(loaded.get_vocab().values())
    known = family.vocabulary(checkpoint, encoder)
    if largest >= known:
        raise ExportError(
            f"{directory} has tokens up to {largest}, and the {encoder} knows {known} (vocab_size); "
            "they do not belong together"
        )
    if not isinstance(loaded.pad_token_id, int):
        raise ExportError(f"{directory} names no padding token")
    for side in ("padding_side", "truncation_side") if family.facts.text_graph else ():
        if getattr(loaded, side) != "right":
            raise ExportError(
                f"{directory}: tokenizer_config.json has {side} = {getattr(loaded, side)!r}; prompts are filled up and "
                "cut at their end here, so only 'right' can be exported"
            )
    return loaded


def transformers_ids(family: Family, loaded: Any, length: int, prompt: str) -> tuple[list[int], list[int]]:
    """Ids and mask, each ``length`` long, that diffusers' pipeline gets of a prompt from transformers' tokenizer."""
    if family.lower_prompts:
        prompt = prompt.lower().strip()
    with quiet(), refusing(f"its {type(loaded).__name__} does not read {quoted(prompt)}", _DAMAGED):
        if family.textual_inversions:
            prompt = TextualInversionLoaderMixin().maybe_convert_prompt(prompt, loaded)
        encoded = loaded(prompt, padding="max_length", max_length=length, truncation=True, return_attention_mask=True)
    return list(encoded["input_ids"]), list(encoded["attention_mask"])


def token_ids(root: Path, specs: Sequence[Tokenizer], prompt: str) -> dict[str, Tensor]:
    """``ids.<i>``, int64 [1, T], of a prompt; too long a prompt is cut, with a warning."""
    inputs = {}
    for spec in specs:
        with refusing(f"{spec.file} does not read {quoted(prompt)}", _DAMAGED):
            ids, whole = _ids(tokenizers.Tokenizer.from_file(str(root / spec.file)), spec, prompt)
        if whole > spec.length:
            log.warning("the prompt has %d tokens, the model takes %d; the end is left out", whole, spec.length)
        inputs[spec.input] = torch.tensor([ids])
    return inputs


def _export(family: Family, checkpoint: Checkpoint, index: int, target: Path) -> Tokenizer:
    loaded = load(family, checkpoint, index)
    length = family.token_length(checkpoint, index)
    what = f"{checkpoint.where}: {family.tokenizers[index]} cannot be read again as it was loaded"
    with refusing(what, "its files do not fit one another"):
        tokenizer = tokenizers.Tokenizer.from_str(loaded.backend_tokenizer.to_str())
    # The run time cuts and fills by itself, so that it can say what was cut.
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if family.lower_prompts:
        tokenizer = _lower_first(tokenizer)
    vectors = _several_vectors(loaded.added_tokens_encoder) if family.textual_inversions else {}
    if vectors:
        tokenizer = _write_vectors_out(tokenizer, vectors)
    target.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(target))
    try:
        check_tokenizer(target.read_bytes())
    except ValueError as error:
        raise ExportError(
            f"{checkpoint.where}: {family.tokenizers[index]} is not one that run time reads: {error}"
        ) from None
    for other in sorted(target.parent.iterdir()):
        if other < target and other.read_bytes() == target.read_bytes():
            target.unlink()
            target = other
            break
    spec = Tokenizer(
        file=f"{target.parent.name}/{target.name}", input=f"ids.{index}", length=length, pad_id=loaded.pad_token_id
    )
    _compare(family, checkpoint, index, loaded, tokenizers.Tokenizer.from_file(str(target)), spec, [*vectors])
    return spec


def _ids(tokenizer: tokenizers.Tokenizer, spec: Tokenizer, prompt: str) -> tuple[list[int], int]:
    """A prompt's ids, filled up or cut as the library does it, and how many there were."""
    tokenizer.no_truncation()
    whole = len(tokenizer.encode(prompt).ids)
    tokenizer.enable_truncation(spec.length)
    ids = list(tokenizer.encode(prompt).ids)
    return ids + [spec.pad_id] * (spec.length - len(ids)), whole


def _check_class(family: Family, checkpoint: Checkpoint, index: int) -> None:
    """Transformers loads any vocabulary under any class, with a warning at most."""
    name, expected = family.tokenizers[index], family.tokenizer_kind(index).__name__
    named = {"model_index.json": checkpoint.named_class(name)}
    named[f"{name}/tokenizer_config.json"] = (checkpoint.further(f"{name}/tokenizer_config.json") or {}).get(
        "tokenizer_class"
    )
    for place, kind in named.items():
        if kind not in (None, expected, f"{expected}Fast"):
            raise ExportError(
                f"{checkpoint.where}: {name} is a {plain(kind)} in {place}; {family.name} wants a {expected}"
            )


def _compare(
    family: Family,
    checkpoint: Checkpoint,
    index: int,
    loaded: Any,
    own: tokenizers.Tokenizer,
    spec: Tokenizer,
    vectors: Sequence[str],
) -> None:
    """Raises :class:`ExportError` where a text becomes other ids than transformers', or the encoder another mask."""
    end = family.end_token(checkpoint, index)
    for text in (*_PROBES, *(f"a {token} b{token}, {token}" for token in vectors)):
        expected, mask = transformers_ids(family, loaded, spec.length, text)
        with refusing(f"{checkpoint.where}: {family.tokenizers[index]} does not read {quoted(text)}", _DAMAGED):
            ids, _ = _ids(own, spec, text)
        if ids != expected:
            place = next(i for i, (a, b) in enumerate(zip(ids, expected, strict=False)) if a != b)
            raise ExportError(
                f"{checkpoint.where}: {family.tokenizers[index]} cannot be exported: of {text!r:.60} it makes token "
                f"{ids[place]} at place {place} where transformers makes {expected[place]}"
            )
        if end is not None and mask != [int(end in ids[i:]) for i in range(len(ids))]:
            raise ExportError(
                f"{checkpoint.where}: {family.tokenizers[index]} does not end a prompt with token {end}, which the "
                f"{family.text_components[index]}'s config.json names as its eos_token_id; they do not belong together"
            )


def _lower_first(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """``tokenizer`` over prompts that are written in lower case and stripped before anything else is done.

    Special tokens are usually looked for in a text as it stands; here they have to be found in what it becomes.
    """
    data = json.loads(tokenizer.to_str())
    for token in data["added_tokens"]:
        token["normalized"] = True
    lowered = tokenizers.Tokenizer.from_str(json.dumps(data))
    own = tokenizer.normalizer
    first = [normalizers.Lowercase(), normalizers.Replace(tokenizers.Regex(ENDS), "")]
    lowered.normalizer = normalizers.Sequence([*first, *([own] if own else [])])
    return lowered


def _several_vectors(added: Mapping[str, int]) -> dict[str, list[str]]:
    """Textual inversions of several vectors, as diffusers adds them: "<cat>", "<cat>_1", "<cat>_2", …

    Raises :class:`ExportError` for one whose name is part of another token's: diffusers writes it out in there, too.
    """
    vectors = {}
    for token in added:
        parts = [token]
        while f"{token}_{len(parts)}" in added:
            parts.append(f"{token}_{len(parts)}")
        if len(parts) > 1:
            vectors[token] = parts
    for token, parts in vectors.items():
        for other in added:
            if token in other and other not in parts:
                raise ExportError(
                    f"the textual inversion {token!r} of several vectors is part of the name of {other!r}, so a prompt "
                    "with the latter would mean both; rename one of them"
                )
    return vectors


def _write_vectors_out(tokenizer: tokenizers.Tokenizer, vectors: Mapping[str, Sequence[str]]) -> tokenizers.Tokenizer:
    """``tokenizer`` with every token of ``vectors`` written out as all of its vectors before anything else is done.

    A token is found in the text as it is after normalisation, so writing it out has to give it another name: the
    vectors are called by characters of Unicode's private use area. What normalisation alone turns into a token, such
    as other capitals, stays its first vector, as in diffusers.
    """
    tokens = list(dict.fromkeys(part for parts in vectors.values() for part in parts))
    names = {token: chr(_PRIVATE_USE + i) for i, token in enumerate(tokens)}
    data = json.loads(tokenizer.to_str())
    for token in data["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    own = tokenizer.normalizer
    renamed = tokenizers.Tokenizer.from_str(json.dumps(data))
    longest = sorted(tokens, key=len, reverse=True)
    before = [normalizers.Replace(t, " ".join(names[part] for part in vectors.get(t, [t]))) for t in longest]
    after = [normalizers.Replace(own.normalize_str(t) if own else t, names[t]) for t in longest]
    renamed.normalizer = normalizers.Sequence([*before, *([own] if own else []), *after])
    return renamed
