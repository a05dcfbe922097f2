"""TensorRT's builder: what parses, what an engine holds, what its flags are. Engines are built here, none is run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from tests.runtime.engines.small import WEIGHTS, Small, outside, random_inputs, save, tensor
from tgate_engine.dtypes import storage
from tgate_engine.errors import EngineError
from tgate_engine.graph import BATCH, Dim, GraphSpec
from tgate_runtime.engines.protocol import EngineOptions

pytest.importorskip("polygraphy")
trt: Any = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX builds without a GPU, TensorRT does not")

from tgate_runtime.engines.tensorrt.build import (  # noqa: E402
    RTX,
    Log,
    build_engine,
    capability,
    flags,
    log,
    polygraphy,
    read_model,
    weight_spans,
    without_weights,
)

pytestmark = [
    pytest.mark.skipif(not RTX, reason="TensorRT is installed, which builds on the GPU at hand alone"),
    pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX"),  # Polygraphy sets a timing cache
]
SHARED = EngineOptions(memory="shared")


def attention(
    path: Path, dtype: str, rows: Dim = 2, *, causal: bool = False, batch: tuple[int, int] = (1, 1)
) -> GraphSpec:
    shape: tuple[Dim, ...] = (rows, 2, 16, 8)
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], is_causal=int(causal))
    inputs = [tensor(name, *shape, dtype=dtype) for name in "qkv"]
    return save(path, [node], inputs, [tensor("y", *shape, dtype=dtype)], batch=batch)


def weighted(path: Path, node: Any, shape: Sequence[Dim], weights: Mapping[str, tuple[int, ...]]) -> GraphSpec:
    """A graph y = node(x, ...); its weights lie in a file that is not there."""
    places = [outside(name, 64 + 4096 * i, 4 * int(np.prod(own)), own) for i, (name, own) in enumerate(weights.items())]
    return save(path, [node], [tensor("x", *shape)], [tensor("y", *shape)], places, batch=(1, 1))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_attention_builds_in_every_dtype(tmp_path: Path, dtype: str) -> None:
    """The parser marks attention as one kernel or nothing, and in float32 there is no such kernel."""
    assert build_engine(tmp_path / "a.onnx", attention(tmp_path / "a.onnx", dtype), SHARED)


def test_causal_attention_builds(tmp_path: Path) -> None:
    assert build_engine(tmp_path / "a.onnx", attention(tmp_path / "a.onnx", "float32", causal=True), SHARED)


@pytest.mark.parametrize("batch", [(1, 4), (4, 4)])
def test_a_dynamic_batch_has_its_own_profile(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, batch: tuple[int, int]
) -> None:
    """Where a profile lacks an input, Polygraphy warns, and takes 1 for every size that varies."""
    spec = attention(tmp_path / "a.onnx", "float16", BATCH, batch=batch)
    assert build_engine(tmp_path / "a.onnx", spec, SHARED)
    assert "No shapes provided" not in caplog.text


def test_an_engine_is_built_without_its_weights(tmp_path: Path) -> None:
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], pads=[1, 1, 1, 1])
    spec = weighted(tmp_path / "c.onnx", node, (1, 8, 16, 16), {"w": (8, 8, 3, 3), "b": (8,)})
    assert not (tmp_path / WEIGHTS).exists()
    assert build_engine(tmp_path / "c.onnx", spec, SHARED)
    assert weight_spans(read_model(tmp_path / "c.onnx")) == {"w": (64, 8 * 8 * 9 * 4), "b": (64 + 4096, 32)}


@pytest.mark.parametrize("name", ["full", "reuse"])
def test_weights_as_inputs_are_the_same_computation(small: Small, name: str) -> None:
    """In ONNX Runtime, fed from the spans of the weight file."""
    ort = pytest.importorskip("onnxruntime")
    spec = small.graphs[name]
    model = read_model(small.bundle.file(spec.file))
    stored = small.bundle.file(WEIGHTS).read_bytes()
    spans = weight_spans(model)
    session = ort.InferenceSession(without_weights(model))
    shapes = {each.name: each.shape for each in session.get_inputs()}
    assert shapes.keys() == {*spec.input_names(), *spans}
    weights = {
        each: np.frombuffer(stored, storage("float32"), length // 4, offset).reshape(shapes[each])
        for each, (offset, length) in spans.items()
    }
    inputs = random_inputs(spec, 2)
    want = small.expected(name, inputs)
    for output, got in zip(spec.output_names(), session.run(list(spec.output_names()), inputs | weights), strict=True):
        np.testing.assert_allclose(got, want[output], rtol=1e-4, atol=1e-5)


def test_the_plan_of_a_large_matrix_is_small(tmp_path: Path) -> None:
    wide = 2048
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    spec = weighted(tmp_path / "m.onnx", node, (1, 64, wide), {"w": (wide, wide)})
    assert len(build_engine(tmp_path / "m.onnx", spec, SHARED)) < wide * wide * 4 / 100


def test_what_does_not_parse_is_named_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    node = helper.make_node("NoSuchOp", ["x"], ["y"])
    spec = save(tmp_path / "n.onnx", [node], [tensor("x", 1, 3)], [tensor("y", 1, 3)], batch=(1, 1))
    with pytest.raises(EngineError, match=r"cannot build n\.onnx: .*NoSuchOp") as caught:
        build_engine(tmp_path / "n.onnx", spec, SHARED)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_complaint_is_taken_once() -> None:
    log.clear()
    assert isinstance(log, Log)
    assert log.take("the reason") == "the reason"


@pytest.mark.parametrize("memory", ["shared", "fast"])
def test_the_builder_is_set_as_the_key_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str) -> None:
    options = EngineOptions(memory=memory)
    settings: dict[str, bool] = {}

    def built(_network: Any, config: Any) -> bytes:
        settings.update({flag: config.get_flag(getattr(trt.BuilderFlag, flag)) for flag in flags(options)})
        return b""

    monkeypatch.setattr(polygraphy, "engine_bytes_from_network", built)
    build_engine(tmp_path / "a.onnx", attention(tmp_path / "a.onnx", "float32"), options)
    assert settings == flags(options)
    assert settings["STRIP_PLAN"] == (memory == "fast")
    assert not settings["TF32"]


def test_capabilities_by_name() -> None:
    assert capability("sm_120") == (12, 0)
    for unknown in ("sm_90", "ada"):
        with pytest.raises(EngineError, match=rf"builds for sm_75, .*got '{unknown}'"):
            capability(unknown)
