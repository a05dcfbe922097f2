"""An adapter: a LoRA whose names are those of a bundle's weights, in a file of its own beside them.

The file is a safetensors file. For a weight it changes it holds, under the weight's name and a mark, the two factors of
the change and what their product is multiplied with, in the order that the LoRA has them, whichever way round the
bundle holds the weight: ``W + scale * factor * up @ down``. A bias has its change alone.
"""

from __future__ import annotations

import re

from tgate_engine.errors import RequestError, shown

UP, DOWN, FACTOR, BIAS = "#up", "#down", "#factor", "#bias"
"""The marks: [outputs, rank] and [rank, inputs * kernel], float16 or float32; [1] and [outputs], float32."""
TURNED = "^T"
"""How the name of a weight ends that the bundle holds as [inputs, outputs]."""
MOST_SCALE = 1e4
"""Of an adapter in a request; what is usual is 0.5 to 1.5."""
MOST_BYTES = 1 << 31
"""Of an adapter's file."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_adapter_name(name: object) -> str:
    """``name``, if an adapter can be called so. Raises :class:`RequestError`."""
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(
            f"an adapter's name is 1 to 64 letters, digits, dots, dashes and underscores, and begins with one of the "
            f"first two, got '{shown(name, 80)}'"
        )
    return name
