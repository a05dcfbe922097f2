"""Carries: the bias of what a graph puts out beside its way on, added where it is put out."""

from __future__ import annotations

import onnx_ir as ir

from tgate_runtime.engines.ort_cuda.lowering.edits import (
    HALF_OR_SINGLE,
    constant,
    insert,
    is_weight,
    producer,
    readers,
    sizes,
)


def lower_carries(graph: ir.Graph) -> int:
    """Where x + bias, of a product x, is read once by a sum and else goes out of the graph, as it is or as the mean of
    its halves, add the bias to what goes out; how many.

    The sum then takes the bias up, the product needs none, and what goes out is written where it is wanted, not copied
    there.
    """
    return sum(_lower(graph, node) for node in list(graph) if node.op_type == "Add" and not node.domain)


def _lower(graph: ir.Graph, biased: ir.Node) -> bool:
    result, shape = biased.outputs[0], sizes(biased.outputs[0], 3)
    if not shape or not isinstance(shape[2], int) or result.is_graph_output() or result.dtype not in HALF_OR_SINGLE:
        return False
    pair = next((p for p in (biased.inputs, biased.inputs[::-1]) if is_weight(p[1], shape[2])), None)
    if pair is None or producer(pair[0], "MatMul") is None or sizes(pair[0], 3) != shape:
        return False
    x, bias = pair
    ends = [(node, _end(node, shape[2])) for node in readers(result) if node.op_type == "Reshape"]
    if not ends or len(readers(result)) != len(ends) + 1 or any(end is None for _, end in ends):
        return False
    for first, end in ends:
        first.replace_input_with(0, x)
        if end is None:
            continue
        out = end.outputs[0]
        name, out.name = out.name, f"{out.name}.unbiased"
        made = insert(graph, end, "Add", [out, bias], {}, like=out, name="biased", shape=sizes_of(out))
        made.name = name
        node = made.producer()
        assert node is not None
        graph.remove(node)
        graph.insert_after(end, node)
        for position, value in enumerate(graph.outputs):
            if value is out:
                graph.outputs[position] = made
    return True


def sizes_of(value: ir.Value) -> list[int | str | None]:
    """The dimensions of a tensor whose rank is known."""
    return sizes(value, len(value.shape)) if value.shape is not None else []


def _end(first: ir.Node, channels: int) -> ir.Node | None:
    """The node that puts out what a Reshape leads to, if all between is a mean of two or leaves its values alone."""
    value = first.outputs[0]
    if sizes_of(value)[-1:] != [channels]:
        return None
    if value.is_graph_output():
        return None if value.uses() else first
    slices = readers(value)
    if len(slices) != 2 or any(node.op_type != "Slice" for node in slices):
        return None
    if sorted(_cut(node) for node in slices) != [(0, 1, 1), (1, 2, 1)] or sizes_of(value)[1:2] != [2]:
        return None
    halves = [_only(_only(node, "Squeeze"), "Add") for node in slices]
    total = halves[0]
    if total is None or total is not halves[1] or len(total.inputs) != 2:
        return None
    mean = _only(total, "Div")
    if mean is None or (divisor := constant(mean.inputs[1])) is None or divisor.tolist() != 2.0:
        return None
    end = _only(mean, "Squeeze") or mean
    out = end.outputs[0]
    return end if out.is_graph_output() and not out.uses() and sizes_of(out)[-1:] == [channels] else None


def _only(node: ir.Node | None, op_type: str) -> ir.Node | None:
    """The node that alone reads another's one output, if it is of that type."""
    if node is None or node.outputs[0].is_graph_output():
        return None
    found = readers(node.outputs[0])
    return found[0] if len(found) == 1 and found[0].op_type == op_type and not found[0].domain else None


def _cut(node: ir.Node) -> tuple[int, int, int]:
    """Where a Slice begins and ends, and along which dimension: only along one, in steps of one."""
    parts = [constant(value) for value in node.inputs[1:4]]
    if len(node.inputs) > 4 or any(part is None or part.shape != (1,) for part in parts):
        return (-1, -1, -1)
    begin, end, axis = (int(part[0]) for part in parts if part is not None)
    return (begin, end, axis)
