"""Initial noise, from a named counter-based generator.

Image j of a request with seed s is drawn from Philox4x64-10 with the key (s, j) and the counter 0, by NumPy's
``Generator.standard_normal`` in float32. So a seed means the same noise whatever else is in the batch, however
a request is cut into batches, and on every machine; ``tests/test_noise.py`` pins values.
"""

from __future__ import annotations

import operator
import secrets

import numpy as np
from numpy.typing import NDArray

from tgate_engine.errors import RequestError

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


def noise(seed: int, image_index: int, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal float32 of ``shape`` for image ``image_index`` of a request. Pure."""
    key = np.array([check_seed(seed), image_index], np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).standard_normal(shape, dtype=np.float32)
