"""Goldens, replayed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.toy_bundle import Toy, build, edit_manifest
from tgate_engine.bundle import Bundle, digests_of
from tgate_engine.errors import BundleError
from tgate_runtime.verify import Checked, relative_error, verify

Tensors = dict[str, np.ndarray]


def rewritten(bundle: Path, golden: str, change: Callable[[Tensors], object]) -> Bundle:
    """The bundle with one golden file changed, and listed as it is now."""
    file = bundle / "golden" / f"{golden}.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    digest = digests_of(bundle)[f"golden/{golden}.safetensors"]
    edit_manifest(
        bundle,
        lambda d: d["files"].update({f"golden/{golden}.safetensors": {"sha256": digest.sha256, "bytes": digest.bytes}}),
    )
    return Bundle.open(bundle)


@pytest.mark.parametrize("toy", [Toy(), Toy(guided=False), Toy(carry_dtype="bfloat16")])
def test_a_good_bundle_reproduces_its_goldens(tmp_path: Path, toy: Toy) -> None:
    seen: list[tuple[int, int, str]] = []
    checked = verify(Bundle.open(build(tmp_path / "toy", toy)), on_golden=lambda *args: seen.append(args))
    assert [c.name for c in checked] == ["trajectory", "image"]
    assert all(c.ok for c in checked)
    assert all(0 <= c.error < c.tolerance for c in checked)
    assert seen == [(1, 2, "trajectory"), (2, 2, "image")]


def test_a_wrong_step_in_the_middle_is_seen(tmp_path: Path) -> None:
    bundle = rewritten(build(tmp_path / "toy"), "trajectory", lambda t: t["latents.4"].__imul__(1.01))
    trajectory, image = verify(bundle)
    assert not trajectory.ok
    assert trajectory.error == pytest.approx(0.01, rel=0.05)
    assert image.ok


def test_a_wrong_picture_is_seen(tmp_path: Path) -> None:
    bundle = rewritten(build(tmp_path / "toy"), "image", lambda t: t["output.image"].__iadd__(9))
    assert [c.ok for c in verify(bundle)] == [True, False]


@pytest.mark.parametrize(
    ("golden", "change"),
    [
        ("trajectory", lambda t: t.pop("latents.0")),
        ("trajectory", lambda t: t.pop("latents.3")),
        ("trajectory", lambda t: t.pop("guidance_scale")),
        ("trajectory", lambda t: t.update({"latents.2": np.zeros((1, 2), np.float32)})),
        ("image", lambda t: t.pop("input.latents")),
        ("image", lambda t: t.pop("output.image")),
        ("image", lambda t: t.update({"input.latents": np.zeros((2, 2, 4, 4), np.float32)})),
    ],
)
def test_a_golden_that_cannot_be_replayed(tmp_path: Path, golden: str, change: Callable[[Tensors], object]) -> None:
    with pytest.raises(BundleError, match=f"golden {golden} is malformed") as error:
        verify(rewritten(build(tmp_path / "toy"), golden, change))
    assert "\n" not in str(error.value)


def test_a_golden_of_a_graph_that_is_not_there(tmp_path: Path) -> None:
    path = build(tmp_path / "toy")
    edit_manifest(path, lambda d: d["goldens"]["image"].update(graph="other"))
    with pytest.raises(BundleError, match="names graph 'other'"):
        verify(Bundle.open(path))


def test_relative_error() -> None:
    want = np.array([1.0, -4.0], np.float32)
    assert relative_error(want, want) == 0
    assert relative_error(np.array([1.0, -3.0], np.float32), want) == 0.25
    assert relative_error(np.array([0, 255], np.uint8), np.array([1, 255], np.uint8)) == pytest.approx(1 / 255)
    assert math.isnan(relative_error(np.array([1.0, np.nan]), want))
    assert math.isnan(relative_error(np.array([1.0, np.inf]), want))
    assert relative_error(np.array([0.5]), np.array([0.0])) == 0.5
    assert not Checked(name="x", error=math.nan, tolerance=1.0).ok
