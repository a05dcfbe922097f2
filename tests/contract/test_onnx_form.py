"""The form of graphs is ONNX's own, less what is refused by name; refusing is ``tests/runtime/test_graph_check.py``."""

from __future__ import annotations

import onnx
from google.protobuf import descriptor_pb2, descriptor_pool
from onnx import defs, onnx_ml_pb2

from tgate_engine.onnx_form import FORM, MODEL, OPSETS, REFUSED, describe

NESTED = {"TensorTypeProto": "TypeProto.Tensor", "DimensionProto": "TensorShapeProto.Dimension"}
"""Messages that ONNX has inside others."""


def described() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto()
    assert describe(file) is file
    return file


def onnx_message(name: str) -> descriptor_pb2.DescriptorProto:
    outer, _, inner = NESTED.get(name, name).partition(".")
    own = descriptor_pb2.DescriptorProto()
    message = onnx_ml_pb2.DESCRIPTOR.message_types_by_name[outer]
    (message.nested_types_by_name[inner] if inner else message).CopyToProto(own)
    return own


def test_every_field_is_onnx_own() -> None:
    """Its number, whether there are several, how several are written, and its kind; enums are numbers."""
    enum, number = descriptor_pb2.FieldDescriptorProto.TYPE_ENUM, descriptor_pb2.FieldDescriptorProto.TYPE_INT32
    seen = 0
    for message in described().message_type:
        theirs = {field.name: field for field in onnx_message(message.name).field}
        for field in message.field:
            their = theirs[field.name]
            kind = number if their.type == enum else their.type
            assert (field.number, field.label, field.type) == (their.number, their.label, kind), field.name
            assert not their.options.packed, f"{field.name} would be written in another way"
            seen += 1
    assert seen == sum(len(fields.split()) for fields in FORM.values())


def test_everything_else_that_onnx_has_is_refused_by_its_name() -> None:
    for name, fields in FORM.items():
        known = {int(field.partition("=")[2].partition(":")[0]) for field in fields.split()}
        others = {field.number: field.name for field in onnx_message(name).field if field.number not in known}
        assert REFUSED.get(name, {}) == others, name


def test_protobuf_takes_the_form() -> None:
    pool = descriptor_pool.DescriptorPool()
    pool.Add(described())
    assert pool.FindMessageTypeByName(MODEL).fields_by_name["graph"].number == 7


def test_the_versions_are_ones_that_onnx_knows() -> None:
    assert max(OPSETS) <= defs.onnx_opset_version()
    assert onnx.IR_VERSION >= 10
