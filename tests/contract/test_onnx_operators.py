"""Operators, their inputs and attributes, are ONNX's own; refusing is ``tests/runtime/test_graph_check.py``."""

from __future__ import annotations

from typing import Any

import pytest
from onnx import defs
from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

from tgate_engine.onnx_form import OPSETS
from tgate_engine.onnx_operators import (
    CONTRIB,
    INPUTS,
    LOWERED,
    MOST_TENSORS,
    NAMES,
    OPERATORS,
    OUTPUTS,
    RULES,
    may_say,
    takes,
)
from tgate_runtime.engines.aoti.operators import OPERATORS as IN_TORCH
from tgate_runtime.engines.aoti.operators import SHAPE_OPERATORS


def test_operators_are_onnx_own_and_hold_no_graph() -> None:
    for name in OPERATORS:
        schema = defs.get_schema(name, OPSETS[-1])
        assert all(attribute.type != defs.OpSchema.AttrType.GRAPH for attribute in schema.attributes.values()), name
    random = {"RandomNormal", "RandomUniform", "Bernoulli", "Multinomial", "Dropout"}
    flow = {"If", "Loop", "Scan", "SequenceMap"}
    assert not OPERATORS & (random | flow | {"Optional", "StringConcat", "Constant", "ConstantOfShape", "Range"})


def test_every_operator_that_is_translated_may_occur() -> None:
    assert IN_TORCH.keys() | SHAPE_OPERATORS.keys() | {"Shape"} <= OPERATORS


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_inputs_and_outputs_are_onnx_own(operator: str) -> None:
    marks = {"Single": "1", "Optional": "?", "Variadic": "1*"}
    schema = defs.get_schema(operator, OPSETS[-1])
    assert INPUTS[operator] == "".join(marks[str(each.option).rpartition(".")[2]] for each in schema.inputs)
    assert OUTPUTS.get(operator, 1) == min(schema.max_output, MOST_TENSORS)


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_attributes_are_onnx_own(operator: str) -> None:
    """Of their types; and what stands for one that is left out may be said as well."""
    schema = defs.get_schema(operator, OPSETS[-1])
    assert set(NAMES.get(operator, "").split()) == set(schema.attributes)
    attributes: Any = schema.attributes
    for name, attribute in attributes.items():
        kind, _ = RULES[name]
        assert kind == attribute.type.value, name
        default = attribute.default_value
        if default.type:
            value = {1: default.f, 2: default.i, 3: default.s, 7: default.ints}[kind]
            assert may_say(operator, name, kind, value), name


def test_every_rule_is_somebodys() -> None:
    assert set(RULES) == {name for names in NAMES.values() for name in names.split()}
    assert NAMES.keys() <= OPERATORS | LOWERED


def test_those_of_lowered_graphs_are_onnx_runtimes_own() -> None:
    """And given no more of their inputs and attributes than the rewrites write."""
    marks = {"Single": "1", "Optional": "1?"}
    schemas = {schema.name: schema for schema in get_all_operator_schema() if schema.domain == CONTRIB}
    for name in LOWERED:
        schema = schemas[name]
        options = [marks[str(each.option).rpartition(".")[2]] for each in schema.inputs]
        assert all(own in known for own, known in zip(INPUTS[name], options, strict=False)), name
        assert len(INPUTS[name]) <= len(options), name
        assert "1" not in options[len(INPUTS[name]) :], name
        assert OUTPUTS.get(name, 1) <= len(schema.outputs)
        said = {*NAMES.get(name, "").split()}
        assert said <= {*schema.attributes}, name
        kinds = {"FLOAT": 1, "INT": 2, "INTS": 7}
        for each in said:
            assert RULES[each][0] == kinds[str(schema.attributes[each].type).rpartition(".")[2]]


@pytest.mark.parametrize(
    ("operator", "inputs", "outputs"),
    [
        ("Sum", ["a", ""], ["y"]),
        ("Sum", [], ["y"]),
        ("Sum", ["a"] * 2000, ["y"]),
        ("Add", ["a"], ["y"]),
        ("Add", ["a", "b", "c"], ["y"]),
        ("Clip", ["", "a"], ["y"]),
        ("Relu", ["a"], []),
        ("Relu", ["a"], [""]),
        ("Relu", ["a"], ["y", "z"]),
        ("Split", ["a"], ["y"] * 2000),
    ],
)
def test_inputs_that_an_operator_does_not_take(operator: str, inputs: list[str], outputs: list[str]) -> None:
    assert not takes(operator, inputs, outputs)


@pytest.mark.parametrize(
    ("operator", "inputs", "outputs"),
    [
        ("Sum", ["a"], ["y"]),
        ("Concat", ["a"] * 100, ["y"]),
        ("Clip", ["a", "", "b"], ["y"]),
        ("Resize", ["a", "", "", "b"], ["y"]),
        ("Slice", ["a", "b", "c", "", "d"], ["y"]),
        ("LayerNormalization", ["a", "b"], ["y", "", "z"]),
        ("Split", ["a"], ["y"] * 100),
    ],
)
def test_inputs_that_an_operator_takes(operator: str, inputs: list[str], outputs: list[str]) -> None:
    assert takes(operator, inputs, outputs)


@pytest.mark.parametrize(
    ("operator", "name", "kind", "value"),
    [
        ("GatherND", "batch_dims", 2, -2),
        ("Gather", "axis", 2, 9),
        ("Gather", "axis", 1, 1.0),
        ("Gather", "batch_dims", 2, 0),
        ("Add", "axis", 2, 0),
        ("Cast", "to", 2, 8),
        ("Conv", "strides", 7, [0, 1]),
        ("Conv", "pads", 7, [-1, 1]),
        ("Conv", "kernel_shape", 7, [1] * 17),
        ("Conv", "group", 2, 0),
        ("Transpose", "perm", 7, [0, 8]),
        ("LeakyRelu", "alpha", 1, float("nan")),
        ("Resize", "mode", 3, b"linear\xff"),
        ("Einsum", "equation", 3, b"i" * 65),
        ("Einsum", "equation", 3, b"i\n"),
    ],
)
def test_values_that_mean_nothing(operator: str, name: str, kind: int, value: object) -> None:
    assert not may_say(operator, name, kind, value)
