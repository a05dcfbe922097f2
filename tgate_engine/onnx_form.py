"""What an ONNX file of a bundle may hold, in one place: export checks what it writes, run time what it is given.

Engines are large programs in C++ that parse a file and then do what it says. So a bundle's graphs are held to what
export writes: a straight line of known operators, constants that lie in the file, and weights that are exactly the
tensors of the one weight file. What is not in these tables is refused by its name.

Nothing here parses: :func:`check_graph` is given a class of messages that protobuf made of :func:`describe`, and a
file passes only if it is, byte for byte, what protobuf writes for the message that was checked. So there is no field,
doubled or unknown, that another parser could take otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn

from tgate_engine.dtypes import DTYPES
from tgate_engine.errors import BundleError
from tgate_engine.graph import GraphSpec, TensorSpec
from tgate_engine.onnx_operators import CONTRIB, LOWERED, MOST_DIMENSIONS, OPERATORS, may_say, takes

MOST_BYTES = 64 << 20
"""How large a graph's file may be. SDXL's hold one megabyte, and constants of a few megabytes are imaginable."""
MOST_NODES = 100_000
"""Of a graph; SDXL's have 6,000."""
IR_VERSIONS = range(10, 12)
OPSETS = range(21, 24)

_SIZES = {1: 4, 2: 1, 6: 4, 7: 8, 9: 1, 10: 2, 11: 8, 16: 2}
"""Bytes of an element, by its number in ``TensorProto.DataType``: float32, uint8, int32, int64, bool, float16, float64,
bfloat16."""
_EXTERNAL = 1  # TensorProto.EXTERNAL
_VALUES = {1: "f", 2: "i", 3: "s", 6: "floats", 7: "ints"}
"""Which field holds the value of an attribute, by its type: a number, a text, or a list of numbers."""
_MOST_SEARCHED = 100_000  # messages, for what to name in an error
_NUMBER = re.compile("0|[1-9][0-9]{0,18}")

# --- messages -----------------------------------------------------------------------------------

FORM: Mapping[str, str] = {
    "ModelProto": "ir_version=1:int64 producer_name=2:string producer_version=3:string graph=7:GraphProto "
    "opset_import=8:OperatorSetIdProto*",
    "OperatorSetIdProto": "domain=1:string version=2:int64",
    "GraphProto": "node=1:NodeProto* name=2:string initializer=5:TensorProto* input=11:ValueInfoProto* "
    "output=12:ValueInfoProto* value_info=13:ValueInfoProto*",
    "NodeProto": "input=1:string* output=2:string* name=3:string op_type=4:string attribute=5:AttributeProto* "
    "domain=7:string",
    "AttributeProto": "name=1:string f=2:float i=3:int64 s=4:bytes floats=7:float* ints=8:int64* type=20:int32",
    "TensorProto": "dims=1:int64* data_type=2:int32 name=8:string raw_data=9:bytes "
    "external_data=13:StringStringEntryProto* data_location=14:int32",
    "StringStringEntryProto": "key=1:string value=2:string",
    "ValueInfoProto": "name=1:string type=2:TypeProto",
    "TypeProto": "tensor_type=1:TensorTypeProto",
    "TensorTypeProto": "elem_type=1:int32 shape=2:TensorShapeProto",
    "TensorShapeProto": "dim=1:DimensionProto*",
    "DimensionProto": "dim_value=1:int64 dim_param=2:string",
}
"""The messages that a graph is made of, each with its fields as ``name=number:type``, a star where there are several.

Names and numbers are ONNX's. What ONNX has besides is not here, so no graph may have it: functions, training, sparse
and quantised tensors, graphs in attributes, sequences, notes.
"""
REFUSED: Mapping[str, Mapping[int, str]] = {
    "ModelProto": {4: "domain", 5: "model_version", 6: "doc_string", 14: "metadata_props", 20: "training_info"}
    | {25: "functions", 26: "configuration"},
    "GraphProto": {10: "doc_string", 14: "quantization_annotation", 15: "sparse_initializer", 16: "metadata_props"},
    "NodeProto": {6: "doc_string", 8: "overload", 9: "metadata_props", 10: "device_configurations"},
    "AttributeProto": {5: "t", 6: "g", 9: "strings", 10: "tensors", 11: "graphs", 13: "doc_string", 14: "tp"}
    | {15: "type_protos", 21: "ref_attr_name", 22: "sparse_tensor", 23: "sparse_tensors"},
    "TensorProto": {3: "segment", 4: "float_data", 5: "int32_data", 6: "string_data", 7: "int64_data"}
    | {10: "double_data", 11: "uint64_data", 12: "doc_string", 16: "metadata_props"},
    "ValueInfoProto": {3: "doc_string", 4: "metadata_props"},
    "TypeProto": {4: "sequence_type", 5: "map_type", 6: "denotation", 7: "opaque_type", 8: "sparse_tensor_type"}
    | {9: "optional_type"},
    "DimensionProto": {3: "denotation"},
}
"""What else ONNX has in these messages, for errors."""
_TYPES = {"float": 2, "int64": 3, "int32": 5, "string": 9, "message": 11, "bytes": 12}  # FieldDescriptorProto.Type
_PACKAGE = "tgate_onnx"
MODEL = f"{_PACKAGE}.ModelProto"
"""The full name of the message that a file holds."""


