"""ONNX Runtime behind the backend protocol."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper

from tests.toy_bundle import ONNX_TYPE, build
from tgate_engine.bundle import Bundle
from tgate_engine.errors import EngineError
from tgate_engine.manifest import GraphSpec, Macs, TensorSpec
from tgate_runtime.backends import ENGINES, EngineOptions, backend
from tgate_runtime.backends.host import CpuBuffer
from tgate_runtime.backends.ort import OrtCpu
from tgate_runtime.dtypes import decode, encode


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(build(tmp_path_factory.mktemp("ort") / "toy"))


def one_node(path: Path, op: str, dtype: str, domain: str = "") -> GraphSpec:
    """A graph y = op(x) over [batch, 3] of ``dtype``."""
    kind = ONNX_TYPE[dtype]
    graph = helper.make_graph(
        [helper.make_node(op, ["x"], ["y"], domain=domain)],
        "g",
        [helper.make_tensor_value_info("x", kind, ["batch", 3])],
        [helper.make_tensor_value_info("y", kind, ["batch", 3])],
    )
    opsets = [helper.make_opsetid("", 21), *([helper.make_opsetid(domain, 1)] if domain else [])]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
    tensors = [TensorSpec(name=name, dtype=dtype, shape=("batch", 3)) for name in ("x", "y")]
    return GraphSpec(file=path.name, inputs=(tensors[0],), outputs=(tensors[1],), macs=Macs(paper=0, all=0))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64", "uint8"])
@pytest.mark.parametrize("shape", [(1,), (3, 5), ()])
def test_buffers_are_aligned_zeroed_and_fixed(dtype: str, shape: tuple[int, ...]) -> None:
    buffer = OrtCpu(EngineOptions()).allocate(shape, dtype)
    assert (buffer.shape, buffer.dtype) == (shape, dtype)
    assert buffer.address % 64 == 0
    assert not buffer.read().any()
    values = np.ones(shape, buffer.array.dtype)
    buffer.write(values)
    np.testing.assert_array_equal(buffer.array, values)
    copy = buffer.read()
    copy[...] = 0
    np.testing.assert_array_equal(buffer.array, values)
    assert buffer.address == buffer.array.ctypes.data


def test_a_buffer_takes_only_what_fits() -> None:
    buffer = CpuBuffer((2, 3), "bfloat16")
    with pytest.raises(EngineError, match="bfloat16 takes uint16 arrays, got float32"):
        buffer.write(np.zeros((2, 3), np.float32))
    with pytest.raises(EngineError, match=r"shape \(2, 3\) takes no array of shape \(2, 4\)"):
        buffer.write(np.zeros((2, 4), np.uint16))


def test_engines_by_name() -> None:
    assert backend("ort-cpu", threads=2).options.threads == 2
    assert list(ENGINES) == ["ort-cpu", "ort-cuda", "openvino", "aoti", "tensorrt"]
    with pytest.raises(EngineError, match="there is no engine 'abacus'; the engines are ort-cpu"):
        backend("abacus")
    with pytest.raises(EngineError, match=r"threads must be .* at least 1 and .*, got 0"):
        backend("ort-cpu", threads=0)


def test_an_engine_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "tgate_runtime.backends.ort")
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(EngineError, match=r"pip install 'tgate-engine\[cpu\]'"):
        backend("ort-cpu")


def test_a_call_reads_and_writes_in_place(tmp_path: Path) -> None:
    spec = one_node(tmp_path / "g.onnx", "Neg", "float32")
    engine = OrtCpu(EngineOptions(threads=1))
    graph = engine.load_graph(tmp_path / "g.onnx", spec)
    x, y = engine.allocate((2, 3), "float32"), engine.allocate((2, 3), "float32")
    call = graph.bind({"x": x}, {"y": y})
    assert dict(call.addresses) == {"x": x.address, "y": y.address}
    for value in (1.0, 2.0):
        x.array[:] = value
        call()
        assert (y.array == -value).all()


def test_bfloat16_travels_as_bits(tmp_path: Path) -> None:
    spec = one_node(tmp_path / "g.onnx", "Identity", "bfloat16")
    engine = OrtCpu(EngineOptions(threads=1))
    x, y = engine.allocate((1, 3), "bfloat16"), engine.allocate((1, 3), "bfloat16")
    x.write(encode(np.array([[1.5, -2.0, 0.25]]), "bfloat16"))
    engine.load_graph(tmp_path / "g.onnx", spec).bind({"x": x}, {"y": y})()
    assert decode(y.read(), "bfloat16").tolist() == [[1.5, -2.0, 0.25]]


def test_a_graph_that_the_engine_cannot_run(tmp_path: Path) -> None:
    spec = one_node(tmp_path / "g.onnx", "Tanh", "bfloat16")
    with pytest.raises(EngineError) as error:
        OrtCpu(EngineOptions()).load_graph(tmp_path / "g.onnx", spec)
    assert "cannot load g.onnx on the CPU" in str(error.value)
    assert "--dtype fp32" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x00" * 100])
def test_a_file_that_is_no_graph(tmp_path: Path, content: bytes) -> None:
    spec = one_node(tmp_path / "g.onnx", "Tanh", "float32")
    (tmp_path / "g.onnx").write_bytes(content)
    with pytest.raises(EngineError, match=r"g\.onnx"):
        OrtCpu(EngineOptions()).load_graph(tmp_path / "g.onnx", spec)


def test_a_graph_that_is_not_what_its_manifest_says(tmp_path: Path) -> None:
    spec = one_node(tmp_path / "g.onnx", "Tanh", "float32")
    renamed = replace(spec, inputs=(replace(spec.inputs[0], name="z"),))
    with pytest.raises(EngineError, match=r"does not have the inputs its manifest says: x .*, z "):
        OrtCpu(EngineOptions()).load_graph(tmp_path / "g.onnx", renamed)
    retyped = replace(spec, outputs=(replace(spec.outputs[0], dtype="float16"),))
    with pytest.raises(EngineError, match="does not have the outputs its manifest says"):
        OrtCpu(EngineOptions()).load_graph(tmp_path / "g.onnx", retyped)


def bind_faults(buffers: dict[str, Any]) -> Iterator[tuple[dict[str, Any], dict[str, Any], str]]:
    yield {}, {"y": buffers["y"]}, "inputs missing or not known: x"
    yield {"x": buffers["x"], "w": buffers["x"]}, {}, "inputs missing or not known: w"
    yield {"x": buffers["x"]}, {}, "bind at least one of its outputs"
    yield {"x": buffers["x"]}, {"w": buffers["x"]}, "has no output w"
    yield {"x": buffers["half"]}, {"y": buffers["y"]}, "x is float32, got a buffer of float16"


def test_buffers_that_do_not_fit_the_graph(tmp_path: Path) -> None:
    spec = one_node(tmp_path / "g.onnx", "Tanh", "float32")
    engine = OrtCpu(EngineOptions(threads=1))
    graph = engine.load_graph(tmp_path / "g.onnx", spec)
    kinds = {"x": "float32", "y": "float32", "half": "float16"}
    buffers = {name: engine.allocate((1, 3), dtype) for name, dtype in kinds.items()}
    for inputs, outputs, says in bind_faults(buffers):
        with pytest.raises(EngineError, match=says):
            graph.bind(inputs, outputs)


def test_a_call_that_fails_says_so_in_one_line(tmp_path: Path) -> None:
    spec = one_node(tmp_path / "g.onnx", "Tanh", "float32")
    engine = OrtCpu(EngineOptions(threads=1))
    call = engine.load_graph(tmp_path / "g.onnx", spec).bind(
        {"x": engine.allocate((2, 3), "float32")}, {"y": engine.allocate((4, 3), "float32")}
    )
    with pytest.raises(EngineError, match=r"graph g\.onnx failed in ONNX Runtime: .*shape") as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_plain_dtypes_go_there_and_back(dtype: str) -> None:
    values = np.array([[0.5, -1.25], [3.0, 0.0]], np.float32)
    assert decode(encode(values, dtype), dtype).tolist() == values.tolist()


def test_bfloat16_rounds_to_the_nearest_even() -> None:
    import ml_dtypes

    rng = np.random.default_rng(0)
    values = np.concatenate(
        [
            rng.standard_normal(5000).astype(np.float32) * np.float32(10) ** rng.integers(-30, 30, 5000),
            np.array([0.0, -0.0, 1.00390625, 1.01171875, np.inf, -np.inf, 3.4e38], np.float32),
        ]
    ).astype(np.float32)
    want = values.astype(ml_dtypes.bfloat16).view(np.uint16)
    np.testing.assert_array_equal(encode(values, "bfloat16"), want)
    assert np.isnan(decode(encode(np.array([np.nan]), "bfloat16"), "bfloat16")).all()


def test_onnx_types_agree_with_onnx() -> None:
    from tgate_runtime.backends.ort import ELEMENT_TYPE

    assert {name: TensorProto.DataType.Name(kind) for name, kind in ELEMENT_TYPE.items()} == {
        "float32": "FLOAT",
        "uint8": "UINT8",
        "int64": "INT64",
        "float16": "FLOAT16",
        "bfloat16": "BFLOAT16",
    }


def test_weights_are_mapped_from_the_one_file(bundle: Bundle) -> None:
    """Loading by path lets the engine map the weights; a map shows where it keeps no copy of its own."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")
    path = bundle.file(bundle.manifest.graphs["text"].file)
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    maps = Path("/proc/self/maps").read_text()
    assert str(bundle.file(bundle.manifest.weights)) in maps
    del session
