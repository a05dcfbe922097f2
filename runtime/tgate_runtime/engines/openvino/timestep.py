"""What a graph makes of the timestep before its first matrix product, as a model of its own.

In bfloat16 the engine rounds what comes in to 8 bits, the timestep too: 801 becomes 800, and its sines and cosines
become those of another time, which on `mini-sdxl` moved the latents of four steps by half.
"""

from __future__ import annotations

from typing import Any

import openvino as ov
from openvino import opset13 as ops

from tgate_engine.step import STEP, TIMESTEP

_PRODUCTS = ("MatMul", "Convolution")


def part_name(number: int) -> str:
    """The name of the input of the rest that takes an output of the part, counted from 0."""
    return f"of-timestep.{number}"


def split_time(model: Any) -> Any:
    """Cut what ``model`` makes of the timestep before its matrix products off it; a model of that part, or None.

    The part's outputs become inputs of ``model``, by the names of :func:`part_name`.
    """
    inside = {column.get_friendly_name() for column in _timestep_columns(model)}
    frontier = []
    for node in model.get_ordered_ops():
        if node.get_friendly_name() not in inside:
            continue
        for output in node.outputs():
            uses = [use.get_node() for use in output.get_target_inputs()]
            if any(use.get_type_name() in _PRODUCTS for use in uses):
                frontier.append((node.get_friendly_name(), output.get_index()))
            else:
                inside.update(use.get_friendly_name() for use in uses)
    if not frontier:
        return None
    nodes = {node.get_friendly_name(): node for node in model.get_ordered_ops()}
    copy = model.clone()
    copies = {node.get_friendly_name(): node for node in copy.get_ordered_ops()}
    results = []
    for number, (name, index) in enumerate(frontier):
        output, cut = copies[name].output(index), nodes[name].output(index)
        output.get_tensor().set_names({part_name(number)})
        results.append(ops.result(output))
        parameter = ops.parameter(cut.get_partial_shape(), cut.get_element_type())
        parameter.output(0).get_tensor().set_names({part_name(number)})
        for use in cut.get_target_inputs():
            use.replace_source_output(parameter.output(0))
        model.add_parameters([parameter])
    model.validate_nodes_and_infer_types()
    return _without_idle_inputs(results, copy)


def _timestep_columns(model: Any) -> list[Any]:
    """The nodes that take the timestep out of the step's row."""
    if not any(port.any_name == STEP for port in model.inputs):
        return []
    uses = [use.get_node() for use in model.input(STEP).get_target_inputs()]
    picks = [node for node in uses if node.get_type_name() == "Gather"]
    columns = [(node, node.input_value(1).get_node()) for node in picks]
    return [
        node
        for node, column in columns
        if column.get_type_name() == "Constant" and column.data.reshape(-1).tolist() == [TIMESTEP]
    ]


def _without_idle_inputs(results: list[Any], model: Any) -> Any:
    """A model of ``results`` and of those parameters of ``model`` that they are computed from."""
    needed: dict[str, Any] = {}
    todo = list(results)
    while todo:
        for value in todo.pop().input_values():
            node = value.get_node()
            if node.get_friendly_name() not in needed:
                needed[node.get_friendly_name()] = node
                todo.append(node)
    return ov.Model(results, [p for p in model.get_parameters() if p.get_friendly_name() in needed], "time")
