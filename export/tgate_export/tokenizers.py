"""Tokenizers as single JSON files that the ``tokenizers`` library reads without transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import normalizers

from tgate_engine.errors import ExportError
from tgate_engine.manifest import Tokenizer
from tgate_export.checkpoints import Checkpoint

VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")


def export_tokenizer(
    checkpoint: Checkpoint, name: str, cls: type[Any], input_name: str, length: int, target: Path, *, lower: bool
) -> Tokenizer:
    """Write tokenizer ``name`` of the checkpoint to ``target`` (a file in the bundle's ``tokenizer`` directory).

    ``cls``: its class in transformers. ``length``: tokens of a prompt, start and end included.
    ``lower``: whether prompts are stripped and written in lower case first.
    Where the same tokenizer lies there already, under a name that sorts before, that file is used.
    Raises :class:`ExportError` where it does not load.
    """
    directory = checkpoint.tokenizer(name)
    if not any((directory / file).is_file() for file in VOCABULARIES):  # transformers would make one up
        raise ExportError(f"{directory} holds no vocabulary (one of {', '.join(VOCABULARIES)}); it is incomplete")
    try:
        loaded: Any = cls.from_pretrained(directory, local_files_only=True)
        backend = loaded.backend_tokenizer
    except Exception as error:  # transformers raises many kinds for files that are missing or of another kind
        raise ExportError(f"{directory} does not load as a {cls.__name__} ({type(error).__name__}: {error})") from None
    if lower:
        first = [normalizers.Lowercase(), normalizers.Strip()]
        backend.normalizer = normalizers.Sequence([*first, *([backend.normalizer] if backend.normalizer else [])])
    # The run time cuts and fills by itself, so that it can say what was cut.
    backend.no_truncation()
    backend.no_padding()
    target.parent.mkdir(parents=True, exist_ok=True)
    backend.save(str(target))
    for other in sorted(target.parent.iterdir()):
        if other < target and other.read_bytes() == target.read_bytes():
            target.unlink()
            target = other
            break
    if not isinstance(loaded.pad_token_id, int):
        raise ExportError(f"{directory} names no padding token")
    return Tokenizer(
        file=f"{target.parent.name}/{target.name}",
        input=input_name,
        length=length,
        pad_id=loaded.pad_token_id,
    )
