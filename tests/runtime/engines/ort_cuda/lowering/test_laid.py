"""Weights as kernels want them: numbers, names, and where they come from."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir

from tests.runtime.engines.ort_cuda.lowering.small import small
from tgate_runtime.engines.ort_cuda.lowering.edits import TO_LAST
from tgate_runtime.engines.ort_cuda.lowering.laid import LAID, Laid, in_float32, laid
from tgate_runtime.weights import Weight

GRAPH = "(float[4] x) => (float[4] y) <float[1, 2, 3, 1] w = {1, 2, 3, 4, 5, 6}> { y = Neg(x) }"


def graph_with(weight: ir.TensorProtocol) -> tuple[ir.Graph, ir.Value]:
    """A graph, and an initializer of it."""
    graph = ir.from_proto(onnx.load_model_from_string(small(GRAPH))).graph
    value = ir.Value(
        name=weight.name, const_value=weight, shape=ir.Shape(weight.shape.numpy()), type=ir.TensorType(weight.dtype)
    )
    graph.register_initializer(value)
    return graph, value


def test_a_weight_of_the_file_names_its_source() -> None:
    outside = ir.ExternalTensor(
        "weights", 64, 12, ir.DataType.FLOAT16, shape=ir.Shape([1, 2, 3, 1]), name="conv.weight"
    )
    graph, weight = graph_with(outside)
    last = laid(graph, weight, TO_LAST)
    assert laid(graph, weight, TO_LAST) is last
    assert graph.initializers[str(last.name)] is last
    assert last.meta[LAID] == Laid("conv.weight", TO_LAST)
    made = last.const_value
    assert isinstance(made, ir.ExternalTensor)
    assert (tuple(made.shape), made.location, made.length) == ((1, 3, 1, 2), "weights", 12)
    assert made.offset is not None
    assert made.offset > 1 << 40
    single = in_float32(graph, weight)
    assert single.meta[LAID] == Laid("conv.weight", (), "float32")
    assert isinstance(single.const_value, ir.ExternalTensor)
    assert (single.dtype, single.const_value.length) == (ir.DataType.FLOAT, 24)


def test_a_weight_of_the_graph_is_turned_at_once() -> None:
    array = np.arange(6, dtype=np.float16).reshape(1, 2, 3, 1)
    graph, weight = graph_with(ir.tensor(array, name="w16"))
    turned = laid(graph, weight, TO_LAST).const_value
    assert turned is not None
    np.testing.assert_array_equal(turned.numpy(), array.transpose(TO_LAST))
    single = in_float32(graph, weight)
    assert in_float32(graph, single) is single
    assert single.const_value is not None
    assert single.const_value.numpy().dtype == np.float32


def test_a_weight_is_laid_when_it_is_uploaded() -> None:
    array = np.arange(6, dtype=np.float16).reshape(1, 2, 3, 1)
    weight = Weight("float16", array)
    assert Laid("w").of(weight).array is array
    turned = Laid("w", TO_LAST, "float32").of(weight)
    assert turned.dtype == turned.array.dtype.name == "float32"
    assert turned.array.flags.c_contiguous
    np.testing.assert_array_equal(turned.array, array.transpose(TO_LAST))
