"""Graphs of a few lines in ONNX's textual syntax, rewritten, and what ONNX Runtime's CPU makes of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime as ort
from onnx import TensorProto, numpy_helper
from onnx_ir.passes.common import RemoveUnusedNodesPass

from tests.runtime.engines.ort_cuda.plain import in_plain_operators
from tgate_runtime.engines.ort_cuda.lowering import lower
from tgate_runtime.engines.ort_cuda.lowering.shapes import know_shapes

Array = npt.NDArray[Any]
Edits = tuple[tuple[str, str], ...]
"""What to change in a graph's text: old, new."""


def small(text: str, edits: Edits = (), *, half: bool = False) -> bytes:
    """The file of a graph, its text changed first; with ``half``, float16 wherever it says float."""
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 23]> small {text}')
    for tensor in model.graph.initializer if half else ():
        if tensor.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(tensor).astype(np.float16)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    for value in (*model.graph.input, *model.graph.output) if half else ():
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def operators(data: bytes) -> list[str]:
    """Its operators, in order."""
    return [node.op_type for node in onnx.load_model_from_string(data).graph.node]


def numbers(data: bytes, seed: int = 0, batch: int = 3) -> dict[str, Array]:
    """Random numbers for its inputs."""
    rng = np.random.default_rng(seed)
    inputs = {}
    for value in onnx.load_model_from_string(data).graph.input:
        form = value.type.tensor_type
        shape = [dim.dim_value or batch for dim in form.shape.dim]
        inputs[value.name] = rng.standard_normal(shape).astype(ir.DataType(form.elem_type).numpy())
    return inputs


def results(data: bytes, inputs: Mapping[str, Array]) -> dict[str, Array]:
    """Its outputs by name, from ONNX Runtime on the CPU, which rewrites nothing itself."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(in_plain_operators(data), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(inputs)), strict=True))


def lowered(data: bytes, tolerance: float = 1e-5) -> list[str]:
    """The operators of a graph that is lowered whole, which gives the same numbers, by the same names and shapes."""
    return _same(data, lower(data).data, tolerance)


def rewritten(data: bytes, rewrite: Callable[[ir.Graph], int], tolerance: float = 1e-5) -> list[str]:
    """The same of one rewrite alone, which says whether it changed anything."""
    proto = onnx.load_model_from_string(data)
    model = ir.from_proto(proto)
    know_shapes(model.graph, proto)
    before = ir.to_proto(model).SerializeToString()
    changed = rewrite(model.graph)
    assert bool(changed) == (ir.to_proto(model).SerializeToString() != before)
    RemoveUnusedNodesPass()(model)
    model.graph.opset_imports["com.microsoft"] = 1
    after = ir.to_proto(model)
    del after.graph.value_info[:]
    for ours, theirs in ((after.graph.input, proto.graph.input), (after.graph.output, proto.graph.output)):
        for value, as_it_was in zip(ours, theirs, strict=True):
            value.type.CopyFrom(as_it_was.type)
    return _same(data, bytes(after.SerializeToString()), tolerance)


def _same(before: bytes, after: bytes, tolerance: float) -> list[str]:
    for batch in (1, 3):
        inputs = numbers(before, batch=batch)
        want, got = results(before, inputs), results(after, inputs)
        assert list(got) == list(want)
        for name, array in want.items():
            assert (got[name].dtype, got[name].shape) == (array.dtype, array.shape)
            assert np.abs(got[name] - array).max() <= tolerance * np.abs(array).max(), name
    return operators(after)
