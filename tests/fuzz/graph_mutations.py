"""Small changes to ONNX graphs, most of which a parser lets through: see :mod:`tests.fuzz.mutations`."""

from __future__ import annotations

import functools
import math
import struct
from random import Random
from typing import Any

import onnx

from tests.fuzz.mutations import mutate_bytes
from tgate_engine.onnx_operators import OPERATORS


def mutate_graph(data: bytes, rng: Random) -> bytes:
    """Nodes, attributes, constants and shapes, in a file as protobuf writes it; sometimes any field, or bytes."""
    if rng.random() < 0.03:
        return mutate_bytes(data, rng)
    model = onnx.ModelProto()
    try:
        model.ParseFromString(data)
    except Exception:  # protobuf's own classes, which depend on how it was built
        return mutate_bytes(data, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        edit = rng.choice((_inserted, _inserted, _inserted, _operator, _attribute, _wire, _constant, _nodes))
        edit = _any_field if rng.random() < 0.05 else edit
        edit(model, rng)
    return bytes(model.SerializeToString(deterministic=True))


_OPERATORS = sorted(OPERATORS)
_TAKES = {
    **dict.fromkeys(
        ("Gather", "GatherElements", "GatherND", "Split", "Expand", "Tile", "TopK", "Reshape", "Unsqueeze", "Squeeze"),
        "vi",
    ),
    "Trilu": "vi",
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum"), "vi"),
    **dict.fromkeys(("Conv", "MatMul", "RMSNormalization", "Concat", "Einsum", "PRelu", "Pow", "Mod", "Div"), "vn"),
    **dict.fromkeys(("GroupNormalization", "LayerNormalization", "InstanceNormalization", "Gemm", "Clip"), "vnn"),
    "Slice": "viiii",
    "Pad": "vini",
    "Resize": "v-n",
    "Attention": "vvv",
    "Where": "vnn",
}
"""What operators read: a value, whole numbers, or numbers that are constants; one value where nothing is said."""
_INTEGERS = (0, 1, -1, 2, -2, 3, 8, 100, 2**16, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1, -(2**63), -(2**31))
_BYTES = {1: 4, 2: 1, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 16: 2}
"""Of a number, by its type."""
_FLOATS = (0.0, 1.0, -1.0, 0.5, 1e-30, 1e38, float("inf"), float("-inf"), float("nan"))
_STRINGS = """SAME_UPPER VALID NOTSET linear cubic nearest constant reflect edge wrap tanh none ij,jk->ik ii->i i->
    ...i,...j->...ij aaaaaaaaaaaaaaa,a->a bdnm,bhnd-> half_pixel align_corners asymmetric floor ceil not_larger x"""


def _operator(model: Any, rng: Random) -> None:
    if model.graph.node:
        rng.choice(model.graph.node).op_type = rng.choice(_OPERATORS)


@functools.cache
def _attributes(operator: str) -> dict[str, int]:
    """Types by names, of those that are a number, a text, or a list of numbers."""
    known: Any = onnx.defs.get_schema(operator, 23).attributes if onnx.defs.has(operator) else {}
    return {name: each.type.value for name, each in known.items() if each.type.value in (1, 2, 3, 6, 7)}


def _inserted(model: Any, rng: Random) -> None:
    """An operator of any kind, with inputs of the right kind and any numbers, whose result the graph needs: its sum is
    added to what some node reads."""
    graph = model.graph
    if not graph.node:
        return
    at, count = rng.randrange(len(graph.node)), len(graph.node) + len(graph.initializer)
    values = [value.name for value in graph.input] + [name for node in graph.node[:at] for name in node.output]
    operator, inputs = rng.choice(_OPERATORS), []
    for place, kind in enumerate(_TAKES.get(operator, "v")):
        if kind in "in":
            name = f"constant {count} {place}"
            tensor = graph.initializer.add(name=name, data_type=7 if kind == "i" else 1)
            tensor.dims.extend(rng.choice(([], [1], [2], [3], [4], [4], [1, 2], [2, 2], [2, 2, 1, 1], [32], [4, 4])))
            _fill(tensor, rng, small=rng.random() < 0.7)
            inputs.append(name)
        else:
            inputs.append(rng.choice(values) if values and kind == "v" else "")
    made, number, total, more = (f"{what} {count}" for what in ("made", "number", "total", "more"))
    node = onnx.NodeProto(op_type=operator, input=inputs, output=[made])
    for _ in range(rng.choice((0, 1, 1, 2))):
        _change_attribute(node, rng)
    reader = graph.node[at]
    place = rng.randrange(len(reader.input)) if reader.input else 0
    tail = [
        onnx.helper.make_node("Cast", [made], [number], to=1),
        onnx.helper.make_node("ReduceSum", [number], [total], keepdims=0),
        onnx.helper.make_node("Add", [total, reader.input[place] if reader.input else total], [more]),
    ]
    if reader.input:
        reader.input[place] = more
    nodes = [*graph.node[:at], node, *tail, *graph.node[at:]]
    del graph.node[:]
    graph.node.extend(nodes)


def _attribute(model: Any, rng: Random) -> None:
    """One of a node's, changed, or a new one; of the value's usual form."""
    if model.graph.node:
        _change_attribute(rng.choice(model.graph.node), rng)


def _change_attribute(node: Any, rng: Random) -> None:
    """Sets one that the operator has, by ONNX's own list; seldom one that it has not, or of another type."""
    known = _attributes(node.op_type)
    if rng.random() < 0.03:
        known = {"axis": 2, "to": 2, "mode": 3, "body": 6}
    if not known:
        return
    name = rng.choice([*known])
    attribute = next((there for there in node.attribute if there.name == name), None)
    if attribute is None:
        attribute = node.attribute.add(name=name, type=known[name])
    elif rng.random() < 0.03:
        attribute.type = rng.choice((1, 2, 3, 6, 7))
    kind = attribute.type
    for field in ("f", "i", "s", "floats", "ints"):
        attribute.ClearField(field)
    if kind == onnx.AttributeProto.FLOAT:
        attribute.f = rng.choice(_FLOATS)
    elif kind == onnx.AttributeProto.INT:
        attribute.i = rng.randint(-2, 4) if rng.random() < 0.8 else rng.choice(_INTEGERS)
    elif kind == onnx.AttributeProto.STRING:
        attribute.s = rng.choice(_STRINGS.split()).encode() if rng.random() < 0.95 else b"\xff"
    elif kind == onnx.AttributeProto.FLOATS:
        attribute.floats.extend(rng.choice(_FLOATS) for _ in range(rng.choice((0, 1, 2, 5))))
    elif kind == onnx.AttributeProto.INTS:
        several = [rng.randint(0, 3) if rng.random() < 0.9 else rng.choice(_INTEGERS) for _ in range(9)]
        attribute.ints.extend(several[: rng.choice((0, 1, 2, 2, 4, 4, 9))])


def _wire(model: Any, rng: Random) -> None:
    """A node reads something else, nothing, or one thing more or less."""
    graph = model.graph
    if not graph.node:
        return
    at = rng.randrange(len(graph.node))
    names = [value.name for value in graph.input] + [tensor.name for tensor in graph.initializer]
    names += [name for node in graph.node[:at] for name in node.output]
    node, name = graph.node[at], rng.choice(names) if names and rng.random() < 0.95 else ""
    match rng.randrange(8):
        case 0 if node.input:
            del node.input[rng.randrange(len(node.input))]
        case 1:
            node.input.append(name)
        case _ if node.input:
            node.input[rng.randrange(len(node.input))] = name


def _constant(model: Any, rng: Random) -> None:
    """Numbers of a constant that lies in the file, or its shape and type, with as many bytes as they take."""
    own = [tensor for tensor in model.graph.initializer if tensor.data_location == onnx.TensorProto.DEFAULT]
    if not own:
        return
    tensor = rng.choice(own)
    if rng.random() < 0.3:
        tensor.data_type = rng.choice([*_BYTES])
    if rng.random() < 0.4 or math.prod(tensor.dims) > 1000:
        tensor.dims[:] = rng.choice(([], [0], [1], [2], [3], [1, 1], [2, 2], [4], [0, 3], [1] * 8, [64]))
    _fill(tensor, rng, small=rng.random() < 0.3)


def _fill(tensor: Any, rng: Random, *, small: bool) -> None:
    """Numbers for a constant of its shape and type."""
    count = math.prod(max(dim, 0) for dim in tensor.dims)
    if tensor.data_type == onnx.TensorProto.INT64:
        integers = [rng.randint(-2, 4) if small else rng.choice(_INTEGERS) for _ in range(count)]
        tensor.raw_data = struct.pack(f"<{count}q", *integers)
    elif tensor.data_type == onnx.TensorProto.FLOAT:
        floats = [rng.uniform(-2, 2) if small else rng.choice(_FLOATS) for _ in range(count)]
        tensor.raw_data = struct.pack(f"<{count}f", *floats)
    else:
        tensor.raw_data = rng.randbytes(count * _BYTES.get(tensor.data_type, 1))


def _nodes(model: Any, rng: Random) -> None:
    """One node less, or one more that makes a value of its own, or an input that becomes an output."""
    graph = model.graph
    if not graph.node:
        return
    at = rng.randrange(len(graph.node))
    if rng.random() < 0.3:
        del graph.node[at]
        return
    added = graph.node.add()
    added.CopyFrom(graph.node[at])
    for number, name in enumerate(added.output):
        added.output[number] = f"{name} again {len(graph.node)}"
    if rng.random() < 0.5:
        added.op_type = rng.choice(_OPERATORS)


def _any_field(model: Any, rng: Random) -> None:
    """Some field of some message: cleared, doubled, or set to something else of its type."""
    message = model
    while True:
        fields = message.ListFields()
        inner = [value for field, value in fields if field.type == field.TYPE_MESSAGE and value]
        if not inner or rng.random() < 0.15:
            break
        value = rng.choice(inner)
        message = rng.choice(value) if hasattr(value, "add") else value
    if not fields:
        return
    field, value = rng.choice(fields)
    if rng.random() < 0.2:
        message.ClearField(field.name)
    elif hasattr(value, "extend"):
        value.extend([rng.choice(value)] if value else [])
    elif field.type in (field.TYPE_INT64, field.TYPE_INT32):
        setattr(message, field.name, rng.choice(_INTEGERS) % 2**31)
    elif field.type == field.TYPE_STRING:
        setattr(message, field.name, rng.choice(("", "x", "latents", "ai.onnx", "a\nb", "../x")))
