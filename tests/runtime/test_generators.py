"""Noise means the same thing everywhere."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tgate_engine.errors import RequestError
from tgate_runtime.generators import (
    CONDITIONING,
    GENERATORS,
    INITIAL,
    TORCH_CUDA_LIMIT,
    check_generator,
    check_seed,
    in_dtype,
    in_step,
    noise,
    random_seed,
)

BUNDLE_PAGE = Path(__file__).parents[2] / "docs" / "bundle.md"

PINNED = {
    0: [0.059911035, 0.015559634, -1.1644385, -0.13264713],
    7: [-0.293339, 1.7038306, 1.5391918, 0.63675386],
    2**63 - 1: [0.9518664, -1.0147828, 1.1980889, -0.21736814],
}


@pytest.mark.parametrize("seed", PINNED)
def test_pinned_values(seed: int) -> None:
    got = noise(seed, (4,))
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, np.array(PINNED[seed], np.float32))


# What follows, down to the first test, is docs/bundle.md's section on noise, written out again a number at a time.


def f32(x: float) -> float:
    """The nearest float32. A sum, product or root of float32 may be taken in float64 before: the result is the same."""
    return float(struct.unpack("<f", struct.pack("<f", x))[0])


def philox(counter: list[int], key: list[int], width: int) -> list[int]:
    """A block: ten rounds of Philox4x32 or Philox4x64, by the ``width`` of a word in bits."""
    m0, m1, w0, w1 = {
        32: (0xD2511F53, 0xCD9E8D57, 0x9E3779B9, 0xBB67AE85),
        64: (0xD2E7470EE14C6C93, 0xCA5A826395121157, 0x9E3779B97F4A7C15, 0xBB67AE8584CAA73B),
    }[width]
    low = 2**width - 1
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p, q = m0 * c0, m1 * c2
        c0, c1, c2, c3 = (q >> width) ^ c1 ^ k0, q & low, (p >> width) ^ c3 ^ k1, p & low
        k0, k1 = (k0 + w0) & low, (k1 + w1) & low
    return [c0, c1, c2, c3]


def words(seed: int, draw: int) -> Iterator[int]:
    counter = draw << 192
    while True:
        counter = (counter + 1) % 2**256
        for word in philox([counter >> 64 * i & 2**64 - 1 for i in range(4)], [seed, 0], 64):
            yield word & 0xFFFFFFFF
            yield word >> 32


R = 3.6541528853610088


def tables() -> tuple[list[int], list[float], list[float]]:
    x, y = [0.0] * 256, [1.0] * 256
    x[255], y[255] = R, math.exp(-R * R / 2)
    area = R * y[255] + math.sqrt(math.pi / 2) * math.erfc(R / math.sqrt(2))
    for i in range(254, 0, -1):
        x[i] = math.sqrt(-2 * math.log(area / x[i + 1] + y[i + 1]))
        y[i] = math.exp(-x[i] * x[i] / 2)
    k = [round(2**23 * R * y[255] / area), 0, *(round(2**23 * x[i - 1] / x[i]) for i in range(2, 256))]
    w = [f32(2**-23 * area / y[255]), *(f32(2**-23 * x[i]) for i in range(1, 256))]
    return k, w, [f32(value) for value in y]


def ziggurat(seed: int, draw: int, count: int) -> tuple[list[float], list[str]]:
    """Numbers of the generator ``numpy``, and how each was found: in its layer, by the wedge, from the tail.

    One from the tail is ``log1p`` where it would be another one, if the C library's log1p were a little off.
    """
    k, w, f = tables()
    stream = words(seed, draw)
    r32, inverse = f32(R), f32(0.27366123732975828)

    def uniform() -> float:
        return (next(stream) >> 8) * 2**-24

    def number() -> tuple[float, str]:
        while True:
            r = next(stream)
            i, m = r & 255, r >> 9
            x = f32(m * w[i]) * (-1 if r >> 8 & 1 else 1)
            if m < k[i]:
                return x, "layer"
            if i == 0:
                while True:
                    log = f32(math.log1p(-uniform()))
                    a = f32(-inverse * log)
                    b = f32(-math.log1p(-uniform()))
                    if f32(b + b) > f32(a * a):
                        off = (f32(r32 + f32(-inverse * f32(log * (1 + e)))) for e in (-(2**-23), 2**-23))
                        way = "tail" if {f32(r32 + a)} == set(off) else "log1p"
                        return f32(r32 + a) * (-1 if m >> 8 & 1 else 1), way
            if f32(f32(f32(f[i - 1] - f[i]) * uniform()) + f[i]) < math.exp(-x * x / 2):
                return x, "wedge"

    numbers = [number() for _ in range(count)]
    return [value for value, _ in numbers], [way for _, way in numbers]


def box_muller(seed: int, draw: int, count: int) -> list[float]:
    """Numbers of the generator ``torch-cuda``."""
    t = f32(2 * math.pi) * 2**-32

    def number(n: int) -> float:
        c0, c1, _, _ = philox([draw % 2**32, draw >> 32, n, 0], [seed % 2**32, seed >> 32], 32)
        u = f32(f32(c0) * 2**-32 + 2**-33)
        v = f32(f32(c1) * t + t / 2)
        return f32(f32(math.sqrt(f32(-2 * f32(math.log(u))))) * f32(math.sin(v)))

    return [number(n) for n in range(count)]


def test_the_page_defines_the_tables() -> None:
    """The digest that the page gives is that of the tables which its text makes."""
    k, w, f = tables()
    digest = hashlib.sha256(struct.pack("<256I256f256f", *k, *w, *f)).hexdigest()
    assert f"`{digest}`" in BUNDLE_PAGE.read_text(encoding="utf-8")


def test_the_page_defines_numpys_generator() -> None:
    """Bit for bit; what hangs on the C library's log1p, to an ulp.

    Seeds 14, 16 and 52 meet wedges and tails that hang on the last bits of a uniform number, and on what is rejected.
    """
    found = []
    draws = [(14, INITIAL), (16, INITIAL), (52, INITIAL)]
    draws += [(1, CONDITIONING), (2**32 + 5, in_step(0)), (2**63 - 1, in_step(41))]
    for seed, draw in draws:
        values, ways = ziggurat(seed, draw, 10_000)
        want, got = np.array(values, np.float32), noise(seed, (10_000,), draw=draw)
        sure = np.array(ways) != "log1p"
        np.testing.assert_array_equal(got[sure].view(np.uint32), want[sure].view(np.uint32))
        np.testing.assert_array_max_ulp(got, want, maxulp=1)
        found += ways
    assert found.count("wedge") > 400
    assert found.count("tail") > 15


def test_the_page_defines_torchs_generator() -> None:
    for seed, draw in ((0, INITIAL), (2**40 + 3, in_step(7)), (2**63 - 1, 2**33 + 1)):
        want = np.array(box_muller(seed, draw, 2_000), np.float32)
        got = noise(seed, (2, 1_000), draw=draw, generator="torch-cuda").ravel()
        np.testing.assert_array_equal(got.view(np.uint32), want.view(np.uint32))


# What others printed of torch.randn on a GPU: (seed, draw, shape): {number: the numbers from there}
PRINTED: dict[tuple[int, int, tuple[int, ...]], dict[int, list[float]]] = {
    (0, 0, (8, 8)): {
        0: [-0.9247, -0.4253, -2.6438, 0.1452, -0.1209, -0.5797, -0.6229, -0.3284],
        8: [-1.0745, -0.3631, -1.6711, 2.2655, 0.3117, -0.1842, 1.2866, 1.1820],
        16: [-0.1271, 1.2169, 1.4353, 1.0605, -0.4941, -1.4244, -0.7244, -1.2973],
        24: [0.0697, -0.0074, 1.8969, 0.6878, -0.0779, -0.8373, 1.3506, -0.2879],
        32: [-0.5965, -0.3283, -0.9086, -0.8059, -0.7407, -0.0504, 0.5435, 1.5150],
        40: [0.0141, 0.4532, 1.6349, 0.7124, -0.1806, 1.0252, -1.4622, -0.7554],
        48: [-0.1836, 0.3824, 0.3918, -0.0830, 0.8971, -1.1123, 0.1116, 0.4863],
        56: [-0.5499, -0.3231, -0.5469, 0.9049, 0.2837, 0.1210, 0.4730, -1.0823],
    },
    (1, 0, (3,)): {0: [-0.2963, 2.6764, -0.1408]},
    (10, 0, (3,)): {0: [-0.1029, 1.6810, -0.2708]},  # pytorch issue 79496
    (43, 0, (1, 3, 128, 128)): {0: [1.9983], 16384: [0.8704], 32768: [2.1127]},  # pytorch issue 62467
    (42, 0, (1, 64, 2048)): {  # pytorch issue 158398
        0: [0.1940, 2.1614, -0.1721],
        2045: [1.4540, -2.7733, -0.8932, -0.4574, 0.8063, 0.1580],
        4093: [0.1124, 0.2769, -1.2535, 1.1346, -0.6329, -0.9147],
        6141: [-1.0001, -1.1552, -0.6955],
    },
    (42, 1, (4,)): {0: [0.1391, -0.1082, -0.7174, 0.7566]},
    (42, 2, (4,)): {0: [-0.5187, 1.2268, 0.6255, -0.9117]},
    (42, 3, (4,)): {0: [-0.6974, -1.8688, -0.8832, -1.6627]},
    (42, 4, (4,)): {0: [-1.2682, -0.0383, -0.1029, 1.4400]},
    (42, 5, (4,)): {0: [1.4640, -0.3238, 0.7740, 1.5892]},
}

# Seed 0 with all digits. A GPU's sine is an approximation.
PRINTED_IN_FULL = [
    *(-0.9246624, -0.42534423, -2.6438458, 0.14518386, -0.1208664, -0.57972574, -0.622851, -0.3283869),
    *(-1.0745419, -0.36314395, -1.6710504, 2.2655048, 0.3116848, -0.1841891, 1.2866427, 1.1819527),
]


@pytest.mark.parametrize(("seed", "draw", "shape"), PRINTED)
def test_torch_cuda_is_what_a_gpu_draws(seed: int, draw: int, shape: tuple[int, ...]) -> None:
    got = noise(seed, shape, draw=draw, generator="torch-cuda")
    assert got.dtype == np.float32
    assert got.shape == shape
    for start, values in PRINTED[seed, draw, shape].items():
        np.testing.assert_allclose(got.ravel()[start : start + len(values)], values, rtol=0, atol=5.1e-5)


def test_torch_cuda_is_close_to_a_gpu() -> None:
    got = noise(0, (2, 2, 2, 2), generator="torch-cuda")
    np.testing.assert_allclose(got.ravel(), PRINTED_IN_FULL, rtol=0, atol=1e-6)


@pytest.mark.parametrize("generator", GENERATORS)
def test_a_smaller_shape_is_the_beginning_of_a_larger_one(generator: str) -> None:
    """Numbers fill a tensor in C order."""
    large = noise(5, (3, 8, 8), generator=generator).ravel()
    np.testing.assert_array_equal(noise(5, (2, 10), generator=generator).ravel(), large[:20])


@pytest.mark.parametrize("generator", GENERATORS)
def test_seeds_have_streams_of_their_own(generator: str) -> None:
    seeds = [*range(200), *(2**32 + seed for seed in range(100)), *(2**63 - 1 - seed for seed in range(100))]
    assert len({noise(seed, (8,), generator=generator).tobytes() for seed in seeds}) == 400


@pytest.mark.parametrize("generator", GENERATORS)
def test_steps_draw_noise_of_their_own(generator: str) -> None:
    """No draw is a piece of another one: their counters are far apart, or their numbers' are."""
    draws = [INITIAL, *map(in_step, range(50))] + [CONDITIONING] * (generator == "numpy")
    drawn = [noise(1, (64,), draw=draw, generator=generator) for draw in draws]
    assert len(np.unique(np.concatenate(drawn))) == 64 * len(draws)
    np.testing.assert_array_equal(drawn[0], noise(1, (64,), generator=generator))


