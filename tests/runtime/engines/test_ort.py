"""ONNX Runtime on the CPU: what is its own beside what test_every_engine.py sees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx import helper

from tests.runtime.engines.small import WEIGHTS, Small, cancelled_and_called_again, one_node, save, tensor
from tgate_engine.dtypes import decode, encode
from tgate_engine.errors import EngineError
from tgate_engine.graph import BATCH, GraphSpec
from tgate_runtime.engines.ort import OrtCpu, OrtExecutable
from tgate_runtime.engines.protocol import EngineOptions


@pytest.fixture
def engine() -> OrtCpu:
    return OrtCpu(EngineOptions(threads=1))


def test_a_precision_is_refused() -> None:
    with pytest.raises(EngineError, match="computes in the dtype that the bundle was exported with"):
        OrtCpu(EngineOptions(precision="bf16"))


def test_options_are_settled() -> None:
    assert OrtCpu(EngineOptions()).options == EngineOptions(memory="fast")
    assert OrtCpu(EngineOptions(threads=2, memory="shared")).options == EngineOptions(threads=2, memory="shared")


def test_nothing_is_compiled_ahead_of_time(engine: OrtCpu, small: Small) -> None:
    assert engine.build(small.bundle, tuple(small.graphs.values())) == {}


def test_bfloat16_travels_as_bits(engine: OrtCpu, tmp_path: Path) -> None:
    spec = one_node(tmp_path / "g.onnx", "Identity", "bfloat16")
    x, y = engine.allocate((1, 3), "bfloat16"), engine.allocate((1, 3), "bfloat16")
    x.write(encode(np.array([[1.5, -2.0, 0.25]]), "bfloat16"))
    engine.load_graph((tmp_path / "g.onnx").read_bytes(), tmp_path, spec).bind({"x": x}, {"y": y})()
    assert decode(y.read(), "bfloat16").tolist() == [[1.5, -2.0, 0.25]]


def test_a_graph_that_the_engine_cannot_run(engine: OrtCpu, tmp_path: Path) -> None:
    spec = one_node(tmp_path / "g.onnx", "Tanh", "bfloat16")
    with pytest.raises(EngineError) as error:
        engine.load_graph((tmp_path / "g.onnx").read_bytes(), tmp_path, spec)
    assert "cannot load g.onnx on the CPU" in str(error.value)
    assert "--dtype fp32" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_call_that_fails_says_so_in_one_line(engine: OrtCpu, tmp_path: Path) -> None:
    """An index that is out of range is seen when the graph runs, no earlier."""
    node = helper.make_node("GatherND", ["x", "i"], ["y"], batch_dims=1)
    inputs = [tensor("x", BATCH, 3), tensor("i", BATCH, 1, dtype="int64")]
    spec = save(tmp_path / "g.onnx", [node], inputs, [tensor("y", BATCH)])
    x, i, y = (
        engine.allocate(shape, dtype) for shape, dtype in (((2, 3), "float32"), ((2, 1), "int64"), ((2,), "float32"))
    )
    call = engine.load_graph((tmp_path / "g.onnx").read_bytes(), tmp_path, spec).bind({"x": x, "i": i}, {"y": y})
    call()
    i.write(np.array([[3], [0]]))
    with pytest.raises(EngineError, match=r"graph g\.onnx failed in ONNX Runtime: .*index") as error:
        call()
    assert "\n" not in str(error.value)
    assert ".cc" not in str(error.value)


def test_weights_are_mapped_from_the_one_file(small: Small) -> None:
    """Given the graph's bytes and the folder, the engine maps the weights; a map shows where it keeps no copy."""
    engine = OrtCpu(EngineOptions(threads=1, memory="shared"))
    session = engine.load(small.bundle, [small.graphs["full"]])
    assert str(small.bundle.file(WEIGHTS)) in Path("/proc/self/maps").read_text()
    del session


def test_a_call_is_cancelled_from_another_thread(engine: OrtCpu, tmp_path: Path) -> None:
    def load(path: Path, spec: GraphSpec) -> OrtExecutable:
        return engine.load_graph(path.read_bytes(), path.parent, spec)

    cancelled_and_called_again(engine, load, tmp_path)
