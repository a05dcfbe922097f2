"""Networks' weights in files of yours: tensors by name, read without running any code that a file holds."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tgate_engine.errors import RequestError, shown


def tensors_of(file: Path) -> dict[str, Any]:
    """Tensors by name, of a .safetensors file or of what torch.save has written. Raises :class:`RequestError` in one
    line for a file that holds none."""
    import torch
    from safetensors.torch import load_file

    try:
        held = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except Exception as error:  # whatever ails the file, one line says so
        raise RequestError(f"{file} holds no weights that can be read ({shown(error, 200)})") from None
    if not isinstance(held, dict):
        raise RequestError(f"{file} holds no weights by their names; name another file")
    return {str(name): tensor for name, tensor in held.items() if isinstance(tensor, torch.Tensor)}


def digest_of(tensors: Mapping[str, Any], more: str = "") -> str:
    """The SHA-256 of tensors and their names, whatever file they came in, and of ``more`` that goes with them."""
    digest = hashlib.sha256(more.encode())
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().numpy().tobytes())
    return digest.hexdigest()
