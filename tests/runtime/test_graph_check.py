"""Graphs that an attacker wrote, with digests that fit: each is refused in a line that names what is odd in it."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.hostile import relisted, with_graph
from tests.runtime.engines.small import WEIGHTS, Small, outside, save, tensor
from tgate_engine.bundle import Bundle
from tgate_engine.errors import BundleError
from tgate_engine.onnx_form import MOST_NODES
from tgate_runtime.graph_check import read_graphs


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(tmp_path_factory.mktemp("check") / "bundle")


@pytest.fixture
def bundle(small: Small, tmp_path: Path) -> Bundle:
    """A copy to rewrite."""
    return replace(small.bundle, path=Path(shutil.copytree(small.bundle.path, tmp_path / "bundle")))


def check(bundle: Bundle, name: str = "full") -> bytes:
    spec = bundle.manifest.shapes[0].graphs[name]
    return read_graphs(bundle, [spec])[spec.file]


def test_a_graph_comes_as_it_lies_there(bundle: Bundle) -> None:
    for name, spec in bundle.manifest.shapes[0].graphs.items():
        assert check(bundle, name) == (bundle.path / spec.file).read_bytes()


def test_a_graph_is_what_its_manifest_lists_even_where_digests_were_not_asked_for(bundle: Bundle) -> None:
    path = bundle.path / "full.onnx"
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    with pytest.raises(BundleError, match=r"full\.onnx has SHA-256"):
        check(bundle)


# --- weights ------------------------------------------------------------------------------------


def first_weight(model: Any) -> Any:
    return next(t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL)


def entry(model: Any, key: str) -> Any:
    return next(e for e in first_weight(model).external_data if e.key == key)


def set_entry(key: str, change: Callable[[str], str]) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        entry(model, key).value = change(entry(model, key).value)

    return edit


def as_raw(model: Any) -> None:
    first_weight(model).raw_data = b"x"


def again(model: Any) -> None:
    first_weight(model).external_data.append(entry(model, "location"))


def of_dtype(model: Any) -> None:
    first_weight(model).data_type = TensorProto.INT32


def of_shape(model: Any) -> None:
    dims = first_weight(model).dims
    dims[:] = [dims[0] * dims[1]]


def renamed(model: Any) -> None:
    """Another tensor's place under a name of the file."""
    one, other = [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL][:2]
    places = [[(e.key, e.value) for e in t.external_data] for t in (other, one)]
    for each, place in zip((one, other), places, strict=True):
        del each.external_data[:]
        for key, value in place:
            each.external_data.add(key=key, value=value)


WEIGHTS_ELSEWHERE: dict[str, Callable[[Any], object]] = {
    "another file of the bundle": set_entry("location", lambda _: "other.bin"),
    "a file above": set_entry("location", lambda _: f"../bundle/{WEIGHTS}"),
    "the same file, spelt otherwise": set_entry("location", lambda _: f"./{WEIGHTS}"),
    "an absolute path": set_entry("location", lambda _: "/etc/passwd"),
    "the process's own memory": set_entry("location", lambda _: "*/_ORT_MEM_ADDR_/*"),
    "another place": set_entry("offset", lambda was: str(int(was) + 4)),
    "beyond the end": set_entry("offset", lambda _: str(2**40)),
    "below the beginning": set_entry("offset", lambda _: "-8"),
    "beyond all numbers": set_entry("offset", lambda _: "9" * 400),
    "a number spelt otherwise": set_entry("offset", lambda was: f" {was}"),
    "a number with a zero before it": set_entry("offset", lambda was: f"0{was}"),
    "another length": set_entry("length", lambda was: str(int(was) - 4)),
    "two locations": again,
    "two contents": as_raw,
    "another dtype": of_dtype,
    "another shape": of_shape,
    "two that were exchanged": renamed,
    "no length": lambda m: first_weight(m).external_data.remove(entry(m, "length")),
    "a checksum": lambda m: first_weight(m).external_data.add(key="checksum", value="x"),
}


