"""Every operator of the table, in every form that is written, gives what ONNX Runtime gives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tests.runtime.engines.small import Small, save, tensor
from tgate_engine.graph import TensorSpec
from tgate_runtime.engines.aoti.graph import OnnxModule, Weights, trace
from tgate_runtime.engines.aoti.operators import OPERATORS

CPU = torch.device("cpu")
RNG = np.random.default_rng(0)


def floats(*shape: int) -> NDArray[np.float32]:
    return RNG.standard_normal(shape).astype(np.float32)


def whole(*numbers: Any) -> NDArray[np.int64]:
    return np.array(numbers, np.int64)


X = floats(2, 4, 6)
CHANNELS, PICTURE = floats(4), floats(2, 4, 5, 6)
Case = tuple[str, Sequence[NDArray[Any]], Sequence[NDArray[Any] | None], Mapping[str, Any]]

CASES: dict[str, Case] = {
    # name: operator, inputs, initializers after them (None: left out), attributes
    "Add": ("Add", [X, floats(6)], [], {}),
    "Add a number": ("Add", [X], [np.array(2.5, np.float32)], {}),
    "ArgMax": ("ArgMax", [X], [], {"axis": 1, "keepdims": 0}),
    "Attention": ("Attention", [floats(2, 3, 5, 8), floats(2, 3, 7, 8), floats(2, 3, 7, 8)], [], {"scale": 0.3}),
    "Attention causal": ("Attention", [floats(2, 3, 5, 8)] * 3, [], {"is_causal": 1}),
    "Attention masked": ("Attention", [floats(2, 3, 5, 8)] * 3 + [floats(2, 1, 5, 5)], [], {}),
    "Attention merged": ("Attention", [floats(2, 5, 24)] * 3, [], {"q_num_heads": 3, "kv_num_heads": 3}),
    "Cast": ("Cast", [X], [], {"to": TensorProto.INT64}),
    "Clip": ("Clip", [X], [np.array(-0.5, np.float32), np.array(0.5, np.float32)], {}),
    "Clip below": ("Clip", [X], [np.array(-0.5, np.float32)], {}),
    "Concat": ("Concat", [X, floats(2, 3, 6)], [], {"axis": 1}),
    "Conv": ("Conv", [PICTURE, floats(3, 4, 3, 3), floats(3)], [], {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    "Conv uneven": ("Conv", [PICTURE, floats(3, 4, 3, 3)], [], {"pads": [0, 1, 1, 2]}),
    "Conv grouped": ("Conv", [PICTURE, floats(4, 1, 3, 3)], [], {"group": 4, "dilations": [2, 2]}),
    "Conv 3D": ("Conv", [floats(1, 2, 3, 4, 5), floats(3, 2, 3, 1, 1)], [], {"pads": [1, 0, 0, 1, 0, 0]}),
    "Cos": ("Cos", [X], [], {}),
    "DepthToSpace": ("DepthToSpace", [floats(2, 12, 3, 5)], [], {"blocksize": 2}),
    "DepthToSpace column by row": ("DepthToSpace", [floats(2, 12, 3, 5)], [], {"blocksize": 2, "mode": "CRD"}),
    "Div": ("Div", [X, floats(6)], [], {}),
    "Div whole": ("Div", [whole(7, -7, 9)], [whole(2, 2, -4)], {}),
    "Einsum": ("Einsum", [X, floats(6, 3)], [], {"equation": "bij,jk->bik"}),
    "Equal": ("Equal", [whole(1, 2, 3)], [whole(1, 0, 3)], {}),
    "Exp": ("Exp", [X], [], {}),
    "Expand": ("Expand", [floats(2, 1, 6)], [whole(3, 1, 4, 1)], {}),
    "Flatten": ("Flatten", [X], [], {"axis": 1}),
    "Flatten all": ("Flatten", [X], [], {"axis": 0}),
    "Gather": ("Gather", [X], [whole([2, 0], [1, 3])], {"axis": 1}),
    "Gather one": ("Gather", [X], [whole(3)[0]], {"axis": -1}),
    "GatherND": ("GatherND", [X], [whole([0, 1], [1, 3])], {}),
    "GatherElements": ("GatherElements", [X], [np.tile(whole([[3], [0], [3]]), (2, 1, 6))], {"axis": 1}),
    "Gelu": ("Gelu", [X], [], {}),
    "Gelu tanh": ("Gelu", [X], [], {"approximate": "tanh"}),
    "GroupNormalization": ("GroupNormalization", [PICTURE, CHANNELS, floats(4)], [], {"num_groups": 2}),
    "Identity": ("Identity", [X], [], {}),
    "LayerNormalization": ("LayerNormalization", [X, floats(6), floats(6)], [], {"axis": -1, "epsilon": 1e-3}),
    "LayerNormalization of two axes": ("LayerNormalization", [X, floats(4, 6)], [], {"axis": 1}),
    "Less": ("Less", [whole(1, 2, 3)], [whole(2)], {}),
    "LessOrEqual": ("LessOrEqual", [X, X[:1]], [], {}),
    "MatMul": ("MatMul", [X, floats(6, 3)], [], {}),
    "Max": ("Max", [X, X[:1], floats(6)], [], {}),
    "Min": ("Min", [X, floats(6)], [], {}),
    "Mul": ("Mul", [X, floats(6)], [], {}),
    "Pad": ("Pad", [X], [whole(0, 1, 2, 0, 0, 1), np.array(7, np.float32)], {}),
    "Pad some axes": ("Pad", [X], [whole(1, 2), None, whole(-1)], {}),
    "Pad reflect": ("Pad", [PICTURE], [whole(0, 0, 2, 1, 0, 0, 0, 3)], {"mode": "reflect"}),
    "Pow": ("Pow", [np.abs(X)], [np.array(1.5, np.float32)], {}),
    "Reciprocal": ("Reciprocal", [X], [], {}),
    "ReduceL2": ("ReduceL2", [X], [whole(1)], {}),
    "ReduceMax": ("ReduceMax", [X], [whole(1, 2)], {"keepdims": 0}),
    "ReduceMean": ("ReduceMean", [X], [whole(-1)], {}),
    "ReduceSum": ("ReduceSum", [X], [], {"keepdims": 0}),
    "ReduceSum of nothing": ("ReduceSum", [X], [], {"noop_with_empty_axes": 1}),
    "Relu": ("Relu", [X], [], {}),
    "Reshape": ("Reshape", [X], [whole(0, -1)], {}),
    "Resize nearest": (
        "Resize",
        [PICTURE],
        [None, np.array([1, 1, 2, 2], np.float32)],
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
    ),
    "Resize cubic": (
        "Resize",
        [PICTURE],
        [None, None, whole(2, 4, 7, 9)],
        {"mode": "cubic", "coordinate_transformation_mode": "align_corners", "cubic_coeff_a": -0.75},
    ),
    "Round": ("Round", [np.array([0.5, 1.5, -0.5, 2.4], np.float32)], [], {}),
    "Sigmoid": ("Sigmoid", [X], [], {}),
    "Sin": ("Sin", [X], [], {}),
    "Slice": ("Slice", [X], [whole(1, 0), whole(3, 99), whole(1, -1), whole(1, 2)], {}),
    "Slice first axes": ("Slice", [X], [whole(0, 1), whole(1, 3)], {}),
    "Split": ("Split", [X], [whole(1, 3)], {"axis": 1}),
    "Split evenly": ("Split", [X], [], {"axis": 2, "num_outputs": 2}),
    "Sqrt": ("Sqrt", [np.abs(X)], [], {}),
    "Squeeze": ("Squeeze", [floats(2, 1, 3, 1)], [whole(1)], {}),
    "Squeeze all": ("Squeeze", [floats(2, 1, 3, 1)], [], {}),
    "Sub": ("Sub", [X, floats(6)], [], {}),
    "Sum": ("Sum", [X, floats(6), floats(4, 1)], [], {}),
    "Tanh": ("Tanh", [X], [], {}),
    "Tile": ("Tile", [X], [whole(2, 1, 3)], {}),
    "TopK": ("TopK", [X], [whole(3)], {"axis": 1}),
    "TopK of equal numbers": ("TopK", [np.round(X)], [whole(6)], {}),
    "TopK smallest": ("TopK", [np.round(X)], [whole(2)], {"largest": 0}),
    "Transpose": ("Transpose", [X], [], {"perm": [2, 0, 1]}),
    "Unsqueeze": ("Unsqueeze", [X], [whole(0, -1)], {}),
}
LOGIC = ("And", "Not", "Where")
TWO_OUTPUTS = ("Split", "TopK")


@pytest.fixture(scope="module")
def weights(small: Small) -> Weights:
    return Weights(small.bundle.file("weights.safetensors"), CPU)


def agree(
    path: Path, weights: Weights, nodes: Sequence[Any], inputs: Sequence[Any], initializers: Sequence[Any]
) -> None:
    """Run those nodes in both, on inputs x0, x1, …; the last node's outputs begin with y. What ``torch.export`` makes
    of them, which is what is compiled, has to give the same."""
    arrays = {f"x{i}": array for i, array in enumerate(inputs)}
    specs = [tensor(name, *array.shape, dtype=str(array.dtype)) for name, array in arrays.items()]
    names = [name for name in nodes[-1].output if name.startswith("y")]
    want = reference(path, nodes, specs, names, initializers, arrays)
    outputs = [tensor(name, *each.shape, dtype=str(each.dtype)) for name, each in zip(names, want, strict=True)]
    spec = save(path, nodes, specs, outputs, initializers)
    module = OnnxModule(path.read_bytes(), spec, weights)
    for run in (module, trace(module, CPU).module(check_guards=False)):
        with torch.no_grad():
            got = run(*map(torch.from_numpy, inputs))
        for a, b in zip(got, want, strict=True):
            assert (a.numpy().dtype, tuple(a.shape)) == (b.dtype, b.shape)
            np.testing.assert_allclose(a.numpy(), b, rtol=1e-4, atol=1e-5)


def reference(
    path: Path, nodes: Sequence[Any], specs: Sequence[TensorSpec], names: Sequence[str], initializers: Any, arrays: Any
) -> list[NDArray[Any]]:
    """ONNX Runtime's outputs, whose types and shapes it works out."""
    graph = helper.make_graph(
        list(nodes),
        "g",
        [
            helper.make_tensor_value_info(s.name, helper.np_dtype_to_tensor_dtype(arrays[s.name].dtype), s.shape)
            for s in specs
        ],
        [helper.make_empty_tensor_value_info(name) for name in names],
        list(initializers),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs: list[NDArray[Any]] = session.run(list(names), arrays)
    return outputs


@pytest.mark.parametrize("case", list(CASES))
def test_an_operator(tmp_path: Path, weights: Weights, case: str) -> None:
    operator, inputs, more, attributes = CASES[case]
    initializers = {f"c{i}": array for i, array in enumerate(more) if array is not None}
    names = [f"c{i}" if f"c{i}" in initializers else "" for i in range(len(more))]
    outputs = ["y0", "y1"] if operator in TWO_OUTPUTS else ["y"]
    nodes = [helper.make_node(operator, [*(f"x{i}" for i in range(len(inputs))), *names], outputs, **attributes)]
    if operator in ("Equal", "Less", "LessOrEqual"):  # no bundle's tensor is a truth value
        nodes = [
            helper.make_node(operator, nodes[0].input, ["truth"]),
            helper.make_node("Cast", ["truth"], ["y"], to=TensorProto.FLOAT),
        ]
    agree(tmp_path / "g.onnx", weights, nodes, inputs, [numpy_helper.from_array(a, n) for n, a in initializers.items()])


def test_truth_values(tmp_path: Path, weights: Weights) -> None:
    node = helper.make_node
    nodes = [
        node("LessOrEqual", ["x0", "x1"], ["a"]),
        node("Not", ["a"], ["b"]),
        node("LessOrEqual", ["x0", "zero"], ["c"]),
        node("And", ["b", "c"], ["d"]),
        node("Where", ["d", "x0", "x1"], ["y"]),
    ]
    zero = numpy_helper.from_array(np.array(0, np.float32), "zero")
    agree(tmp_path / "g.onnx", weights, nodes, [X, floats(2, 4, 6)], [zero])


def test_every_operator_is_tried() -> None:
    assert {operator for operator, *_ in CASES.values()} | set(LOGIC) == OPERATORS.keys()


@pytest.mark.parametrize(
    ("node", "says"),
    [
        (helper.make_node("Conv", ["x", "w"], ["y"], auto_pad="SAME_UPPER"), "Conv with auto_pad"),
        (helper.make_node("Attention", ["q", "q", "q"], ["y"], softcap=2.0), "Attention with cache or softcap"),
        (helper.make_node("Resize", ["x", "", "s"], ["y"], mode="linear"), "Resize in mode linear"),
    ],
)
def test_a_form_that_is_not_written(node: Any, says: str) -> None:
    inputs = {"x": PICTURE, "w": floats(3, 4, 3, 3), "q": floats(2, 3, 5, 8)}
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    arguments = [torch.from_numpy(inputs[name]) if name in inputs else None for name in node.input]
    if node.op_type == "Resize":
        arguments[2] = [1.0, 1.0, 2.0, 2.0]
    with pytest.raises(NotImplementedError, match=says):
        OPERATORS[node.op_type](attributes, *arguments)
