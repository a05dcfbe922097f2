"""libtgate takes the lowered graphs that `tgate build` left, lays weights as Python does, and refuses by name what is
stale or damaged."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import onnx
import pytest

from tests.cpp.graphs import OK, Case, cpp_verdicts, python_verdict
from tests.fuzz.graph_mutations import mutate_graph
from tests.runtime.engines.ort_cuda.halves import halves
from tgate_engine.bundle import Bundle
from tgate_engine.onnx_form import Placed
from tgate_runtime.engines import open_builder
from tgate_runtime.engines.ort_cuda.lowering import VERSION, lower
from tgate_runtime.engines.ort_cuda.lowering.laid import BEYOND
from tgate_runtime.weights import map_weights, read_places

FOLDER = Path("engines", "ort-cuda")
SOURCE = Path(__file__).parents[2] / "runtime/cpp/src/contract/lowered.cpp"
Asking = Callable[[Bundle], "subprocess.CompletedProcess[str]"]


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    made = halves(tmp_path / "bundle")
    open_builder("ort-cuda").build(made, [*made.manifest.shapes[0].graphs.values()])
    return made


@pytest.fixture
def asked(cpp_build: Path) -> Asking:
    def ask(bundle: Bundle) -> subprocess.CompletedProcess[str]:
        return subprocess.run([cpp_build / "probe-lowered", bundle.path], capture_output=True, text=True, check=False)

    return ask


def test_weights_are_laid_as_python_lays_them(bundle: Bundle, asked: Asking) -> None:
    (got,) = json.loads(asked(bundle).stdout)["decoder.onnx"]
    assert got["outputs"] == ["image"]
    lowered = lower(bundle.read("decoder.onnx"))
    assert got["sha256"] == hashlib.sha256(lowered.data).hexdigest()
    mapped = map_weights(bundle.file(bundle.manifest.weights))
    turned = {name: each.of(mapped[each.source]) for name, each in lowered.weights.items() if name != each.source}
    assert len(turned) == 3
    assert got["weights"] == {
        name: hashlib.sha256(weight.array.tobytes()).hexdigest() for name, weight in turned.items()
    }


def test_a_copy_without_the_folder_works(bundle: Bundle, asked: Asking) -> None:
    (bundle.path / FOLDER).rename(bundle.path.parent / "gone")
    assert asked(bundle).stdout == "null\n"


def test_a_graph_that_was_not_built_is_taken_as_it_is(bundle: Bundle, asked: Asking) -> None:
    edit_index(bundle, lambda index: index["graphs"].clear())
    assert json.loads(asked(bundle).stdout) == {"decoder.onnx": []}


def edit_index(bundle: Bundle, edit: Callable[[Any], object]) -> None:
    path = bundle.path / FOLDER / "lowered.json"
    index = json.loads(path.read_text())
    edit(index)
    path.write_text(json.dumps(index))


def entry(**changes: Any) -> Callable[[Any], object]:
    return lambda index: index["graphs"]["decoder.onnx"].update(changes)


def variant(**changes: Any) -> Callable[[Any], object]:
    return lambda index: index["graphs"]["decoder.onnx"]["lowered"][0].update(changes)


def weight(name: str = "conv.weight:0231", **changes: Any) -> Callable[[Any], object]:
    def edit(index: Any) -> None:
        weights = index["graphs"]["decoder.onnx"]["lowered"][0]["weights"]
        weights[name] = {**weights["conv.weight:0231"], **changes}

    return edit


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (
            lambda index: index.update(version=VERSION + 1),
            f"is of version {VERSION + 1}, and this library takes {VERSION}",
        ),
        (lambda index: index.update(more=1), "'more' is not known here"),
        (entry(source="0" * 64), "decoder.onnx was lowered from another graph than the manifest lists"),
        (entry(lowered=[]), "decoder.onnx was not lowered with all of its outputs first"),
        (variant(outputs=["image", "more"]), "decoder.onnx was lowered for outputs that it does not have"),
        (variant(outputs=[]), "decoder.onnx was lowered for outputs that it does not have"),
        (variant(sha256="0" * 64), f"{'0' * 64}.onnx is missing"),
        (variant(sha256="../../decoder"), "expected a SHA-256 in hexadecimal digits, got '../../decoder'"),
        (variant(weights={}), ":float32', which weights.safetensors does not hold"),
        (weight("conv.odd:0231", source="conv.odd"), "lays weight 'conv.odd', which the weight file does not hold"),
        (weight("conv.weight:0233", order=[0, 2, 3, 3]), "lays weight 'conv.weight' as it cannot be laid"),
        (weight("conv.weight:021", order=[0, 2, 1]), "lays weight 'conv.weight' as it cannot be laid"),
        (weight(order=[0, 2, 3, 9]), "expected whole numbers from 0 to 7"),
        (weight(order=[0, 3, 2, 1]), "lays 'conv.weight:0321' as 'conv.weight:0231'"),
        (weight(dtype="float32"), "lays weight 'conv.weight' as it cannot be laid"),
        (weight(dtype="float8"), "expected one of float32, float16, bfloat16, int64, uint8, got 'float8'"),
        (weight("conv.weight"), "lays 'conv.weight:0231' as 'conv.weight'"),
    ],
)
def test_what_is_stale_or_odd_is_refused(
    edit: Callable[[Any], object], says: str, bundle: Bundle, asked: Asking
) -> None:
    edit_index(bundle, edit)
    refused(asked(bundle), says)


def refused(done: subprocess.CompletedProcess[str], says: str) -> None:
    assert done.returncode == 1
    assert says in done.stderr
    assert "run tgate build" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[:-1] + b"\0", "is damaged: its SHA-256 is not its name"),
        (lambda data: data[:-1], "is damaged: its SHA-256 is not its name"),
    ],
)
def test_a_damaged_graph_is_refused(damage: Callable[[bytes], bytes], says: str, bundle: Bundle, asked: Asking) -> None:
    (path,) = (bundle.path / FOLDER).glob("*.onnx")
    path.write_bytes(damage(path.read_bytes()))
    refused(asked(bundle), says)


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"[]", b'{"version": 1, "version": 1}'])
def test_a_damaged_index_is_refused(text: bytes, bundle: Bundle, asked: Asking) -> None:
    (bundle.path / FOLDER / "lowered.json").write_bytes(text)
    refused(asked(bundle), "lowered.json")


def test_both_sides_have_one_version_and_one_place() -> None:
    text = SOURCE.read_text()
    assert re.findall(r"constexpr std::int64_t version = (\d+);", text) == [str(VERSION)]
    assert re.findall(r"std::int64_t\{1\} << (\d+);", text) == [str(BEYOND.bit_length() - 1)]


# --- what a lowered graph may hold --------------------------------------------------------------


def case_of(bundle: Bundle) -> Case:
    lowered, spec = lower(bundle.read("decoder.onnx")), bundle.manifest.shapes[0].graphs["decoder"]
    places = read_places(bundle.file(bundle.manifest.weights))
    for name, each in lowered.weights.items():
        if name != each.source:
            own = places[each.source]
            dtype = each.dtype or own.dtype
            shape = tuple(own.shape[i] for i in each.order) or own.shape
            length = own.length // {"float16": 2, "float32": 4}[own.dtype] * {"float16": 2, "float32": 4}[dtype]
            places[name] = Placed(dtype, shape, BEYOND, length)
    return Case(lowered.data, spec, bundle.manifest.weights, places, lowered=True)


def edited(case: Case, edit: Callable[[Any], object]) -> Case:
    model = onnx.load_model_from_string(case.data)
    edit(model)
    return replace(case, data=model.SerializeToString())


def node_of(model: Any, operator: str) -> Any:
    return next(node for node in model.graph.node if node.op_type == operator)


ODD: dict[str, tuple[Callable[[Any], object], str]] = {
    "another domain": (lambda m: setattr(node_of(m, "NhwcConv"), "domain", "ai.odd"), "has operator ai.odd."),
    "no domain": (lambda m: node_of(m, "NhwcConv").ClearField("domain"), "has operator 'NhwcConv'"),
    "ONNX's operator there": (lambda m: setattr(node_of(m, "Cast"), "domain", "com.microsoft"), "com.microsoft.'Cast'"),
    "an operator that runs code": (
        lambda m: setattr(node_of(m, "NhwcConv"), "op_type", "PyOp"),
        "com.microsoft.'PyOp'",
    ),
    "another version": (lambda m: setattr(m.opset_import[1], "version", 2), "imports operators"),
    "two domains": (lambda m: m.opset_import.add(domain="ai.odd", version=1), "imports operators"),
    "no groups": (lambda m: _set(m, "GroupNorm", "groups", 0), "attribute 'groups' of 0"),
    "an attribute": (lambda m: setattr(node_of(m, "GroupNorm").attribute[0], "name", "odd"), "attribute 'odd'"),
}


def _set(model: Any, operator: str, name: str, value: int) -> None:
    (attribute,) = (each for each in node_of(model, operator).attribute if each.name == name)
    attribute.i = value


def test_a_lowered_graph_passes_as_one_alone(cpp_build: Path, bundle: Bundle) -> None:
    case = case_of(bundle)
    assert {node.domain for node in onnx.load_model_from_string(case.data).graph.node} == {"", "com.microsoft"}
    cases = [case, replace(case, lowered=False)]
    said = [*zip(cpp_verdicts(cpp_build, cases), map(python_verdict, cases), strict=True)]
    assert said[0] == (OK, OK)
    assert all("imports operators" in each and "export the bundle again" in each for each in said[1])


@pytest.mark.parametrize("name", ODD)
def test_odd_ones_are_refused_by_both(name: str, cpp_build: Path, bundle: Bundle) -> None:
    edit, says = ODD[name]
    case = edited(case_of(bundle), edit)
    for verdict in (*cpp_verdicts(cpp_build, [case]), python_verdict(case)):
        assert says in verdict
        assert verdict.startswith("decoder.onnx, lowered, ")
        assert verdict.endswith("; run tgate build again")


def test_both_say_the_same_of_mutations(cpp_build: Path, bundle: Bundle) -> None:
    case, random = case_of(bundle), Random(5)
    cases = [case, *(replace(case, data=mutate_graph(case.data, random)) for _ in range(400))]
    said = [*zip(cpp_verdicts(cpp_build, cases), map(python_verdict, cases), strict=True)]
    assert not [both for both in said if (both[0] == OK) != (both[1] == OK)]
    assert {OK} < {cpp for cpp, _ in said}