@pytest.mark.parametrize("what", WEIGHTS_ELSEWHERE)
def test_weights_lie_where_the_weight_file_says(bundle: Bundle, what: str) -> None:
    (bundle.path / "other.bin").write_bytes((bundle.path / WEIGHTS).read_bytes())
    hostile = with_graph(bundle, "full.onnx", WEIGHTS_ELSEWHERE[what])
    with pytest.raises(BundleError, match=r"^full\.onnx has weight 'w\.\w+'.*; export the bundle again$") as error:
        check(hostile)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 500


def test_a_weight_that_the_file_does_not_hold(bundle: Bundle) -> None:
    def edit(model: Any) -> None:
        model.graph.initializer.append(outside("mine", 0, 4, (1,)))

    with pytest.raises(BundleError, match=r"weight 'mine', which weights\.safetensors does not hold"):
        check(with_graph(bundle, "full.onnx", edit))


def test_a_bundle_without_weights_has_none(bundle: Bundle) -> None:
    bare = replace(bundle, manifest=replace(bundle.manifest, weights=""))
    with pytest.raises(BundleError, match="weights lie in '' alone"):
        check(bare)


# --- graphs -------------------------------------------------------------------------------------


def append_node(operator: str, *, domain: str = "", **attributes: Any) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        model.graph.node.append(helper.make_node(operator, ["latents"], ["more"], domain=domain, **attributes))

    return edit


def body() -> Any:
    return helper.make_graph([], "body", [], [])


def loop(model: Any) -> None:
    """2^62 times nothing."""
    numbers = [numpy_helper.from_array(np.array(2**62), "trips"), numpy_helper.from_array(np.array(True), "on")]
    model.graph.initializer.extend(numbers)
    model.graph.node.append(helper.make_node("Loop", ["trips", "on"], [], body=body()))


def two_values(model: Any) -> None:
    attribute = helper.make_attribute("axis", 1)
    attribute.floats.append(2.0)
    model.graph.node[0].attribute.append(attribute)


def function(model: Any) -> None:
    model.functions.append(helper.make_function("", "Add", ["a"], ["b"], [], model.opset_import[:1]))


def sparse(model: Any) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "sparse")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "indices")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))


def strings(model: Any) -> None:
    model.graph.initializer.append(TensorProto(name="text", data_type=TensorProto.STRING, dims=[1], string_data=[b"x"]))


def training(model: Any) -> None:
    model.training_info.add(initialization=body())


def short(model: Any) -> None:
    model.graph.initializer[-1].raw_data = b"x"


def sequence(model: Any) -> None:
    kind = helper.make_sequence_type_proto(helper.make_tensor_type_proto(TensorProto.FLOAT, [1]))
    model.graph.value_info.append(helper.make_value_info("inner", kind))


def notes(model: Any) -> None:
    model.metadata_props.add(key="ort_config", value="{}")


def renumbered(version: int) -> Callable[[Any], None]:
    def edit(model: Any) -> None:
        model.opset_import[0].version = version

    return edit


def twice(model: Any) -> None:
    model.graph.node.append(model.graph.node[0])


def backwards(model: Any) -> None:
    nodes = list(model.graph.node)
    del model.graph.node[:]
    model.graph.node.extend(reversed(nodes))


def no_opset(model: Any) -> None:
    del model.opset_import[:]


def other_name(model: Any) -> None:
    model.graph.input[0].name = "other"


def other_dtype(model: Any) -> None:
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def other_size(model: Any) -> None:
    model.graph.output[0].type.tensor_type.shape.dim[1].dim_value = 2**40


def no_shape(model: Any) -> None:
    model.graph.output[0].type.tensor_type.ClearField("shape")


def one_more(model: Any) -> None:
    model.graph.input.append(helper.make_tensor_value_info("more", TensorProto.FLOAT, [1]))


def nameless(model: Any) -> None:
    """Which makes ONNX Runtime read at address 0."""
    model.graph.node.append(helper.make_node("Sum", ["latents", ""], ["more"]))