def test_numpys_draws_are_philox_advanced() -> None:
    other = np.random.Generator(np.random.Philox(key=np.array([1, 0], np.uint64)).advance((3 + 1) << 192))
    np.testing.assert_array_equal(noise(1, (8,), draw=in_step(3)), other.standard_normal(8, dtype=np.float32))


@pytest.mark.parametrize("generator", GENERATORS)
def test_it_is_standard_normal(generator: str) -> None:
    values = np.concatenate([noise(3 + j, (4, 16, 16), generator=generator).ravel() for j in range(50)])
    assert abs(values.mean()) < 0.02
    assert abs(values.std() - 1) < 0.02
    assert abs((values**4).mean() - 3) < 0.1


def test_the_default_generator_is_numpys() -> None:
    assert next(iter(GENERATORS)) == "numpy"
    np.testing.assert_array_equal(noise(9, (8,)), noise(9, (8,), generator="numpy"))
    assert (noise(9, (8,)) != noise(9, (8,), generator="torch-cuda")).all()


@pytest.mark.parametrize("name", ["", "NumPy", "torch", "torch-cpu", None, 0, ["numpy"]])
def test_what_is_no_generator(name: Any) -> None:
    with pytest.raises(RequestError, match=r"there is no generator .*; use one of numpy, torch-cuda"):
        check_generator(name)
    with pytest.raises(RequestError, match="there is no generator"):
        noise(0, (4,), generator=name)


