"""Prints `src/noise/ziggurat.inc`: the tables k, w and f of docs/bundle.md's generator `numpy`, from the closed form
there. `tests/cpp/test_noise.py` sees that the file is what this prints, and that its numbers have the page's SHA-256.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Iterator

R = 3.6541528853610088
"""Where the tail begins."""
LAYERS = 256


def main() -> None:
    """Prints the tables as C++; floats as hexadecimal ones, which are exact."""
    print("// Made by `scripts/make_ziggurat.py`: the layers of the ziggurat, as docs/bundle.md defines them.")
    k, w, f = tables()
    print("\n".join(_array("std::uint32_t", "layer_k", map(str, k))))
    print("\n".join(_array("float", "layer_w", map(_literal, w))))
    print("\n".join(_array("float", "layer_f", map(_literal, f))))


def tables() -> tuple[list[int], list[float], list[float]]:
    """k, w and f, float32 in the last two."""
    last = LAYERS - 1
    x, y = [0.0] * LAYERS, [1.0] * LAYERS
    x[last], y[last] = R, math.exp(-R * R / 2)
    area = R * y[last] + math.sqrt(math.pi / 2) * math.erfc(R / math.sqrt(2))
    for i in range(last - 1, 0, -1):
        x[i] = math.sqrt(-2 * math.log(area / x[i + 1] + y[i + 1]))
        y[i] = math.exp(-x[i] * x[i] / 2)
    k = [round(2**23 * R * y[last] / area), 0, *(round(2**23 * x[i - 1] / x[i]) for i in range(2, LAYERS))]
    w = [area / y[last], *x[1:]]
    return k, [_float32(2**-23 * value) for value in w], [_float32(value) for value in y]


def _float32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _literal(value: float) -> str:
    """Without the zeros that a float32 has at the end of a float64's digits."""
    digits, exponent = value.hex().split("p")
    return f"{digits.rstrip('0').rstrip('.')}p{exponent}F"


def _array(kind: str, name: str, values: Iterable[str]) -> Iterator[str]:
    yield f"constexpr {kind} {name}[] = {{"
    line = "   "
    for value in values:
        if len(line) + len(value) + 2 > 120:
            yield line
            line = "   "
        line += f" {value},"
    yield line
    yield "};"


if __name__ == "__main__":
    main()
