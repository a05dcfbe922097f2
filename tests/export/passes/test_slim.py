"""What engines do not read is gone; what the manifest and the weight file name stays."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from tests.export.passes.small import by_runtime, model, noise, operators, shape
from tgate_export.passes.slim import slim


def noted() -> ir.Model:
    """A model with notes wherever there can be some."""
    small = model(
        """(float[2, 3] x) => (float[2, 4] y) <float[3, 4] weight = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}>
        { product = MatMul(x, weight)  y = Neg(product) }"""
    )
    values = [*small.graph.inputs, *small.graph.initializers.values(), *(o for n in small.graph for o in n.outputs)]
    for i, node in enumerate(small.graph):
        node.name = f"node_of_a_module_{i}"
    for thing in (small, small.graph, *small.graph, *values):
        thing.doc_string = "a note"
        thing.metadata_props["pkg.torch.onnx.stack_trace"] = "a note"
    return small


def test_notes_are_gone_and_the_numbers_stay() -> None:
    small, inputs = noted(), noise(x=(2, 3))
    before = by_runtime(small, inputs)
    assert b"a note" in ir.to_proto(small).SerializeToString()
    slim(small)
    content = ir.to_proto(small).SerializeToString()
    assert b"a note" not in content
    assert b"stack_trace" not in content
    assert operators(small) == ["MatMul", "Neg"]
    assert np.array_equal(by_runtime(small, inputs), before)


def test_inner_values_lose_their_names_and_shapes() -> None:
    small = noted()
    slim(small)
    inner = small.graph.node(0).outputs[0]
    assert [node.name for node in small.graph] == ["n0", "n1"]
    assert (inner.name, inner.shape, inner.type) == ("v0", None, None)


def test_inputs_outputs_and_weights_keep_theirs() -> None:
    small = noted()
    slim(small)
    kept = [*small.graph.inputs, *small.graph.initializers.values(), *small.graph.outputs]
    assert [(value.name, shape(value)) for value in kept] == [("x", [2, 3]), ("weight", [3, 4]), ("y", [2, 4])]
    assert list(small.graph.initializers) == ["weight"]
    assert {value.dtype for value in kept} == {ir.DataType.FLOAT}