def test_what_is_a_generator() -> None:
    assert [check_generator(name) for name in GENERATORS] == ["numpy", "torch-cuda"]


def test_what_torch_cuda_does_not_draw() -> None:
    """Whatever depends on the GPU, or on the order in which a pipeline draws."""
    assert TORCH_CUDA_LIMIT == 221184
    assert noise(0, (TORCH_CUDA_LIMIT // 4, 4), generator="torch-cuda").shape == (55296, 4)
    with pytest.raises(RequestError) as refused:
        noise(0, (1, TORCH_CUDA_LIMIT + 1), generator="torch-cuda")
    assert str(refused.value) == (
        "generator torch-cuda draws at most 221184 numbers at once, got [1, 221185], 221185: "
        "beyond that PyTorch's noise depends on the GPU; use generator numpy"
    )
    with pytest.raises(RequestError, match="got a conditioning picture's; use generator numpy"):
        noise(0, (4,), draw=CONDITIONING, generator="torch-cuda")
    assert noise(0, (1, TORCH_CUDA_LIMIT + 1)).size == TORCH_CUDA_LIMIT + 1


@pytest.mark.parametrize("seed", [-1, 2**63, 1.0, 1.5, "7", None, True, np.float64(3)])
def test_what_is_no_seed(seed: Any) -> None:
    message = "a seed is a whole number from 0 to 9223372036854775807, got"
    with pytest.raises(RequestError, match=message):
        check_seed(seed)
    for generator in GENERATORS:
        with pytest.raises(RequestError, match=message):
            noise(seed, (4,), generator=generator)


@pytest.mark.parametrize("seed", [0, 2**63 - 1, np.int64(5), np.uint8(5)])
def test_what_is_a_seed(seed: Any) -> None:
    assert check_seed(seed) == int(seed)
    assert type(check_seed(seed)) is int


def test_drawn_seeds_are_seeds() -> None:
    drawn = {random_seed() for _ in range(10)}
    assert len(drawn) > 5
    assert all(check_seed(seed) == seed for seed in drawn)


def test_noise_is_in_the_dtype_that_its_generator_draws_in() -> None:
    """PyTorch rounds to the pipeline's; NumPy's float32 stays."""
    values = noise(3, (64,))
    assert in_dtype(values, "numpy", "float16") is values
    assert in_dtype(values, "torch-cuda", "float32").tobytes() == values.tobytes()
    np.testing.assert_array_equal(in_dtype(values, "torch-cuda", "float16"), values.astype(np.float16))
