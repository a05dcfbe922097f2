"""Shapes are known whatever the batch, and what computes them in each step goes."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from tests.runtime.engines.ort_cuda.lowering.small import lowered, rewritten, small
from tgate_runtime.engines.ort_cuda.lowering.edits import sizes
from tgate_runtime.engines.ort_cuda.lowering.shapes import fix_shapes, know_shapes

# As tracing writes both halves of guidance, when the batch may vary.
HALVES = """(float[n, 2, 12] x, float[n] t) => (float[m, 4, 6] y, float[k] u)
    <int64[1] zero = {0}, int64 two = {2}, int64[1] minus = {-1}, int64[2] rest = {4, 6}>
    {
        s = Shape<start = 0, end = 1>(x)  b = Squeeze(s)  d = Mul(two, b)  e = Reshape(d, minus)
        v = Concat<axis = 0>(x, x)  shape = Concat<axis = 0>(e, rest)  y = Reshape<allowzero = 1>(v, shape)
        w = Concat<axis = 0>(t, t)  z = Expand(w, e)  u = Neg(z)
    }"""


def test_shapes_of_a_batch_that_may_vary_are_known() -> None:
    proto = onnx.load_model_from_string(small(HALVES))
    model = ir.from_proto(proto)
    know_shapes(model.graph, proto)
    values = {str(value.name): value for node in model.graph for value in node.outputs}
    (batch, *rest), (doubled, *others) = sizes(model.graph.inputs[0], 3), sizes(values["y"], 3)
    assert (rest, others) == ([2, 12], [4, 6])
    assert isinstance(batch, str)
    assert isinstance(doubled, str)
    assert batch != doubled
    assert sizes(values["v"], 3) == [doubled, 2, 12]


def test_they_are_computed_no_more() -> None:
    assert lowered(small(HALVES)) == ["Concat", "Reshape", "Concat", "Neg"]


def test_a_shape_that_comes_from_outside_stays() -> None:
    edits = (("float[n] t", "float[n] t, int64[3] given"), ("Reshape<allowzero = 1>(v, shape)", "Reshape(v, given)"))
    proto = onnx.load_model_from_string(small(HALVES, edits))
    model = ir.from_proto(proto)
    know_shapes(model.graph, proto)
    fix_shapes(model.graph)
    (reshape,) = [node for node in model.graph if node.outputs[0].name == "y"]
    assert reshape.inputs[1] is model.graph.inputs[2]


def test_a_value_that_is_made_larger_stays() -> None:
    data = small(
        HALVES, (("Expand(w, e)", "Expand(q, e)"), ("w = Concat<axis = 0>(t, t)", "q = ReduceMax<keepdims = 1>(t)"))
    )
    assert "Expand" in rewritten(data, fix_shapes)
