"""One error class per layer, so that a caller can tell what failed without reading the text; and texts of strangers
made fit to be read in one."""

from __future__ import annotations

SHOWN = 80
"""How many characters of a stranger's text a message quotes."""

_MOST_BITS = 256
"""Whole numbers of more are told by their size: Python itself refuses to write very long ones out."""


class TgateError(Exception):
    """One clear line for the user: what was got, what was wanted, what to do next.

    What is not printable in it is escaped, as :func:`shown` does, whoever wrote it.
    """

    def __str__(self) -> str:
        return _printable(super().__str__())


class MethodError(TgateError):
    """The settings of a method (n, m, k, warm-up, fidelity interval) do not make a trajectory."""


class SamplerError(TgateError):
    """A sampler's coefficients are incomplete, not finite, or not in the expected form."""


class PlanError(TgateError):
    """A plan names a graph that is missing, or reads a carry that no earlier step writes."""


class BundleError(TgateError):
    """A bundle is missing files, damaged, or written for another version."""


class ExportError(TgateError):
    """A model or a sampler cannot be compiled into a bundle."""


class EngineError(TgateError):
    """An engine could not open or run a graph."""


class RequestError(TgateError):
    """A request (prompt, seed, guidance scale, initial latents) cannot be served as asked."""


def shown(value: object, most: int = SHOWN) -> str:
    """``value`` as a message may quote it: one line of at most ``most`` characters, without quotation marks.

    For whatever a stranger wrote: prompts, names of models and tensors, licences, paths. Characters that steer a
    terminal or reorder a line (control characters, line breaks, bidirectional overrides, invisible ones, halves of
    surrogate pairs) are written as escapes, ``\\x1b``; what is too long ends in "…". Never raises.
    """
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return f"a whole number of {value.bit_length()} bits"
    try:
        text = value if isinstance(value, str) else str(value)
    except (ValueError, RecursionError):  # long numbers and deep nesting inside of something
        return f"a {type(value).__name__} that cannot be written out"
    text = _printable(text[: most + 1])
    return text if len(text) <= most else text[: most - 1] + "…"


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in _SPACES else _escaped(c) for c in text)


_SPACES = "\xa0\u3000"
"""Spaces people write that Python calls unprintable: the no-break one and the one of CJK texts."""


def _escaped(character: str) -> str:
    return character.encode("unicode_escape").decode("ascii")
