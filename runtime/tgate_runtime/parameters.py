"""What other programs note in a picture: the text ``parameters`` of AUTOMATIC1111's web UI, read distrustfully.

It has no plan and no bundle, and its seed draws other noise. So it says what to ask for, and not how the picture was
drawn: what is taken and what is not is told (:attr:`Parameters.left`).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tgate_engine.errors import RequestError, shown
from tgate_runtime.generators import SEED_LIMIT

_PAIR = re.compile(r'\s*([A-Za-z][\w /+-]{0,60}):\s*("(?:[^"\\]|\\.)*"|[^,]*)(?:,|\Z)')
_MOST_PAIRS = 256
_NEGATIVE = "Negative prompt:"
_FROM_ANOTHER: tuple[str, ...] = (
    "Denoising strength",
    "Hires upscale",
    "Hires resize",
    "Mask blur",
    "Variation seed",
    "Refiner",
)
_FROM_ANOTHER += ("ControlNet 0", "ControlNet", "First pass size")
"""What only a picture has that was drawn in more than one go, or from more than a prompt."""


@dataclass(frozen=True, kw_only=True)
class Parameters:
    """What a request can keep of the text; None where it does not say. ``left``: all else, by its name there."""

    prompt: str
    negative_prompt: str | None
    seed: int | None
    guidance_scale: float | None
    size: str | None
    left: Mapping[str, str]

    def request(self) -> dict[str, Any]:
        """The arguments of :class:`~tgate_runtime.pipeline.Pipeline` that the text gives."""
        names = ("prompt", "negative_prompt", "seed", "guidance_scale", "size")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


def parse_parameters(text: str, where: str) -> Parameters | None:
    """The parameters of a text, which anybody may have written; None where it is another text. ``where``: what errors
    call it.

    Raises :class:`RequestError` for a picture that a prompt alone does not draw, and for numbers that mean nothing.
    """
    *lines, last = text.strip().split("\n")
    pairs = _pairs(last)
    if "Steps" not in pairs:
        return None
    if odd := [name for name in _FROM_ANOTHER if name in pairs]:
        raise RequestError(
            f"{where} was drawn by another program with {odd[0]}: {shown(pairs[odd[0]], 40)}, which no bundle does; "
            "give its prompt yourself"
        )
    start = next((i for i, line in enumerate(lines) if line.startswith(_NEGATIVE)), len(lines))
    negative = "\n".join(lines[start:]).removeprefix(_NEGATIVE).strip() if start < len(lines) else None
    seed, scale, size = (pairs.pop(name, None) for name in ("Seed", "CFG scale", "Size"))
    return Parameters(
        prompt="\n".join(lines[:start]).strip(),
        negative_prompt=negative,
        seed=None if seed is None else _seed(seed, where),
        guidance_scale=None if scale is None else _scale(scale, where),
        size=None if size is None else _size(size, where),
        left=pairs,
    )


def _pairs(line: str) -> dict[str, str]:
    """The ``Name: value`` pairs of a line that has nothing else; empty for another line."""
    pairs: dict[str, str] = {}
    at = 0
    while at < len(line):
        match = _PAIR.match(line, at)
        if match is None or match[1] in pairs or len(pairs) >= _MOST_PAIRS:
            return {}
        value = match[2].strip()
        if value.startswith('"'):
            try:
                value = str(json.loads(value))
            except ValueError:
                return {}
        pairs[match[1]] = value
        at = match.end()
    return pairs


def _seed(text: str, where: str) -> int:
    if re.fullmatch("[0-9]{1,19}", text) and int(text) < SEED_LIMIT:
        return int(text)
    raise _unread("Seed", text, f"a whole number from 0 to {SEED_LIMIT - 1}", where)


def _scale(text: str, where: str) -> float:
    if re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,9})?", text) and math.isfinite(float(text)):
        return float(text)
    raise _unread("CFG scale", text, "a number", where)


def _size(text: str, where: str) -> str:
    if re.fullmatch("[1-9][0-9]{0,5}x[1-9][0-9]{0,5}", text):
        return text
    raise _unread("Size", text, "WIDTHxHEIGHT", where)


def _unread(name: str, text: str, wanted: str, where: str) -> RequestError:
    return RequestError(
        f"the parameters in {where} have {name}: {shown(text, 40)}, expected {wanted}; give the prompt yourself"
    )
