"""What a graph is told to do, it does, and its outputs keep their names."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from tests.runtime.engines.ort_cuda.lowering.small import small
from tgate_runtime.engines.ort_cuda.lowering.edits import constant, insert, is_weight, producer, replace, used_once

GRAPH = """(float[2, 3] x, float[3] v) => (float[2, 3] y) <float[3] w = {1, 2, 3}>
    { a, b = Split<axis = 0, num_outputs = 2>(x)  c = Add(x, w)  d = Mul(c, v)  y = Add(d, c) }"""


def graph() -> tuple[ir.Graph, dict[str, ir.Value]]:
    """It, and its values by their names."""
    found = ir.from_proto(onnx.load_model_from_string(small(GRAPH))).graph
    made = [*found.inputs, *found.initializers.values(), *(value for node in found for value in node.outputs)]
    return found, {str(value.name): value for value in made}


def test_what_is_asked() -> None:
    _, values = graph()
    assert producer(values["c"], "Add") is values["c"].producer()
    assert producer(values["a"], "Split") is not None
    assert [producer(values[name], "Split") for name in "bcx"] == [None, None, None]
    assert producer(None, "Add") is None
    assert [used_once(values[name]) for name in "cdy"] == [False, True, False]
    assert [is_weight(values[name], 3) for name in "wvx"] == [True, False, False]
    assert is_weight(values["w"])
    assert not is_weight(values["w"], 2)
    assert constant(values["v"]) is None
    numbers = constant(values["w"])
    assert numbers is not None
    assert numbers.tolist() == [1, 2, 3]


def test_an_output_that_is_replaced_keeps_its_name() -> None:
    found, values = graph()
    node = values["y"].producer()
    assert node is not None
    new = insert(found, node, "Sub", list(node.inputs), {}, like=values["y"], name="new", shape=[2, 3])
    replace(found, values["y"], new, [node])
    assert [output.name for output in found.outputs] == ["y"]
    assert [each.op_type for each in found] == ["Split", "Add", "Mul", "Sub"]
    assert producer(found.outputs[0], "Sub") is not None
