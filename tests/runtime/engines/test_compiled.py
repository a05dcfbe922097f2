"""Each graph's entry in the engine cache: made where it is missing, told of before, and found by its key."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tgate_engine.errors import EngineError
from tgate_engine.graph import DENOISE, GraphSpec, Macs, TensorSpec
from tgate_runtime import cache
from tgate_runtime.engines.compiled import entries, interface_key, ready_entries

KEYS = {"a/full.onnx": {"graph": "1"}, "b/full.onnx": {"graph": "2"}, "text.onnx": {"graph": "3"}}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path / "cache"))


def compile_into(file: str, directory: Path) -> None:
    (directory / "engine").write_text(file)


def test_what_is_missing_is_made_and_told_of() -> None:
    cache.find_or_build(KEYS["b/full.onnx"], lambda directory: compile_into("b/full.onnx", directory))
    heard: list[tuple[int, int, str]] = []
    places = entries(KEYS, compile_into, lambda *news: heard.append(news))
    assert heard == [(0, 2, "full"), (1, 2, "text"), (2, 2, "text")]
    assert list(places) == list(KEYS)
    assert [(place / "engine").read_text() for place in places.values()] == list(KEYS)
    heard.clear()
    assert (
        entries(KEYS, compile_into, lambda *news: heard.append(news)) == places == ready_entries(KEYS, "x", Path("b"))
    )
    assert heard == []


def test_graphs_of_one_key_are_made_once() -> None:
    made: list[str] = []

    def count(file: str, directory: Path) -> None:
        made.append(file)
        compile_into(file, directory)

    places = entries({"a.onnx": {"graph": "1"}, "b.onnx": {"graph": "1"}}, count, None)
    assert made == ["a.onnx"]
    assert places["a.onnx"] == places["b.onnx"]


def test_what_is_missing_is_named_where_nothing_is_made() -> None:
    entries({"text.onnx": KEYS["text.onnx"]}, compile_into, None)
    says = (
        "^toy has graphs that engine aoti has not compiled .*: a/full.onnx, b/full.onnx; run tgate build toy --engine"
    )
    with pytest.raises(EngineError, match=says):
        ready_entries(KEYS, "aoti", Path("toy"))


def test_a_fault_stops_and_leaves_what_was_made() -> None:
    def fail(file: str, directory: Path) -> None:
        if file == "b/full.onnx":
            raise EngineError("cannot compile")
        compile_into(file, directory)

    with pytest.raises(EngineError, match="cannot compile"):
        entries(KEYS, fail, None)
    assert [cache.find(key) is None for key in KEYS.values()] == [False, True, True]


def test_a_key_holds_the_whole_interface() -> None:
    """Whatever is changed of an input or an output, their order too, another entry is looked for."""
    x, y = (TensorSpec(name=name, dtype="float32", shape=("batch", 3)) for name in "xy")
    spec = GraphSpec(
        file="a.onnx", role=DENOISE, batch=(1, 2), inputs=(x, y), outputs=(x, y), macs=Macs(paper=0, all=0)
    )
    others = [replace(spec, batch=(1, 3))]
    for change in ((y, x), (x,), *((x, replace(y, **{f: v})) for f, v in CHANGES.items())):
        others += [replace(spec, inputs=change), replace(spec, outputs=change)]
    keys = [cache.digest_of(interface_key(each)) for each in (spec, *others)]
    assert len(set(keys)) == len(keys)


CHANGES: dict[str, Any] = {"name": "z", "dtype": "float16", "shape": ("batch", 4)}
