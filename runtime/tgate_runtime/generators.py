"""Noise, from named counter-based generators.

Image j of a request with seed s has seed s + j of its own, so that it can be drawn alone: a seed means the same noise
whatever else is in the batch, however a request is cut into batches, and on every machine. A seed has many draws: one
for the initial latents, one for each step of a stochastic sampler, one for a conditioning picture. ``docs/bundle.md``
defines both generators to the last operation; ``tests/runtime/test_generators.py`` draws from that text again and pins
values.
"""

from __future__ import annotations

import math
import operator
import secrets
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from tgate_engine.dtypes import decode, encode
from tgate_engine.errors import RequestError, shown

INITIAL = 0
CONDITIONING = 2**64 - 1

SEED_LIMIT = 2**63
"""Seeds are whole numbers from 0 up to, and without, this."""

TORCH_CUDA_LIMIT = 108 * 2048
"""The most numbers that ``torch-cuda`` draws at once: the threads of an A100, 108 multiprocessors of 2048."""


def check_seed(seed: object) -> int:
    """``seed`` as an int. Raises :class:`RequestError` for anything but a whole number in 0 .. 2**63 - 1."""
    rule = f"a seed is a whole number from 0 to {SEED_LIMIT - 1}"
    if isinstance(seed, (bool, np.bool_)):
        raise RequestError(f"{rule}, got {shown(seed)}")
    try:
        number = operator.index(seed)  # type: ignore[arg-type]
    except TypeError:
        raise RequestError(f"{rule}, got {shown(seed)}") from None
    if not 0 <= number < SEED_LIMIT:
        raise RequestError(f"{rule}, got {shown(number)}")
    return number


def random_seed() -> int:
    """A seed from the operating system's entropy, small enough to be retyped."""
    return secrets.randbelow(2**32)


def in_step(index: int) -> int:
    """The draw of the noise that step ``index`` adds."""
    return index + 1


def check_generator(name: object, shape: tuple[int, ...] = ()) -> str:
    """``name``, if it is in :data:`GENERATORS` and draws noise of ``shape``. Raises :class:`RequestError`, which lists
    them, if it is not."""
    if not isinstance(name, str) or name not in GENERATORS:
        hint = "" if isinstance(name, str) else "; seed=S, or a list of seeds, says what it draws"
        raise RequestError(f"there is no generator '{shown(name)}'; use one of {', '.join(GENERATORS)}{hint}")
    if name == "torch-cuda" and (count := math.prod(shape)) > TORCH_CUDA_LIMIT:
        raise RequestError(
            f"generator torch-cuda draws at most {TORCH_CUDA_LIMIT} numbers at once, got {list(shape)}, {count}: "
            "beyond that PyTorch's noise depends on the GPU; use generator numpy"
        )
    return name


def noise(seed: int, shape: tuple[int, ...], *, draw: int = INITIAL, generator: str = "numpy") -> NDArray[np.float32]:
    """Standard normal float32 of ``shape`` for the image that has ``seed``. Pure.

    ``draw``: which of the image's noises, :data:`INITIAL`, :func:`in_step` or :data:`CONDITIONING`. ``generator``: a
    name in :data:`GENERATORS`. Raises :class:`RequestError` for what is no seed or generator, and for what
    ``torch-cuda`` does not draw.
    """
    return GENERATORS[check_generator(generator)](check_seed(seed), shape, draw)


def in_dtype(values: NDArray[np.float32], generator: str, dtype: str) -> NDArray[np.float32]:
    """Noise as a bundle of ``dtype`` takes it: PyTorch draws in the pipeline's dtype, so numbers of ``torch-cuda`` are
    rounded to it. Pure."""
    return decode(encode(values, dtype), dtype) if generator == "torch-cuda" else values


def _numpy(seed: int, shape: tuple[int, ...], draw: int) -> NDArray[np.float32]:
    """NumPy's ``standard_normal`` on Philox4x64-10 with the key (seed, 0), the counter starting at draw 2^192."""
    key = np.array([seed, 0], np.uint64)
    counter = np.array([0, 0, 0, draw], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter)).standard_normal(shape, dtype=np.float32)


def _torch_cuda(seed: int, shape: tuple[int, ...], draw: int) -> NDArray[np.float32]:
    """What ``torch.randn(shape)`` draws on a GPU as call ``draw`` of a CUDA generator with ``seed``, counted from 0.

    Element i is the first normal of thread i: Philox4x32-10 with the counter (draw, i), Box and Muller's sine. A GPU's
    ``logf`` may differ from the logarithm here in the last bit, and its ``__sincosf`` is an approximation, so values
    agree to about 1e-6. Threads have more than one element each where a GPU has fewer of them than elements, and what
    is drawn depends on the GPU: more than :data:`TORCH_CUDA_LIMIT` numbers are refused.
    """
    count = math.prod(shape)
    check_generator("torch-cuda", shape)
    if draw == CONDITIONING:
        raise RequestError(
            "generator torch-cuda draws noise of latents and steps, got a conditioning picture's; use generator numpy"
        )
    x, y = _philox4x32(seed, draw, count)
    single = np.float32
    u = x.astype(single) * single(2**-32) + single(2**-33)  # in (0, 1]
    turn = float(single(2 * math.pi)) * 2**-32
    v = (y.astype(single).astype(np.float64) * turn + turn / 2).astype(single)  # in (0, 2 pi]; the product is exact
    radius = np.sqrt(single(-2) * np.log(u.astype(np.float64)).astype(single))
    values: NDArray[np.float32] = radius * np.sin(v.astype(np.float64)).astype(single)
    return values.reshape(shape)


def _philox4x32(seed: int, draw: int, count: int) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    """The first two of the four 32-bit words of Philox4x32-10 at each counter draw + 2^64 i, i < ``count``."""
    low, half = np.uint64(2**32 - 1), np.uint64(32)
    c0 = np.full(count, draw & 0xFFFFFFFF, np.uint64)
    c1 = np.full(count, draw >> 32, np.uint64)
    c2 = np.arange(count, dtype=np.uint64)
    c3 = np.zeros(count, np.uint64)
    k0, k1 = seed & 0xFFFFFFFF, seed >> 32
    for _ in range(10):
        p, q = c0 * np.uint64(0xD2511F53), c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (q >> half) ^ c1 ^ np.uint64(k0), q & low, (p >> half) ^ c3 ^ np.uint64(k1), p & low
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1


GENERATORS: Mapping[str, Callable[[int, tuple[int, ...], int], NDArray[np.float32]]] = MappingProxyType(
    {"numpy": _numpy, "torch-cuda": _torch_cuda}
)
"""Each draws (seed, shape, draw) as standard normal float32 of the shape; the first is the default."""