def describe(file: Any) -> Any:
    """``file``, an empty ``FileDescriptorProto`` of protobuf, filled with :data:`FORM`."""
    file.name, file.package, file.syntax = "tgate_onnx.proto", _PACKAGE, "proto2"
    for name, fields in FORM.items():
        message = file.message_type.add(name=name)
        for text in fields.split():
            field_name, number, kind = re.split("[=:]", text)
            field = message.field.add(name=field_name, number=int(number), label=3 if kind.endswith("*") else 1)
            kind = kind.rstrip("*")
            field.type = _TYPES["message" if kind in FORM else kind]
            if kind in FORM:
                field.type_name = f".{_PACKAGE}.{kind}"
    return file


# --- rules --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Placed:
    """A tensor of the weight file: its dtype, by the manifest's name, its shape, and where its bytes lie, from the
    file's beginning."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    length: int


def check_graph(
    data: bytes,
    message: Any,
    spec: GraphSpec,
    weights_file: str,
    weights: Mapping[str, Placed],
    *,
    lowered: bool = False,
) -> None:
    """See that an ONNX file is a graph as export writes them, and the one that ``spec`` describes.

    ``message``: an empty message :data:`MODEL` of what :func:`describe` describes. ``weights``: every tensor of
    ``weights_file``, by its name there. ``lowered``: the graph was lowered for CUDA, and may hold
    :data:`~tgate_engine.onnx_operators.LOWERED` too. Raises :class:`BundleError` naming what is odd.
    """
    check = _Check(spec, weights_file, weights, lowered)
    try:
        check.model(data, message)
    except UnicodeDecodeError:
        check.refuse("holds a text that is no UTF-8")


class _Check:
    """One file's rules, each a method that raises."""

    def __init__(self, spec: GraphSpec, weights_file: str, weights: Mapping[str, Placed], lowered: bool) -> None:
        self._spec = spec
        self._weights_file = weights_file
        self._weights = weights
        self._lowered = lowered

    def refuse(self, what: str) -> NoReturn:
        if self._lowered:
            raise BundleError(f"{self._spec.file}, lowered, {what}; run tgate build again")
        raise BundleError(f"{self._spec.file} {what}; export the bundle again")

    def model(self, data: bytes, model: Any) -> None:
        if len(data) > MOST_BYTES:
            self.refuse(f"holds {len(data)} bytes, of at most {MOST_BYTES}")
        try:
            model.ParseFromString(data)
        except Exception:  # protobuf has classes of its own, and which ones depends on how it was built
            self.refuse("is not an ONNX graph")
        self._canonical(data, model)
        if model.ir_version not in IR_VERSIONS:
            self.refuse(f"has IR version {model.ir_version}, of {IR_VERSIONS[0]} to {IR_VERSIONS[-1]}")
        opsets = [(entry.domain, entry.version) for entry in model.opset_import[:3]]
        own = opsets[:1] if self._lowered and opsets[1:] == [(CONTRIB, 1)] else opsets
        if len(own) != 1 or own[0][0] or own[0][1] not in OPSETS:
            self.refuse(f"imports operators {opsets!r:.80}; the default ones of {OPSETS[0]} to {OPSETS[-1]} are known")
        self._text(model.producer_name, model.producer_version)
        self._graph(model.graph)

    def _canonical(self, data: bytes, model: Any) -> None:
        """No byte of the file means anything but what is in the message."""
        model.DiscardUnknownFields()
        if model.SerializeToString(deterministic=True) != data:
            whole = type(model)()
            whole.ParseFromString(data)
            odd = _unknown(whole)
            self.refuse(f"has {odd}, which no bundle has" if odd else "is not written as protobuf writes it")

    def _graph(self, graph: Any) -> None:
        if len(graph.node) > MOST_NODES:
            self.refuse(f"has {len(graph.node)} nodes, of at most {MOST_NODES}")
        self._interface("inputs", graph.input, self._spec.inputs)
        self._interface("outputs", graph.output, self._spec.outputs)
        self._text(graph.name)
        for value in graph.value_info:
            self._text(value.name, *(dim.dim_param for dim in value.type.tensor_type.shape.dim))
        made: set[str] = set()
        for value in graph.input:
            self._make(made, value.name)
        for tensor in graph.initializer:
            self._make(made, tensor.name)
            self._tensor(tensor)
        for node in graph.node:
            self._node(node, made)
        if missing := [value.name for value in graph.output if value.name not in made]:
            self.refuse(f"makes no output {missing[0]!r:.60}")

    def _make(self, made: set[str], name: str) -> None:
        self._text(name)
        if not name or name in made:
            self.refuse(f"makes the value {name!r:.60} twice" if name else "makes a value without a name")
        made.add(name)

    def _text(self, *texts: object) -> None:
        """They are UTF-8, which protobuf does not ask for: it gives bytes where they are not."""
        if not all(isinstance(text, str) for text in texts):
            self.refuse("holds a text that is no UTF-8")

    def _node(self, node: Any, made: set[str]) -> None:
        operator = node.op_type
        self._text(node.name)
        known = LOWERED if self._lowered and node.domain == CONTRIB else OPERATORS
        if operator not in known or (node.domain and known is OPERATORS):
            self.refuse(f"has operator {f'{node.domain}.' * bool(node.domain)}{operator!r:.60}, which no bundle has")
        if not takes(operator, node.input, node.output):
            self.refuse(
                f"has operator {operator} of inputs {[*node.input]!r:.60} and outputs {[*node.output]!r:.60}, which no "
                "bundle has"
            )
        for name in node.input:
            if name and name not in made:
                self.refuse(f"has operator {operator} that reads {name!r:.60}, which nothing before it makes")
        for name in node.output:
            if name:
                self._make(made, name)
        names = set()
        for attribute in node.attribute:
            name, field = attribute.name, _VALUES.get(attribute.type)
            if field is None:
                self.refuse(f"has operator {operator} with attribute {name!r:.60} of type {attribute.type}")
            if name in names or any(there.name not in ("name", "type", field) for there, _ in attribute.ListFields()):
                self.refuse(f"has operator {operator} with attribute {name!r:.60} of two values")
            if not may_say(operator, name, attribute.type, value := getattr(attribute, field)):
                self.refuse(
                    f"has operator {operator} with attribute {name!r:.60} of {value!r:.60}, which no bundle has"
                )
            names.add(name)

    def _tensor(self, tensor: Any) -> None:
        name, dims = tensor.name, tuple(tensor.dims)
        if tensor.data_type not in _SIZES or len(dims) > MOST_DIMENSIONS or any(dim < 0 for dim in dims):
            self.refuse(f"has constant {name!r:.60} of type {tensor.data_type} and shape {dims!r:.60}")
        length = prod(dims) * _SIZES[tensor.data_type]
        if tensor.data_location == _EXTERNAL:
            self._external(tensor, dims, length)
        elif tensor.data_location or tensor.external_data:
            self.refuse(f"has constant {name!r:.60} in no known place")
        elif len(tensor.raw_data) != length:
            self.refuse(f"has constant {name!r:.60} of {len(tensor.raw_data)} bytes, where its shape takes {length}")

    def _external(self, tensor: Any, dims: tuple[int, ...], length: int) -> None:
        """It is a tensor of the weight file, by name, dtype, shape and place."""
        name, entries = tensor.name, [(entry.key, entry.value) for entry in tensor.external_data[:4]]
        place = dict(entries)
        if len(entries) != 3 or place.keys() != {"location", "offset", "length"} or tensor.HasField("raw_data"):
            self.refuse(f"has weight {name!r:.60} with {entries!r:.120}; a location, an offset and a length are wanted")
        if place["location"] != self._weights_file or not self._weights_file:
            self.refuse(
                f"has weight {name!r:.60} in {place['location']!r:.60}; weights lie in {self._weights_file!r} alone"
            )
        self._text(*place.values())
        if not all(_NUMBER.fullmatch(place[key]) for key in ("offset", "length")):
            self.refuse(f"has weight {name!r:.60} with {entries!r:.120}, which are no numbers of bytes")
        own = self._weights.get(name)
        if own is None:
            self.refuse(f"has weight {name!r:.60}, which {self._weights_file} does not hold")
        got = (tensor.data_type, dims, int(place["offset"]), int(place["length"]))
        if got != (DTYPES[own.dtype].onnx, own.shape, own.offset, own.length) or own.length != length:
            self.refuse(
                f"has weight {name!r:.60} of type {got[0]}, shape {list(dims)!r:.60}, at {got[2]} with {got[3]} bytes; "
                f"{self._weights_file} has {own.dtype} {list(own.shape)!r:.60} at {own.offset} with {own.length}"
            )

    def _interface(self, what: str, values: Sequence[Any], tensors: Sequence[TensorSpec]) -> None:
        """The file's inputs or outputs are the manifest's, in any order."""
        specs = {tensor.name: tensor for tensor in tensors}
        if len(values) > len(specs):
            self.refuse(f"has {len(values)} {what}, its manifest says {len(specs)}")
        if odd := {value.name for value in values} ^ specs.keys():
            self.refuse(f"does not have the {what} its manifest says: {', '.join(sorted(map(repr, odd)))[:200]}")
        for value in values:
            spec, form = specs[value.name], value.type.tensor_type
            fits = form.elem_type == DTYPES[spec.dtype].onnx and len(form.shape.dim) == len(spec.shape)
            if not fits or not all(map(self._fits, form.shape.dim, spec.shape)):
                dims = [dim.dim_param or dim.dim_value for dim in form.shape.dim]
                self.refuse(
                    f"has {what[:-1]} {spec.name} of type {form.elem_type} and shape {dims!r:.60}; its manifest says "
                    f"{spec.dtype} {list(spec.shape)!r:.60}"
                )

    def _fits(self, dim: Any, size: int | str) -> bool:
        """A fixed dimension is that size; the batch has a name, or is the one size that it can have."""
        if dim.HasField("dim_value") and dim.HasField("dim_param"):
            return False
        least, most = self._spec.batch
        if isinstance(size, str):
            return (bool(dim.dim_param) and isinstance(dim.dim_param, str)) or least == most == dim.dim_value
        return bool(dim.dim_value == size)


def _unknown(model: Any) -> str:
    """The first field below ``model`` that :data:`FORM` does not have, in words; empty where there is none among the
    first messages."""
    todo = [model]
    for _ in range(_MOST_SEARCHED):
        if not todo:
            break
        message = todo.pop()
        name = message.DESCRIPTOR.name
        for field, value in message.ListFields():
            if field.type == _TYPES["message"]:
                todo += value[:_MOST_SEARCHED] if hasattr(value, "add") else [value]  # several have a way to add one
            message.ClearField(field.name)
        if rest := message.SerializeToString():
            number = _first_number(rest)
            return f"{REFUSED.get(name, {}).get(number, f'field {number}')} in a {name}"
    return ""


def _first_number(raw: bytes) -> int:
    """The number of the field that a message begins with."""
    tag = 0
    for place, byte in enumerate(raw[:5]):
        tag |= (byte & 127) << (7 * place)
        if byte < 128:
            break
    return tag >> 3
