"""Shapes: known for every value, and constant where a graph computes them anew in each step."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from tgate_runtime.engines.ort_cuda.lowering.edits import constant, number, replace, sizes

_BATCHES = (7919, 104729)
"""Two sizes of a batch, which no other dimension has by chance: what differs between them depends on the batch."""
_OF_SHAPES = ("Add", "Cast", "Concat", "Div", "Gather", "Mul", "Reshape", "Slice", "Squeeze", "Sub", "Unsqueeze")
_MOST_ELEMENTS = 64  # of what is worked out here: shapes have at most eight
_Types = Mapping[str, tuple[int, tuple[int, ...]]]
"""Dtype and shape of the values whose shape is known, by their names."""


def know_shapes(graph: ir.Graph, model: onnx.ModelProto) -> None:
    """Give the values of ``graph``, which is ``model``'s, dtypes and shapes: numbers, and names for dimensions that
    depend on the batch. Dimensions of one name are equal, whatever the batch."""
    first, second = (_types(model, batch) for batch in _BATCHES)
    for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
        dtype, dims = first.get(str(value.name), (0, ()))
        _, others = second.get(str(value.name), (0, ()))
        value.shape = None  # what a file says of its outputs is not found out here
        if not dtype or len(dims) != len(others):
            continue
        value.type = ir.TensorType(ir.DataType(dtype))
        value.shape = ir.Shape([a if a == b else f"{a}|{b}" for a, b in zip(dims, others, strict=True)])


def _types(model: onnx.ModelProto, batch: int) -> _Types:
    """Those for a batch of that size. What computes shapes is computed, until no more is found out by it."""
    sized = onnx.ModelProto()
    sized.CopyFrom(model)
    for value in sized.graph.input:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param:
                dim.dim_value = batch
    for value in sized.graph.output:
        value.type.tensor_type.ClearField("shape")
    for node in sized.graph.node:
        if node.op_type == "GroupNormalization":  # ONNX infers no shape for it
            node.CopyFrom(onnx.helper.make_node("Identity", node.input[:1], node.output))
    while True:
        graph = onnx.shape_inference.infer_shapes(sized, data_prop=True).graph
        types = {
            value.name: (form.elem_type, tuple(dim.dim_value for dim in form.shape.dim))
            for value in (*graph.input, *graph.value_info, *graph.output)
            if (form := value.type.tensor_type).HasField("shape")
            and all(dim.HasField("dim_value") for dim in form.shape.dim)
        }
        if not _compute(sized.graph, types):
            return types | {t.name: (t.data_type, tuple(t.dims)) for t in sized.graph.initializer}


def _compute(graph: onnx.GraphProto, types: _Types) -> bool:
    """Make constants of the whole numbers that follow from shapes and constants; whether there were any."""
    known: dict[str, NDArray[Any]] = {
        tensor.name: numpy_helper.to_array(tensor)
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.INT64
        and tensor.data_location != TensorProto.EXTERNAL
        and np.prod(tensor.dims) <= _MOST_ELEMENTS
    }
    left, found = [], []
    for node in graph.node:
        result = _whole_numbers(node, known, types)
        if result is None:
            left.append(node)
        else:
            known[node.output[0]] = result
            found.append(numpy_helper.from_array(result, node.output[0]))
    if found:
        kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in left]
        del graph.node[:]
        graph.node.extend(kept)
        graph.initializer.extend(found)
    return bool(found)


def _whole_numbers(node: onnx.NodeProto, known: Mapping[str, NDArray[Any]], types: _Types) -> NDArray[Any] | None:
    if node.op_type == "Shape" and node.input[0] in types:
        at = {attribute.name: attribute.i for attribute in node.attribute}
        return np.array(types[node.input[0]][1][at.get("start", 0) : at.get("end")], np.int64)
    if node.op_type not in _OF_SHAPES or not node.input or any(name and name not in known for name in node.input):
        return None
    outputs: Any = ReferenceEvaluator(node).run(None, {name: known[name] for name in node.input if name})
    result = np.asarray(outputs[0])
    return result if result.dtype == np.int64 and result.size <= _MOST_ELEMENTS else None


def fix_shapes(graph: ir.Graph) -> int:
    """Make shapes that a graph computes in every step constant; how many changed.

    A Reshape leaves one dimension to be found, the one that depends on the batch; an Expand to the shape that its
    input has goes. With them go the nodes that computed shapes, whose whole numbers would lie on the host.
    """
    changed = 0
    for node in list(graph):
        if node.domain or node.op_type not in ("Reshape", "Expand") or constant(node.inputs[1]) is not None:
            continue
        source, result = node.inputs[0], node.outputs[0]
        shape = None if result.shape is None else sizes(result, len(result.shape))
        if not shape or source is None:
            continue
        if node.op_type == "Expand":
            if sizes(source, len(shape)) == shape and not result.is_graph_output():
                replace(graph, result, source, [node])
                changed += 1
        elif sum(not isinstance(dim, int) for dim in shape) <= 1:
            dims = [dim if isinstance(dim, int) else -1 for dim in shape]
            node.replace_input_with(1, number(graph, f"lowered.shape.{dims}", np.array(dims, np.int64)))
            node.attributes.pop("allowzero", None)
            changed += 1
    return changed
