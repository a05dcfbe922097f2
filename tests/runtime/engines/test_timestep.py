"""The timestep reaches the network's first product as float32, whatever the network is computed in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import openvino as ov
import pytest
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from tests.processor import needs_bfloat16
from tests.runtime.engines.small import save, tensor
from tgate_engine.graph import BATCH, GraphSpec
from tgate_engine.step import GUIDANCE, STEP, STEP_ROW, TIMESTEP
from tgate_runtime.engines import openvino
from tgate_runtime.engines.openvino import OpenVino
from tgate_runtime.engines.openvino.timestep import part_name, split_time
from tgate_runtime.engines.protocol import EngineOptions

FREQUENCY = 0.5


def embedded_time(path: Path, column: int = TIMESTEP) -> GraphSpec:
    """``output = cos(timestep * frequency) @ weight``."""
    nodes = [
        helper.make_node("Gather", [STEP, "column"], ["time"], axis=1),
        helper.make_node("Mul", ["time", "frequency"], ["angle"]),
        helper.make_node("Cos", ["angle"], ["waves"]),
        helper.make_node("MatMul", ["waves", "weight"], ["output"]),
    ]
    numbers = {"frequency": np.array(FREQUENCY, np.float32), "weight": np.ones((1, 4), np.float32)}
    values = {"column": np.array([column]), **numbers}
    initializers = [numpy_helper.from_array(array, name) for name, array in values.items()]
    return save(path, nodes, [tensor(STEP, BATCH, STEP_ROW)], [tensor("output", BATCH, 4)], initializers)


def answers(path: Path, spec: GraphSpec, timesteps: list[float]) -> NDArray[Any]:
    engine = OpenVino(EngineOptions(threads=1, precision="bf16"))
    step, output = (
        engine.allocate((len(timesteps), STEP_ROW), "float32"),
        engine.allocate((len(timesteps), 4), "float32"),
    )
    step.array[:, TIMESTEP] = timesteps
    engine.load_graph(path, spec).bind({STEP: step}, {"output": output})()
    return output.read()[:, 0]


@needs_bfloat16
def test_801_is_not_800(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """800 is the nearest bfloat16 of both."""
    spec = embedded_time(tmp_path / "g.onnx")
    timesteps = [801.0, 800.0, 3.0]
    want = np.cos(np.array(timesteps) * FREQUENCY)
    np.testing.assert_allclose(answers(tmp_path / "g.onnx", spec, timesteps), want, atol=0.01)
    monkeypatch.setattr(openvino, "split_time", lambda _: None)  # this test can fail
    whole = answers(tmp_path / "g.onnx", spec, timesteps)
    assert whole[0] == whole[1]


def read(path: Path) -> Any:
    return ov.Core().read_model(str(path))


def test_the_part_ends_before_the_first_product(tmp_path: Path) -> None:
    embedded_time(tmp_path / "g.onnx")
    model = read(tmp_path / "g.onnx")
    part = split_time(model)
    assert [port.any_name for port in part.inputs] == [STEP]
    assert [port.any_name for port in part.outputs] == [part_name(0)]
    assert part_name(0) in [port.any_name for port in model.inputs]
    assert "Cos" not in [node.get_type_name() for node in model.get_ordered_ops()]
    assert "MatMul" not in [node.get_type_name() for node in part.get_ordered_ops()]


def test_a_graph_without_a_timestep_is_left_whole(tmp_path: Path) -> None:
    embedded_time(tmp_path / "guidance.onnx", GUIDANCE)
    node = helper.make_node("Neg", ["x"], ["y"])
    save(tmp_path / "text.onnx", [node], [tensor("x", BATCH, 3)], [tensor("y", BATCH, 3)])
    for name in ("guidance.onnx", "text.onnx"):
        model = read(tmp_path / name)
        before = len(model.get_ordered_ops())
        assert split_time(model) is None
        assert len(model.get_ordered_ops()) == before
