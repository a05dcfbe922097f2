"""Goldens, replayed."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from safetensors.numpy import load_file, save_file

from tests.toy_bundle import Toy, build, edit_manifest
from tgate_engine.bundle import Bundle, digests_of
from tgate_engine.errors import BundleError
from tgate_engine.plan import Plan
from tgate_export.methods.base import Settings
from tgate_runtime import verify as verify_module
from tgate_runtime.session import Session
from tgate_runtime.state import State
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


@pytest.mark.parametrize(
    "toy",
    [
        Toy(),
        Toy(guided=False),
        Toy(carry_dtype="bfloat16"),
        Toy(batches=((2, 3),)),
        Toy(settings={"default": Settings(steps=9, gate=4, self_interval=3, warm_up=0, fidelity_interval=2)}),
    ],
)
def test_a_good_bundle_reproduces_its_goldens(tmp_path: Path, toy: Toy) -> None:
    seen: list[tuple[int, int, str]] = []
    checked = verify(Bundle.open(build(tmp_path / "toy", toy)), on_golden=lambda *args: seen.append(args))
    assert [c.name for c in checked] == ["trajectory", "image"]
    assert all(c.ok for c in checked)
    assert all(0 <= c.error < c.tolerance for c in checked)
    assert seen == [(1, 2, "trajectory"), (2, 2, "image")]


@pytest.mark.parametrize("tensor", ["latents.0", "conditioning.text.positive", "guidance_scale", "latents.3"])
def test_a_golden_that_is_not_finite_proves_nothing(tmp_path: Path, tensor: str) -> None:
    """Neither as what is walked from, nor as what is compared with."""
    bundle = rewritten(build(tmp_path / "toy"), "trajectory", lambda t: t[tensor].fill(np.nan))
    if tensor == "latents.3":
        assert [golden.ok for golden in verify(bundle)] == [False, True]
        return
    with pytest.raises(BundleError, match=r"golden trajectory is malformed \(.* finite"):
        verify(bundle)


def test_every_shape_replays_the_goldens_of_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded for one image; on as few rows as each shape takes, all alike."""
    bundle = Bundle.open(build(tmp_path / "toy", Toy(sizes=((4, 4), (8, 2)), batches=((1, 1), (3, 4)))))
    made: list[tuple[str, int]] = []

    def making(session: Session, plan: Plan, rows: int, *, size: str) -> State:
        made.append((size, rows))
        return State(session, plan, rows, size=size)

    monkeypatch.setattr(verify_module, "State", making)
    checked = verify(bundle)
    assert [c.name for c in checked] == ["trajectory", "image", "trajectory-8x2", "image-8x2"]
    assert all(c.ok for c in checked)
    assert made == [("4x4", 1), ("4x4", 3), ("8x2", 1), ("8x2", 3)]


def test_a_fault_in_one_shape_is_the_bundles(tmp_path: Path) -> None:
    """The graph of one range of batches alone has its blocks' weights the wrong way round."""
    path = build(tmp_path / "toy", Toy(batches=((1, 1), (3, 4))))
    file = path / "full-batch-3-4.onnx"
    model = onnx.load(str(file), load_external_data=False)
    names = {"w.self.0": "w.self.1", "w.self.1": "w.self.0"}
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
    onnx.save(model, str(file))
    digest = digests_of(path)[file.name]
    edit_manifest(path, lambda d: d["files"].update({file.name: {"sha256": digest.sha256, "bytes": digest.bytes}}))
    trajectory, image = verify(Bundle.open(path))
    assert not trajectory.ok
    assert image.ok


def test_an_engine_in_less_than_the_bundles_dtype_is_allowed_its_rounding(tmp_path: Path) -> None:
    """And begins each step with the recorded latents: a fault of a step is not carried on."""
    path = build(tmp_path / "toy")
    bundle = rewritten(path, "trajectory", lambda t: t["latents.4"].__imul__(1.01))
    trajectory, image = verify(bundle, engine="openvino", precision="bf16", threads=1)
    assert trajectory.tolerance == image.tolerance == 0.2
    assert trajectory.ok
    exact = verify(bundle, engine="openvino", precision="f32", threads=1)
    assert [c.tolerance for c in exact] == [1e-5, 0.01]
    assert not exact[0].ok


def test_a_bundle_without_goldens(tmp_path: Path) -> None:
    assert verify(Bundle.open(build(tmp_path / "toy", goldens=False))) == []


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
