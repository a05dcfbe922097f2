"""What run time would refuse is refused when it is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest
from onnx import helper

from tests.runtime.engines.small import outside, save, tensor
from tgate_engine.errors import ExportError
from tgate_engine.graph import GraphSpec
from tgate_export.graph_check import check_written
from tgate_export.graphs import TracedGraph, WeightRef
from tgate_export.weights import Placement

REF = WeightRef(component="unet", key="w", transposed=False, shape=(3,), dtype="float32")


def written(path: Path, operator: str, *, domain: str = "") -> tuple[GraphSpec, TracedGraph]:
    node = helper.make_node(operator, ["x", "unet.w"], ["y"], domain=domain)
    x, y = tensor("x", 1, 3), tensor("y", 1, 3)
    spec = save(path, [node], [x], [y], [outside("unet.w", 64, 12, (3,))], batch=(1, 1), domain=domain)
    model: Any = ir.load(path)
    graph = TracedGraph(
        name="g", role=spec.role, batch=(1, 1), model=model, inputs=(x,), outputs=(y,), weights={"unet.w": REF}
    )
    return spec, graph


def test_a_graph_of_known_operators(tmp_path: Path) -> None:
    spec, graph = written(tmp_path / "g.onnx", "Add")
    check_written(tmp_path / "g.onnx", spec, graph, {REF: Placement("unet.w", 64, 12)})


def test_an_operator_that_is_in_no_list_is_named(tmp_path: Path) -> None:
    spec, graph = written(tmp_path / "g.onnx", "GridSample")
    with pytest.raises(ExportError, match=r"cannot be exported.*: g\.onnx has operator 'GridSample', which no bundle"):
        check_written(tmp_path / "g.onnx", spec, graph, {REF: Placement("unet.w", 64, 12)})


def test_a_weight_that_lies_elsewhere(tmp_path: Path) -> None:
    spec, graph = written(tmp_path / "g.onnx", "Add")
    with pytest.raises(ExportError, match=r"has weight 'unet\.w' of type 1, shape \[3\], at 64 with 12 bytes"):
        check_written(tmp_path / "g.onnx", spec, graph, {REF: Placement("unet.w", 128, 12)})
