"""libtgate finds the tensors of a weight file where Python finds them, and refuses the headers that Python refuses."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save

from tests.cpp.probes import ask, record
from tests.fuzz.mutations import mutate_bytes
from tests.hostile import Raw, bad_values, leaves, put
from tgate_engine.errors import BundleError
from tgate_runtime.weights import read_places

HEAD = Path(__file__).parents[2] / "tgate_engine" / "models" / "mini" / "weights.head"


def cpp_answers(cpp_build: Path, files: list[tuple[bytes, int]]) -> list[str]:
    """A line for the first bytes of each file and its size."""
    lines = ask(cpp_build / "probe-places", (record("P", struct.pack("<Q", size) + head) for head, size in files))
    assert len(lines) == len(files)
    return lines


def python_answer(path: Path, head: bytes, size: int) -> str:
    """The same of Python."""
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)
    try:
        places = read_places(path)
    except BundleError as error:
        return str(error)
    return json.dumps({name: [p.dtype, p.shape, p.offset, p.length] for name, p in places.items()}, sort_keys=True)


def agree(cpp_build: Path, path: Path, files: list[tuple[bytes, int]]) -> list[bool]:
    """Whether each is taken, by both alike and with the same places."""
    taken = []
    for (head, size), line in zip(files, cpp_answers(cpp_build, files), strict=True):
        want = python_answer(path, head, size)
        refused = f"{path} is not a whole weight file" in want
        if refused:
            assert "weights.safetensors is not a whole weight file (" in line, (want, head[:200])
            assert line.endswith("; export the bundle again")
        else:
            assert json.loads(line) == json.loads(want), head[:200]
        taken.append(not refused)
    return taken


def headed(header: Any) -> bytes:
    """The first bytes of a file with that header, which may hold texts of JSON."""
    raws: list[Raw] = []

    def marked(value: Any) -> Any:
        if isinstance(value, Raw):
            raws.append(value)
            return f"raw {len(raws) - 1} raw"
        if isinstance(value, dict):
            return {key: marked(item) for key, item in value.items()}
        return [*map(marked, value)] if isinstance(value, list) else value

    text = json.dumps(marked(header))
    for number, raw in enumerate(raws):
        text = text.replace(f'"raw {number} raw"', raw)
    return struct.pack("<Q", len(text.encode())) + text.encode()


SMALL = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b^T": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]},
    "__metadata__": {"format": "pt"},
}


REFUSED_HERE_ALONE = (Raw('"\\ud800"'), Raw("[" * 900 + "]" * 900))
"""Half a surrogate pair, which is no text in C++, and what is nested deeper than its parser goes: Python reads both
where nobody asks for them."""


def test_tensors_of_a_real_file(cpp_build: Path, tmp_path: Path) -> None:
    arrays: dict[str, NDArray[Any]] = {
        f"tensor {i} é": np.zeros((i, 3), dtype) for i in range(4) for dtype in (np.float32, np.int64)
    }
    arrays |= {f"{dtype.__name__}": np.zeros(5, dtype) for dtype in (np.float16, np.uint8, np.int64)}
    whole = save(arrays, {"format": "pt"})
    head = HEAD.read_bytes()
    size = 8 + struct.unpack_from("<Q", head)[0] + 100_000_000
    assert agree(cpp_build, tmp_path / "w", [(whole, len(whole)), (head, size)]) == [True, True]
    assert len(json.loads(cpp_answers(cpp_build, [(head, size)])[0])) > 300


def test_every_value_that_a_header_may_have_instead(cpp_build: Path, tmp_path: Path) -> None:
    """Each place of a small header, set to everything that it should not be."""
    files = [
        (head := headed(put(SMALL, place, bad)), len(head) + 26)
        for place, leaf in leaves(SMALL)
        for bad in bad_values(leaf)
        if bad not in REFUSED_HERE_ALONE
    ]
    taken = agree(cpp_build, tmp_path / "w", files)
    assert len(taken) > 400
    assert 20 < sum(taken) < len(taken) / 2


@pytest.mark.parametrize(
    "shape",
    [[2**32, 2**32], [2**62, 2], [2**61, 1], [2**31, 2**31, 2], [2**62, 2**62, 0], [3, 2**62], [1] * 1000, [2**63 - 1]],
)
def test_products_that_no_number_holds(cpp_build: Path, tmp_path: Path, shape: list[int]) -> None:
    """Where the true product is what the offsets say, modulo 2^64 too, and where it is 0."""
    product = int(np.prod([int(size) for size in shape], dtype=object)) * 4
    files: list[tuple[bytes, int]] = []
    for length in {product % 2**64 % 2**63, min(product, 2**63 - 1), 0}:
        head = headed({"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, length]}})
        files.append((head, len(head) + 4))
    assert any(agree(cpp_build, tmp_path / "w", files)) == (product in (0, 4))


def test_bounds_of_the_file(cpp_build: Path, tmp_path: Path) -> None:
    head = headed(SMALL)
    files = [(head, len(head) + extra) for extra in (0, 23, 24, 25, 26, 27, 100)]
    assert agree(cpp_build, tmp_path / "w", files) == [False, False, False, False, True, True, True]
    short = [(head[:keep], keep) for keep in (0, 1, 7, 8, 9, 40, len(head) - 1)]
    assert not any(agree(cpp_build, tmp_path / "w", short))
    large = [(struct.pack("<Q", size) + head[8:], len(head) + 26) for size in (2**26 + 1, 2**32, 2**63, 2**64 - 1)]
    assert not any(agree(cpp_build, tmp_path / "w", large))


def test_a_header_that_the_file_ends_in(cpp_build: Path) -> None:
    head = struct.pack("<Q", 1000) + b"{}"
    for size in (len(head), 10_000):
        (line,) = cpp_answers(cpp_build, [(head, size)])
        assert line == (
            "weights.safetensors is not a whole weight file (it ends in its header); export the bundle again"
        )


def test_bytes_changed_at_random(cpp_build: Path, tmp_path: Path) -> None:
    rng = Random(5)
    sound = headed(SMALL)
    files: list[tuple[bytes, int]] = []
    while len(files) < 1500:
        text = mutate_bytes(sound[8:], rng)
        # Where the header says more than there is, Python reads what there is: see the test above.
        if b"\\u" not in text:
            files.append((head := struct.pack("<Q", len(text)) + text, len(head) + 26))
    taken = agree(cpp_build, tmp_path / "w", files)
    assert 50 < sum(taken) < 1450
