"""libtgate lets through the graphs that Python lets through, and no other: what is compared is never a list of its own,
but what Python's check says of the same bytes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from tests.cpp.graphs import OK, Case, cpp_verdicts, python_verdict
from tests.cpp.wire import rewritten
from tests.fuzz.graph_mutations import mutate_graph
from tests.fuzz.mutations import mutate_bytes
from tests.hostile import with_graph
from tests.runtime.engines.small import Small, save, tensor
from tests.runtime.test_graph_check import MORE_TEXTS, ODD, TEXTS, WEIGHTS_ELSEWHERE, bomb, named
from tests.toy_bundle import Toy, build
from tgate_engine.bundle import Bundle
from tgate_engine.manifest_json import parse_manifest
from tgate_engine.onnx_form import MOST_BYTES, MOST_NODES, Placed
from tgate_engine.onnx_operators import INPUTS, NAMES, OPERATORS, RULES
from tgate_runtime.weights import read_places

CPP = Path(__file__).parents[2] / "runtime" / "cpp"
MINI = Path(__file__).parents[2] / "tgate_engine" / "models" / "mini"
Edit = Callable[[Any], object]


def cases_of(bundle: Bundle) -> list[Case]:
    weights = read_places(bundle.file(bundle.manifest.weights))
    return [
        Case(bundle.file(spec.file).read_bytes(), spec, bundle.manifest.weights, weights)
        for shape in bundle.manifest.shapes
        for spec in shape.graphs.values()
    ]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Small(tmp_path_factory.mktemp("check") / "bundle").bundle


@pytest.fixture(scope="module")
def toys(tmp_path_factory: pytest.TempPathFactory) -> list[Case]:
    """All graphs of three toy bundles: guided, conditioned by a picture, of two ranges of batches."""
    kinds = (Toy(), Toy(guided=False, pictured=True), Toy(batches=((1, 1), (2, 4))))
    folder = tmp_path_factory.mktemp("toys")
    paths = [build(folder / str(number), toy, goldens=False) for number, toy in enumerate(kinds)]
    return [case for path in paths for case in cases_of(Bundle.open(path))]


@pytest.fixture
def full(small: Bundle, tmp_path: Path) -> Callable[[Edit], Case]:
    """``full`` of the small bundle, as an edit of its model leaves it."""

    def edited(edit: Edit) -> Case:
        copy = replace(small, path=Path(shutil.copytree(small.path, tmp_path / "bundle")))
        case = cases_of(with_graph(copy, "full.onnx", edit))[0]
        assert case.spec.file == "full.onnx"
        return case

    return edited


def differences(cpp_build: Path, cases: list[Case]) -> tuple[list[tuple[str, str]], int]:
    """What both say where one refuses and the other does not, and how many both let through."""
    said = [*zip(cpp_verdicts(cpp_build, cases), map(python_verdict, cases), strict=True)]
    return [both for both in said if (both[0] == OK) != (both[1] == OK)], sum(both == (OK, OK) for both in said)


# --- what is let through ------------------------------------------------------------------------


def test_graphs_that_export_writes(cpp_build: Path, toys: list[Case], tmp_path: Path) -> None:
    manifest = parse_manifest((MINI / "manifest.json").read_text(encoding="utf-8"))
    whole = tmp_path / "weights"
    with whole.open("wb") as file:
        file.write((MINI / "weights.head").read_bytes())
        file.truncate(manifest.files[manifest.weights].bytes)
    weights = read_places(whole)
    mini = [
        Case((MINI / spec.file).read_bytes(), spec, manifest.weights, weights)
        for spec in manifest.shapes[0].graphs.values()
    ]
    assert len(mini) == 6
    assert cpp_verdicts(cpp_build, mini + toys) == [OK] * len(mini + toys)


# --- what is refused, in Python's words ---------------------------------------------------------


@pytest.mark.parametrize("what", ODD)
def test_a_graph_with(cpp_build: Path, full: Callable[[Edit], Case], what: str) -> None:
    edit, says = ODD[what]
    (line,) = cpp_verdicts(cpp_build, [full(edit)])
    assert re.search(says, line)
    assert line.startswith("full.onnx ")
    assert line.endswith("; export the bundle again")
    assert line.isprintable()


@pytest.mark.parametrize("what", WEIGHTS_ELSEWHERE)
def test_weights_lie_where_the_weight_file_says(cpp_build: Path, full: Callable[[Edit], Case], what: str) -> None:
    case = full(WEIGHTS_ELSEWHERE[what])
    (line,) = cpp_verdicts(cpp_build, [case])
    assert re.search(r"^full\.onnx has weight 'w\.\w+'.*; export the bundle again$", line)
    assert line.split(" with ")[0] == python_verdict(case).split(" with ")[0]
    assert len(line) < 500


@pytest.mark.parametrize("field", TEXTS + MORE_TEXTS)
def test_texts_are_utf_8(cpp_build: Path, full: Callable[[Edit], Case], field: str) -> None:
    def edit(model: Any) -> bytes:
        named(field)(model)
        return bytes(model.SerializeToString().replace(b"@@", b"\xff@"))

    (line,) = cpp_verdicts(cpp_build, [full(edit)])
    assert line.startswith("full.onnx ")
    assert line.isprintable()


def test_a_bundle_without_weights_has_none(cpp_build: Path, full: Callable[[Edit], Case]) -> None:
    bare = replace(full(lambda model: None), weights_file="", weights={})
    (line,) = cpp_verdicts(cpp_build, [bare])
    assert "weights lie in '' alone" in line


@pytest.mark.parametrize(
    ("entries", "count"),
    [(b"\x0a\x00", 200_000), (b"\x2a\x00", 200_000), (b"\x5a\x00", 200_000), (b"\x0a\x02\x2a\x00", MOST_NODES)],
)
def test_hundreds_of_thousands_of_nothing_end_at_once(
    cpp_build: Path, full: Callable[[Edit], Case], entries: bytes, count: int
) -> None:
    case = full(lambda model: bomb(entries, count))
    (line,), (least_ns,) = cpp_verdicts(cpp_build, [case]), cpp_verdicts(cpp_build, [case], "T")
    assert line.startswith("full.onnx ")
    assert int(least_ns) < 1e9


def test_a_file_beyond_all_bounds(cpp_build: Path, full: Callable[[Edit], Case]) -> None:
    case = replace(full(lambda model: None), data=bytes(MOST_BYTES + 1))
    assert cpp_verdicts(cpp_build, [case]) == [python_verdict(case)]


# --- what nobody thought of ---------------------------------------------------------------------


def test_every_bit_of_a_small_graph(cpp_build: Path, toys: list[Case]) -> None:
    """Flipped, and every byte left out, doubled, or set to another; and the file cut everywhere."""
    case = min(toys, key=lambda case: len(case.data))
    data, changed = case.data, []
    for at in range(len(data)):
        changed += [data[:at] + bytes([data[at] ^ 1 << bit]) + data[at + 1 :] for bit in range(8)]
        changed += [data[:at] + other + data[at + 1 :] for other in (b"", data[at : at + 1] * 2, b"\x00", b"\x80\x00")]
        changed.append(data[:at])
    cases = [replace(case, data=each) for each in changed]
    odd, both = differences(cpp_build, cases)
    assert not odd
    assert len(cases) > 4000
    assert both > 5  # a letter of a name that nobody reads


@pytest.mark.parametrize("seed", range(4))
def test_graphs_changed_at_random(cpp_build: Path, toys: list[Case], seed: int) -> None:
    """Bytes, messages, and how messages are written."""
    rng = Random(seed)
    ways = (rewritten, mutate_graph, mutate_bytes)

    def changed() -> Iterator[Case]:
        for _ in range(800):
            case = rng.choice(toys)
            way = rng.choice(ways)
            for _ in range(rng.choice((1, 1, 1, 2, 3))):
                case = replace(case, data=way(case.data, rng))
            yield case

    odd, both = differences(cpp_build, [*changed()])
    assert not odd
    assert 80 < both < 600


def test_every_attribute_of_every_operator(cpp_build: Path, tmp_path: Path) -> None:
    """Every operator with as many inputs as it takes, and one less and one more; and each attribute of each with
    numbers, texts and lists at the edges of what it may be."""
    numbers = [0, 1, -1, 2, 3, 4, 5, 6, 7, 8, -8, 9, -9, 10, 11, 12, 16, 63, 64, 65, 2**16 - 1, 2**16, 2**40, -(2**40)]
    texts = ["", "none", "none tanh", "tanh", "NOTSET", "VALI", "linear", "linear ", "half_pixel", "floor", "stretch"]
    texts += ["i,j->ij", "i" * 64, "i" * 65, "i\n", "...ij, jk -> ik", "i1"]
    lists = [[number] for number in numbers] + [[], [1] * 16, [1] * 17, [1, 2**16], [0, 8]]
    values = [*numbers, *texts, *lists, 0.5, float("inf"), float("nan"), [0.5]]
    x, y = tensor("x", 1, 3), tensor("y", 1, 3)
    cases = []

    def add(operator: str, inputs: list[str], outputs: list[str], attribute: Any = None) -> None:
        node = onnx.NodeProto(op_type=operator, input=inputs, output=outputs)
        if attribute is not None:
            node.attribute.append(attribute)
        spec = save(tmp_path / "g.onnx", [node], [x], [y], batch=(1, 1))
        cases.append(Case((tmp_path / "g.onnx").read_bytes(), spec, "", {}))

    for operator in sorted(OPERATORS):
        most = len(INPUTS[operator].rstrip("*"))
        for count in (most - 1, most, most + 1, 6, 1024, 1025):
            add(operator, ["x"] * count, ["y"])
            add(operator, ["x"] * (count - 1) + [""], ["y"])
        for outputs in (
            ["y", "1"],
            ["y", "1", "2"],
            ["y", *map(str, range(1023))],
            ["y", *map(str, range(1024))],
            ["", "y"],
        ):
            add(operator, ["x"] * most, outputs)
        for name in (*RULES, "body") if operator in ("Resize", "Conv", "Cast", "Einsum") else ("axis", "mode"):
            add(operator, ["x"] * most, ["y"], helper.make_attribute(name, 1))
    holders = {name: next(each for each in sorted(NAMES) if name in NAMES[each].split()) for name in RULES}
    for name, operator in holders.items():
        for value in values:
            attribute = helper.make_attribute(name, value, attr_type=7 if value == [] else None)
            add(operator, ["x"] * len(INPUTS[operator].rstrip("*")), ["y"], attribute)
    odd, both = differences(cpp_build, cases)
    assert not odd
    assert len(cases) > 3500
    assert 300 < both < len(cases) / 2


def test_constants_of_every_type_and_shape(cpp_build: Path, tmp_path: Path) -> None:
    """Numbers of bytes that wrap around 64 bits among them."""
    x = tensor("x", 1, 3)
    cases = []
    shapes: tuple[list[int], ...] = (
        [],
        [0],
        [3],
        [-1],
        [1] * 8,
        [1] * 9,
        [2**32, 2**32],
        [2**62, 4],
        [2**62, 2**62, 0],
        [2**63 - 1],
    )
    for kind in range(-1, 30):
        for shape in shapes:
            for content in (b"", bytes(4), bytes(12), bytes(3)):
                one = TensorProto(name="c", data_type=kind, dims=shape, raw_data=content)
                spec = save(tmp_path / "g.onnx", [], [x], [x], [one], batch=(1, 1))
                cases.append(Case((tmp_path / "g.onnx").read_bytes(), spec, "", {}))
    outside = numpy_helper.from_array(np.zeros((2, 3), np.float32), "c")
    outside.ClearField("raw_data")
    outside.data_location = TensorProto.EXTERNAL
    for offset, length in (
        ("16", "24"),
        ("016", "24"),
        ("16", "9" * 19),
        ("9" * 19, "24"),
        ("9" * 20, "24"),
        ("-1", "24"),
    ):
        del outside.external_data[:]
        for key, value in (("location", "w"), ("offset", offset), ("length", length)):
            outside.external_data.add(key=key, value=value)
        spec = save(tmp_path / "g.onnx", [], [x], [x], [outside], batch=(1, 1))
        places = (Placed("float32", (2, 3), 16, 24), Placed("float32", (2, 3), 2**63 - 1, 24))
        cases += [Case((tmp_path / "g.onnx").read_bytes(), spec, "w", {"c": place}) for place in places]
    odd, both = differences(cpp_build, cases)
    assert not odd
    assert both > 20


# --- tables -------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["form", "messages", "operators"])
def test_tables_are_what_their_script_writes(table: str) -> None:
    """Whoever changes Python's tables writes these again: `make_onnx.py TABLE > src/contract/onnx_TABLE.inc`."""
    script = CPP / "scripts" / "make_onnx.py"
    written = subprocess.run([sys.executable, script, table], capture_output=True, check=True, text=True).stdout
    assert written == (CPP / "src" / "contract" / f"onnx_{table}.inc").read_text(encoding="utf-8")
