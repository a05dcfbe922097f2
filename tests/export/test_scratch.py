"""The planned memory of a graph, against sums made by hand."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from tgate_export.scratch import peak_bytes

KIB = 1024


def value(name: str, *shape: int) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(ir.DataType.FLOAT))


def peak(nodes: list[ir.Node], inputs: list[ir.Value], outputs: list[ir.Value]) -> int:
    return peak_bytes(ir.Model(ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 23}), ir_version=10))


def unary(op: str, source: ir.Value, result: ir.Value) -> ir.Node:
    return ir.Node("", op, [source], outputs=[result])


def test_a_chain_holds_two_values_at_once() -> None:
    x, a, b, c, y = (value(n, 256) for n in "xabcy")  # 1 KiB each
    chain = [unary("Exp", x, a), unary("Exp", a, b), unary("Exp", b, c), unary("Exp", c, y)]
    assert peak(chain, [x], [y]) == 2 * KIB


def test_an_elementwise_chain_works_in_place() -> None:
    x, a, b, y = (value(n, 256) for n in "xaby")
    assert peak([unary("Tanh", x, a), unary("Tanh", a, b), unary("Tanh", b, y)], [x], [y]) == KIB


def test_a_value_that_is_read_again_is_kept() -> None:
    x, a, b, c, y = (value(n, 256) for n in "xabcy")
    nodes = [unary("Exp", x, a), unary("Exp", a, b), unary("Exp", b, c), ir.Node("", "Add", [a, c], outputs=[y])]
    assert peak(nodes, [x], [y]) == 3 * KIB


def test_reshaping_is_free_and_keeps_what_it_shows() -> None:
    x, y = value("x", 256), value("y", 16, 16)
    a, view, b = value("a", 256), value("view", 16, 16), value("b", 16, 16)
    nodes = [unary("Exp", x, a), unary("Identity", a, view), unary("Exp", view, b), ir.Node("", "Add", [view, b])]
    nodes[-1].outputs[0].name = "y"
    nodes[-1].outputs[0].shape = y.shape
    nodes[-1].outputs[0].type = y.type
    assert peak(nodes, [x], [nodes[-1].outputs[0]]) == 2 * KIB


@pytest.mark.parametrize("length", [8, 32])
def test_attention_needs_its_scores(length: int) -> None:
    q, k, v, y = (value(n, 1, 2, length, 16) for n in "qkvy")
    node = ir.Node("", "Attention", [q, k, v], outputs=[y])
    assert peak([node], [q, k, v], [y]) == 2 * length * length * 4
