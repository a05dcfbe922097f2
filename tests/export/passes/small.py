"""Small ONNX models, written as text, and what two engines make of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx.parser
import onnx.reference
import onnx.shape_inference
import onnx_ir as ir
import onnxruntime as ort

from tgate_export.graphs import OPSET

Array = npt.NDArray[np.float32]


def model(graph: str) -> ir.Model:
    """A graph in ONNX's textual syntax as a model, the shapes of its inner values filled in."""
    proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": {OPSET}]> small {graph}')
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto))


def shape(value: ir.Value) -> list[int | str | None]:
    """Its dimensions, as far as the model states them; symbolic ones by name."""
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape or ()]


def operators(small: ir.Model) -> list[str]:
    """Its operators, in order."""
    return [node.op_type for node in small.graph]


def noise(**shapes: tuple[int, ...]) -> dict[str, Array]:
    """Normal numbers for inputs of these shapes, the same every time."""
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def by_reference(small: ir.Model, inputs: Mapping[str, Array]) -> Array:
    """Its first output, from the evaluator that comes with ONNX."""
    outputs: Any = onnx.reference.ReferenceEvaluator(ir.to_proto(small)).run(None, dict(inputs))
    return np.asarray(outputs[0])


def by_runtime(small: ir.Model, inputs: Mapping[str, Array]) -> Array:
    """Its first output, from ONNX Runtime, which rewrites nothing itself and checks the shapes that a graph states."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.to_proto(small).SerializeToString()
    session = ort.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, dict(inputs))[0])