ODD: dict[str, tuple[Callable[[Any], object], str]] = {
    "an endless loop": (loop, "g in a AttributeProto"),
    "a branch": (append_node("If", then_branch=body(), else_branch=body()), "g in a AttributeProto"),
    "an operator of nobody": (append_node("NoSuch"), "operator 'NoSuch', which no bundle has"),
    "an operator with a loop in it": (append_node("SequenceMap"), "operator 'SequenceMap'"),
    "noise of its own": (append_node("RandomNormalLike"), "operator 'RandomNormalLike'"),
    "a foreign domain": (append_node("Gelu", domain="com.microsoft"), r"operator com\.microsoft\.'Gelu'"),
    "the default domain's other name": (append_node("Gelu", domain="ai.onnx"), r"operator ai\.onnx\.'Gelu'"),
    "a tensor in an attribute": (append_node("Gelu", v=numpy_helper.from_array(np.ones(1))), "t in a AttributeProto"),
    "texts in an attribute": (append_node("Gelu", v=["a", "b"]), "strings in a AttributeProto"),
    "an attribute with two values": (two_values, "attribute 'axis' of two values"),
    "an attribute of no meaning": (append_node("Gelu", approximate="x"), "'approximate' of b'x', which no bundle has"),
    "an attribute of another operator": (append_node("Gelu", axis=1), "operator Gelu with attribute 'axis' of 1,"),
    "an input that has no name": (nameless, r"operator Sum of inputs \['latents', ''\] and outputs \['more'\], which"),
    "an input too few": (append_node("Add"), r"operator Add of inputs \['latents'\]"),
    "a function in place of an operator": (function, "functions in a ModelProto"),
    "a sparse tensor": (sparse, "sparse_initializer in a GraphProto"),
    "texts": (strings, "string_data in a TensorProto"),
    "training": (training, "training_info in a ModelProto"),
    "a constant that is cut short": (short, "of 1 bytes, where its shape takes"),
    "a sequence": (sequence, "sequence_type in a TypeProto"),
    "notes for an engine": (notes, "metadata_props in a ModelProto"),
    "old operators": (renumbered(7), r"imports operators \[\('', 7\)\]"),
    "operators to come": (renumbered(2**40), "imports operators"),
    "no operators": (no_opset, r"imports operators \[\]"),
    "foreign operators": (lambda m: m.opset_import.add(domain="com.x", version=1), "imports operators"),
    "an old form": (lambda m: setattr(m, "ir_version", 3), "IR version 3, of 10 to 11"),
    "a value that is made twice": (twice, "makes the value 'flat' twice"),
    "nodes in no order": (backwards, "which nothing before it makes"),
    "an input of another name": (other_name, "does not have the inputs its manifest says: 'latents', 'other'"),
    "an input of another dtype": (other_dtype, "input latents of type 10"),
    "an output of another size": (other_size, "output next_latents of type 1 and shape"),
    "an output of any shape": (no_shape, r"output next_latents of type 1 and shape \[\]"),
    "an input too many": (one_more, "has 4 inputs, its manifest says 3"),
    "no graph": (lambda m: b"", "has IR version 0"),
    "no ONNX": (lambda m: b"\xff" * 100, "is not an ONNX graph"),
    "two graphs in one file": (lambda m: m.SerializeToString() * 2, "not written as protobuf writes it"),
    "a field that ONNX lacks": (lambda m: m.SerializeToString() + b"\xf8\x3f\x01", "field 1023 in a ModelProto"),
    "a number spelt at length": (
        lambda m: b"\x08\x8a\x00" + m.SerializeToString()[2:],
        "not written as protobuf writes it",
    ),
}


@pytest.mark.parametrize("what", ODD)
def test_a_graph_with(bundle: Bundle, what: str) -> None:
    edit, says = ODD[what]
    with pytest.raises(BundleError, match=says) as error:
        check(with_graph(bundle, "full.onnx", edit))
    assert str(error.value).startswith("full.onnx ")
    assert str(error.value).isprintable()


def named(field: str) -> Callable[[Any], None]:
    """Sets a text of the file, which :func:`test_texts_are_utf_8` finds again."""

    def edit(model: Any) -> None:
        graph = model.graph
        match field:
            case "producer":
                model.producer_name = "@@"
            case "graph":
                graph.name = "@@"
            case "node":
                graph.node[0].name = "@@"
            case "output of a node":
                graph.node.append(helper.make_node("Gelu", ["latents"], ["@@"]))
            case "value":
                graph.value_info.append(helper.make_tensor_value_info("@@", TensorProto.FLOAT, [1]))
            case "dimension of a value":
                graph.value_info.append(helper.make_tensor_value_info("inner", TensorProto.FLOAT, ["@@"]))
            case "batch":
                graph.input[0].type.tensor_type.shape.dim[0].dim_param = "@@"
            case "operator":
                graph.node[0].op_type = "@@"
            case "attribute":
                node = helper.make_node("Gelu", ["latents"], ["more"])
                node.attribute.append(helper.make_attribute("@@", 1))
                graph.node.append(node)
            case "constant":
                graph.initializer.append(numpy_helper.from_array(np.zeros(1, np.float32), "@@"))
            case _:
                entry(model, field).value = "@@"

    return edit


