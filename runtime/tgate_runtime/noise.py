"""Noise, from a named counter-based generator.

Image j of a request with seed s is drawn from Philox4x64-10 with the key (s, j), by NumPy's
``Generator.standard_normal`` in float32. The counter starts at 0 for the initial noise, at (i + 1) 2^192 for the
noise that a stochastic sampler adds in step i, and at (2^64 - 1) 2^192 for noise on a conditioning picture. So a
seed means the same noise whatever else is in the batch, however a request is cut into batches, and on every machine;
``tests/test_noise.py`` pins values.
"""

from __future__ import annotations

import operator
import secrets

import numpy as np
from numpy.typing import NDArray

from tgate_engine.errors import RequestError

INITIAL = 0
CONDITIONING = 2**64 - 1

SEED_LIMIT = 2**63
"""Seeds are whole numbers from 0 up to, and without, this."""


def check_seed(seed: object) -> int:
    """``seed`` as an int. Raises :class:`RequestError` for anything but a whole number in 0 .. 2**63 - 1."""
    wanted = f"a seed is a whole number from 0 to {SEED_LIMIT - 1}"
    if isinstance(seed, (bool, np.bool_)):
        raise RequestError(f"{wanted}, got {seed!r}")
    try:
        number = operator.index(seed)  # type: ignore[arg-type]
    except TypeError:
        raise RequestError(f"{wanted}, got {seed!r}") from None
    if not 0 <= number < SEED_LIMIT:
        raise RequestError(f"{wanted}, got {number}")
    return number


def random_seed() -> int:
    """A seed from the operating system's entropy, small enough to be retyped."""
    return secrets.randbelow(2**32)


def noise(seed: int, image_index: int, shape: tuple[int, ...], *, draw: int = INITIAL) -> NDArray[np.float32]:
    """Standard normal float32 of ``shape`` for image ``image_index`` of a request. Pure.

    ``draw``: which of the image's noises, :data:`INITIAL`, :func:`in_step` or :data:`CONDITIONING`.
    """
    key = np.array([check_seed(seed), image_index], np.uint64)
    counter = np.array([0, 0, 0, draw], np.uint64)
    generator = np.random.Generator(np.random.Philox(key=key, counter=counter))
    return generator.standard_normal(shape, dtype=np.float32)


def in_step(index: int) -> int:
    """The draw of the noise that step ``index`` adds."""
    return index + 1
