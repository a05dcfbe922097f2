"""ONNX Runtime's operators for CUDA in ONNX's own, as its documentation has them: so a CPU runs a lowered graph."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

TO_LAST, TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]
ON_THE_CPU = ("SkipLayerNormalization",)
"""What ONNX Runtime has a kernel for there, too."""


def in_plain_operators(data: bytes) -> bytes:
    """An ONNX file, its operators of ``com.microsoft`` that only a GPU has replaced by ones of ONNX."""
    model = onnx.load_model_from_string(data)
    nodes = [plain for node in model.graph.node for plain in _plain(node)]
    if len(nodes) == len(model.graph.node):
        return data
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    return bytes(model.SerializeToString())


def with_weights(data: bytes, weights: Mapping[str, Any]) -> bytes:
    """An ONNX file that holds the weights which it says lie beyond the end of their file: the CPU's rewrites read them,
    where CUDA is only handed them. ``weights``: ONNX Runtime's values, by name; others stay as they are."""
    model = onnx.load_model_from_string(data)
    for tensor in model.graph.initializer:
        if tensor.name in weights and any(
            entry.key == "offset" and int(entry.value) > 1 << 40 for entry in tensor.external_data
        ):
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name].numpy(), tensor.name))
    return bytes(model.SerializeToString())


def _plain(node: NodeProto) -> list[NodeProto]:
    if node.domain != "com.microsoft" or node.op_type in ON_THE_CPU:
        return [node]
    own = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    return list(_OPERATORS[node.op_type](_Writer(node.output[0]), list(node.input), list(node.output), own))


class _Writer:
    """Makes nodes whose results have names that nothing else has."""

    def __init__(self, base: str) -> None:
        self.base, self.nodes = base, list[NodeProto]()

    def __call__(self, op_type: str, *inputs: str, result: str = "", **attributes: Any) -> str:
        name = result or f"{self.base}/{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], **attributes))
        return name


def _group_norm(write: _Writer, inputs: list[str], outputs: list[str], own: dict[str, Any]) -> list[NodeProto]:
    """NHWC; statistics, scale and shift in float32; 1 of ``activation`` is SiLU."""
    assert own["channels_last"] == 1
    x, scale, shift, *_ = inputs
    first = write("Cast", write("Transpose", x, perm=TO_FIRST), to=TensorProto.FLOAT)
    normal = write("GroupNormalization", first, scale, shift, num_groups=own["groups"], epsilon=own["epsilon"])
    if own["activation"]:
        normal = write("Mul", normal, write("Sigmoid", normal))
    write("Transpose", write("CastLike", normal, x), result=outputs[0], perm=TO_LAST)
    return write.nodes


def _skip_group_norm(write: _Writer, inputs: list[str], outputs: list[str], own: dict[str, Any]) -> list[NodeProto]:
    """The same of x + bias + skip, which is the second output."""
    x, scale, shift, skip, *bias = inputs
    biased = write("Add", x, *bias) if bias else x
    total = write("Add", biased, skip, result=outputs[1] if len(outputs) > 1 else "")
    return _group_norm(write, [total, scale, shift], outputs, own)


def _convolution(write: _Writer, inputs: list[str], outputs: list[str], own: dict[str, Any]) -> list[NodeProto]:
    """NHWC, with weights [out, height, width, in]."""
    x, weight, *bias = inputs
    first = [write("Transpose", value, perm=TO_FIRST) for value in (x, weight)]
    write("Transpose", write("Conv", *first, *bias, **own), result=outputs[0], perm=TO_LAST)
    return write.nodes


def _gated(write: _Writer, inputs: list[str], outputs: list[str], _: dict[str, Any]) -> list[NodeProto]:
    """The left half of x + bias, times the exact Gelu of the right one."""
    left, right = f"{write.base}/left", f"{write.base}/right"
    total = write("Add", *inputs)
    write.nodes.append(helper.make_node("Split", [total], [left, right], axis=-1, num_outputs=2))
    write("Mul", left, write("Gelu", right), result=outputs[0])
    return write.nodes


def _attention(write: _Writer, inputs: list[str], outputs: list[str], own: dict[str, Any]) -> list[NodeProto]:
    """[N, S, heads * D], without a mask."""
    heads = own.pop("num_heads")
    write("Attention", *inputs, result=outputs[0], q_num_heads=heads, kv_num_heads=heads, **own)
    return write.nodes


def _bias_add(write: _Writer, inputs: list[str], outputs: list[str], _: dict[str, Any]) -> list[NodeProto]:
    """x + bias + skip."""
    x, bias, skip = inputs
    write("Add", write("Add", x, bias), skip, result=outputs[0])
    return write.nodes


_OPERATORS: dict[str, Any] = {
    "BiasAdd": _bias_add,
    "MultiHeadAttention": _attention,
    "GroupNorm": _group_norm,
    "SkipGroupNorm": _skip_group_norm,
    "NhwcConv": _convolution,
    "BiasSplitGelu": _gated,
}
