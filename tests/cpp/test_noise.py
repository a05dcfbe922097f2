"""libtgate draws the noise that Python draws, to the last bit."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from tgate_runtime.generators import CONDITIONING, GENERATORS, INITIAL, TORCH_CUDA_LIMIT, in_step, noise

ROOT = Path(__file__).parents[2]
CPP = ROOT / "runtime" / "cpp"


def drawn(cpp_build: Path, generator: str, seed: int, draw: int, count: int) -> NDArray[np.uint32]:
    """The bits of the numbers."""
    arguments = [generator, str(seed), str(draw), str(count)]
    done = subprocess.run([cpp_build / "probe-noise", *arguments], capture_output=True, check=True)
    return np.frombuffer(done.stdout, np.uint32)


def refusal(cpp_build: Path, *arguments: str) -> str:
    done = subprocess.run([cpp_build / "probe-noise", *arguments], capture_output=True, check=False, text=True)
    assert done.returncode == 1
    assert not done.stdout
    return done.stderr.strip()


DRAWS = [
    (0, INITIAL),
    (7, in_step(0)),
    (2**32 + 5, in_step(41)),
    (2**63 - 1, INITIAL),
    (1, CONDITIONING),
    (2**63 - 1, CONDITIONING),
]


@pytest.mark.parametrize(("seed", "draw"), DRAWS)
def test_numpys_numbers(cpp_build: Path, seed: int, draw: int) -> None:
    """Four million a stream: every layer and its wedge thousands of times, the tail a thousand times."""
    want = noise(seed, (4_000_001,), draw=draw)
    assert np.count_nonzero(np.abs(want) > 3.6541528853610088) > 800
    np.testing.assert_array_equal(drawn(cpp_build, "numpy", seed, draw, 4_000_001), want.view(np.uint32))


@pytest.mark.parametrize(("seed", "draw"), [draw for draw in DRAWS if draw[1] != CONDITIONING] + [(3, 2**33 + 1)])
def test_torchs_numbers(cpp_build: Path, seed: int, draw: int) -> None:
    want = noise(seed, (TORCH_CUDA_LIMIT,), draw=draw, generator="torch-cuda")
    np.testing.assert_array_equal(drawn(cpp_build, "torch-cuda", seed, draw, TORCH_CUDA_LIMIT), want.view(np.uint32))


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("count", [0, 1, 2, 7, 255, 256, 257, 1023])
def test_any_count_is_the_beginning_of_the_stream(cpp_build: Path, generator: str, count: int) -> None:
    want = noise(5, (1100,), draw=3, generator=generator)[:count]
    np.testing.assert_array_equal(drawn(cpp_build, generator, 5, 3, count), want.view(np.uint32))


def test_streams_of_many_seeds(cpp_build: Path) -> None:
    """Few numbers of many streams: keys and counters are where they belong, in their low and their high bits."""
    rng = np.random.default_rng(1)
    for seed, draw in zip(rng.integers(0, 2**63, 40).tolist(), rng.integers(0, 2**63, 40).tolist(), strict=True):
        for generator in GENERATORS:
            want = noise(seed, (300,), draw=draw, generator=generator)
            np.testing.assert_array_equal(drawn(cpp_build, generator, seed, draw, 300), want.view(np.uint32))


def test_the_tables_are_those_of_the_page(cpp_build: Path) -> None:
    tables = subprocess.run([cpp_build / "probe-noise", "tables"], capture_output=True, check=True).stdout
    assert len(tables) == 3 * 256 * 4
    assert f"`{hashlib.sha256(tables).hexdigest()}`" in (ROOT / "docs" / "bundle.md").read_text(encoding="utf-8")


def test_the_tables_are_what_their_script_writes() -> None:
    script = CPP / "scripts" / "make_ziggurat.py"
    written = subprocess.run([sys.executable, script], capture_output=True, check=True, text=True).stdout
    assert written == (CPP / "src" / "noise" / "ziggurat.inc").read_text(encoding="utf-8")


def test_what_is_refused_is_refused_in_pythons_words(cpp_build: Path) -> None:
    assert refusal(cpp_build, "torch-cuda", "0", "0", str(TORCH_CUDA_LIMIT + 1)) == (
        "generator torch-cuda draws at most 221184 numbers at once, got 221185: "
        "beyond that PyTorch's noise depends on the GPU; use generator numpy"
    )
    assert refusal(cpp_build, "torch-cuda", "0", str(CONDITIONING), "4") == (
        "generator torch-cuda draws noise of latents and steps, got a conditioning picture's; use generator numpy"
    )
    assert refusal(cpp_build, "numpy", str(2**63), "0", "4") == (
        f"a seed is a whole number from 0 to {2**63 - 1}, got {2**63}"
    )
    for name in ("", "NumPy", "torch"):
        assert refusal(cpp_build, name, "0", "0", "4") == (
            f"there is no generator '{name}'; use one of numpy, torch-cuda"
        )