TEXTS = ("producer", "graph", "node", "output of a node", "value", "dimension of a value", "batch", "operator")
MORE_TEXTS = ("attribute", "constant", "location", "offset", "length")


@pytest.mark.parametrize("field", TEXTS + MORE_TEXTS)
def test_texts_are_utf_8(bundle: Bundle, field: str) -> None:
    """protobuf does not see to it, and gives bytes in place of text."""

    def edit(model: Any) -> bytes:
        named(field)(model)
        content = model.SerializeToString()
        assert content.count(b"@@") == 1
        return bytes(content.replace(b"@@", b"\xff@"))

    with pytest.raises(BundleError, match=r"^full\.onnx ") as error:
        check(with_graph(bundle, "full.onnx", edit))
    assert str(error.value).isprintable()


def test_an_escape_is_not_sent_to_a_terminal(bundle: Bundle) -> None:
    with pytest.raises(BundleError) as error:
        check(with_graph(bundle, "full.onnx", append_node("\x1b[2J\n")))
    assert str(error.value).isprintable()


def bomb(entries: bytes, count: int) -> bytes:
    """A file whose one graph is ``count`` times the same field."""
    inner = entries * count
    length, size = len(inner), b""
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    return b"\x08\x0a\x3a" + size + bytes([length]) + inner + b"\x42\x02\x10\x17"


@pytest.mark.parametrize(
    ("entries", "count"),
    [
        (b"\x0a\x00", 200_000),  # nodes
        (b"\x2a\x00", 200_000),  # initializers
        (b"\x5a\x00", 200_000),  # inputs
        (b"\x0a\x02\x2a\x00", MOST_NODES),  # an attribute in each
        (b"\xfa\x07\x00", 200_000),  # a field that ONNX lacks
    ],
)
def test_hundreds_of_thousands_of_nothing_end_at_once(bundle: Bundle, entries: bytes, count: int) -> None:
    hostile = with_graph(bundle, "full.onnx", lambda _: bomb(entries, count))
    begin_s = time.process_time()
    with pytest.raises(BundleError, match=r"^full\.onnx "):
        check(hostile)
    assert time.process_time() - begin_s < 3


def test_a_file_beyond_all_bounds_is_not_parsed(bundle: Bundle) -> None:
    (bundle.path / "full.onnx").write_bytes(bytes(65 << 20))
    with pytest.raises(BundleError, match="holds 68157440 bytes, of at most 67108864"):
        check(relisted(bundle, "full.onnx"))


def test_a_large_graph_takes_a_fraction_of_a_second(bundle: Bundle) -> None:
    """As many nodes as SDXL has; the bound is loose, for machines that do other work."""
    nodes = [helper.make_node("Add", [f"v{i}" if i else "x", "one"], [f"v{i + 1}"]) for i in range(6000)]
    nodes.append(helper.make_node("Identity", ["v6000"], ["y"]))
    one = numpy_helper.from_array(np.ones(3, np.float32), "one")
    x, y = tensor("x", 1, 3), tensor("y", 1, 3)
    spec = save(bundle.path / "full.onnx", nodes, [x], [y], [one], batch=(1, 1))
    large = relisted(bundle, "full.onnx")
    begin_s = time.process_time()
    read_graphs(large, [spec])
    assert time.process_time() - begin_s < 1


def test_onnx_itself_would_take_what_is_refused(bundle: Bundle) -> None:
    """The graphs above are refused for what they are, not because they are broken."""
    with_graph(bundle, "full.onnx", append_node("If", then_branch=body(), else_branch=body()))
    assert onnx.load(bundle.path / "full.onnx", load_external_data=False).graph.node[-1].op_type == "If"
