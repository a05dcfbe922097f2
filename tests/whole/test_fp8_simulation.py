"""benchmarks/fp8: rounding against ml_dtypes and PyTorch, graphs against NumPy, calibration against the toy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from benchmarks import fp8
from benchmarks.fp8 import LARGEST, Fp8, calibrate, in_fp8, judged, measure, rounded_weight, summary
from benchmarks.quality import draw
from tests.toy_bundle import Toy, build, random_conditioning
from tgate_engine.bundle import Bundle
from tgate_engine.errors import BundleError
from tgate_engine.plan import Plan
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.verify import verify
from tgate_runtime.weights import Weight

Floats = NDArray[np.float32]


def e4m3(values: Floats) -> Floats:
    return np.clip(values, -LARGEST, LARGEST).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)


def graph(weights: dict[str, Floats]) -> bytes:
    """Two layers that read one value, the product of what they give, and a layer of that: ``y`` and ``z``, [2, 3]."""
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["q"]),
        helper.make_node("MatMul", ["x", "b"], ["k"]),
        helper.make_node("Transpose", ["k"], ["kt"], perm=[1, 0]),
        helper.make_node("MatMul", ["q", "kt"], ["y"]),
        helper.make_node("MatMul", ["q", "c"], ["z"]),
    ]
    values = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", "m"]) for name in "xyz"}
    made = helper.make_graph(
        nodes,
        "g",
        [values["x"]],
        [values["y"], values["z"]],
        [numpy_helper.from_array(w, n) for n, w in weights.items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=11).SerializeToString()


def weights_of(seed: int, width: int = 16) -> tuple[dict[str, Floats], dict[str, Weight]]:
    rng = np.random.default_rng(seed)
    arrays = {name: rng.standard_normal((width, width)).astype(np.float32) for name in "abc"}
    return arrays, {name: Weight("float32", array) for name, array in arrays.items()}


def ran(data: bytes, x: Floats) -> list[Any]:
    return ort.InferenceSession(data, providers=["CPUExecutionProvider"]).run(None, {"x": x})


def rounded_in_graph(values: Floats) -> Floats:
    """What a layer of scale 1 and the identity makes of [n, 1] values: their rounding."""
    nodes = [helper.make_node("MatMul", ["x", "one"], ["y"])]
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 1]) for name in "xy")
    one = np.full((1, 1), LARGEST, np.float32)  # of scale 1, as its largest value is E4M3's
    made = helper.make_graph(nodes, "g", [x], [y], [numpy_helper.from_array(one, "one")])
    data = helper.make_model(made, opset_imports=[helper.make_opsetid("", 23)], ir_version=11).SerializeToString()
    simulated = in_fp8(data, {"one": Weight("float32", one)}, {"one": LARGEST})
    return ran(simulated, values[:, None])[0][:, 0] / np.float32(LARGEST)


def test_values_round_as_ml_dtypes_and_pytorch_round_them() -> None:
    """Every number of E4M3, every tie between two, what lies next to both, denormals, and what is too large."""
    numbers = np.arange(127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    ties = (numbers[1:] + numbers[:-1]) / 2
    near = [np.nextafter(np.concatenate([numbers, ties]), np.float32(side)) for side in (-np.inf, np.inf)]
    rng = np.random.default_rng(0)
    others = (rng.standard_normal(100_000) * 10.0 ** rng.uniform(-6, 4, 100_000)).astype(np.float32)
    positive = np.concatenate([numbers, ties, *near, others, np.array([449, 464, 465, 1e9], np.float32)])
    values = np.concatenate([positive, -positive])
    got = rounded_in_graph(values)
    np.testing.assert_array_equal(got, e4m3(values))
    clamped = torch.from_numpy(values).clamp(-LARGEST, LARGEST)
    np.testing.assert_array_equal(got, clamped.to(torch.float8_e4m3fn).to(torch.float32).numpy())
    assert len(np.unique(got)) == 253  # all of both signs, and zero once


def test_a_weight_uses_all_of_the_range() -> None:
    array = np.random.default_rng(1).standard_normal((8, 8)).astype(np.float32)
    codes, scale = rounded_weight(array)
    assert np.abs(codes.astype(np.float32)).max() == LARGEST
    np.testing.assert_allclose(codes.astype(np.float32) * scale, array, rtol=2.0**-4, atol=float(scale) * 2.0**-10)
    zeros, one = rounded_weight(np.zeros((2, 2), np.float32))
    assert one == 1
    assert not zeros.astype(np.float32).any()


def test_layers_are_rounded_and_other_products_are_not() -> None:
    arrays, weights = weights_of(2)
    x = np.random.default_rng(3).standard_normal((5, 16)).astype(np.float32)
    maxima = {"a": 2.0, "b": 2.0, "c": 30.0}  # x is larger than 2 in places, and saturates

    def layer(value: Floats, name: str) -> Floats:
        scale, own = np.float32(maxima[name] / 448), np.float32(np.abs(arrays[name]).max() / 448)
        return (e4m3(value / scale) @ e4m3(arrays[name] / own)) * (scale * own)

    q, k = layer(x, "a"), layer(x, "b")
    assert np.abs(x).max() > 2
    y, z = ran(in_fp8(graph(arrays), weights, maxima), x)
    np.testing.assert_allclose(y, q @ k.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(z, layer(q, "c"), rtol=1e-4, atol=1e-4)
    plain = ran(graph(arrays), x)[0]
    assert np.abs(y - plain).max() > 1e-2 * np.abs(plain).max()


def test_a_layer_that_nobody_has_seen_is_refused() -> None:
    arrays, weights = weights_of(4)
    with pytest.raises(BundleError, match="no golden runs the layer of c"):
        in_fp8(graph(arrays), weights, {"a": 1.0, "b": 1.0})


def test_calibration_sees_what_the_goldens_give(tmp_path: Path) -> None:
    """Two layers of the toy read the conditioning itself, of which the recorded one is known."""
    bundle = Bundle.open(build(tmp_path / "toy", Toy()))
    maxima = calibrate(bundle)
    recorded = random_conditioning(1, guided=True, size=(4, 4))
    for layer, condition in (("pooled", "pooled"), ("time", "time_ids")):
        largest = max(np.abs(values).max() for name, values in recorded.items() if name.startswith(f"{condition}."))
        assert maxima[f"w.{layer}"] == pytest.approx(float(largest))
    assert {"w.out", "w.self.0", "w.cross.0", "w.text.0"} < maxima.keys()
    errors = {golden.name: golden.error for golden in verify(bundle, engine=Fp8(maxima))}
    assert 1e-3 < errors["trajectory"] < 0.5  # 4 bits of mantissa, in place of 24
    assert errors["image"] < 0.01  # the decoder stays as it was


def test_a_bundle_without_goldens_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no goldens to calibrate on"):
        calibrate(Bundle.open(build(tmp_path / "toy", Toy(), goldens=False)))


def test_what_is_lost_is_counted_caption_by_caption() -> None:
    found = summary({"captions": 100, "wrong_float32": [3, 50], "wrong_fp8": [3, 7, 8, 99]})
    assert (found["float32"], found["fp8"], found["lost"]) == (0.98, 0.96, 0.02)
    assert (found["wrong_in_fp8_alone"], found["wrong_in_float32_alone"]) == (3, 1)
    assert found["lost_low"] < 0.02 < found["lost_high"]
    assert not found["within_one_point"]
    grey = np.full((1, 128, 128, 3), 128, np.uint8)
    assert judged(["a red circle"], grey) == [False]


def test_a_measurement_that_was_stopped_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy stands in for a model, and a picture counts as right where its mean is even."""
    bundle = Bundle.open(build(tmp_path / "toy", Toy()))
    monkeypatch.setattr(fp8, "PART", 2)
    monkeypatch.setattr(fp8, "evaluation_captions", lambda count: [f"a dog {'red ' * i}" for i in range(count)])
    monkeypatch.setattr(fp8, "judged", lambda _, pictures: [int(picture.sum()) % 2 == 0 for picture in pictures])
    whole, parts = tmp_path / "whole.json", tmp_path / "parts.json"
    measure(bundle, whole, count=5, seed=1)
    found = json.loads(whole.read_text())
    assert found["beyond"]["layers"] == found["settings"]["linear_layers"]
    assert found["beyond"]["layers_beyond"] > 0  # another request than the golden's
    assert found["beyond"]["most"] > 1
    row = found["rows"]["ungated"]
    assert row["captions"] == 5
    assert 5 < row["psnr"] < 58

    drawn: list[int] = []
    last = 8

    def counted(pipe: Pipeline, plan: Plan, captions: list[str], seed: int, workers: int) -> NDArray[np.uint8]:
        drawn.append(seed)
        if len(drawn) == last:
            raise KeyboardInterrupt
        return draw(pipe, plan, captions, seed, workers)

    monkeypatch.setattr(fp8, "draw", counted)
    with pytest.raises(KeyboardInterrupt):
        measure(bundle, parts, count=5, seed=1)
    assert json.loads(parts.read_text())["rows"]["ungated"]["captions"] == 2
    drawn.clear()
    last = 100
    measure(bundle, parts, count=5, seed=1)
    assert drawn == [3] * 4 + [5] * 4  # both plans, both ways
    assert json.loads(parts.read_text()) == json.loads(whole.read_text())
