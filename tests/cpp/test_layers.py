"""The rooms of libtgate stand one above the other, and other people's headers are each known to one of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "runtime/cpp/src"
BELOW = {
    "contract": set(),
    "tokenizer": {"contract"},
    "noise": {"contract"},
    "engine": {"contract"},
    "run": {"contract", "tokenizer", "noise", "engine"},
    "capi": {"contract", "tokenizer", "noise", "engine", "run"},
}
FOREIGN = {
    "nlohmann/": {"contract/json.cpp"},
    "openssl/": {"contract/sha256.cpp"},
    "onnxruntime_c_api.h": {"engine/ort_library.h"},
    "dlfcn.h": {"engine/ort_library.cpp", "engine/cuda_runtime.cpp"},
}
FILES = sorted(path for path in SOURCE.rglob("*") if path.suffix in (".cpp", ".h"))
INCLUDE = re.compile(r'^#include ["<]([^">]+)[">]', re.MULTILINE)


def room(path: str) -> str:
    return path.partition("/")[0]


def test_every_room_has_its_place() -> None:
    assert {room(str(path.relative_to(SOURCE))) for path in FILES} == {*BELOW}


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_includes_run_downwards(path: Path) -> None:
    own = str(path.relative_to(SOURCE))
    included = INCLUDE.findall(path.read_text())
    rooms = {room(name) for name in included if "/" in name and room(name) in BELOW}
    assert rooms <= BELOW[room(own)] | {room(own)}
    for header, files in FOREIGN.items():
        if any(name.startswith(header) for name in included):
            assert own in files


def test_no_two_headers_include_each_other() -> None:
    headers = [path for path in FILES if path.suffix == ".h"]
    included = {str(path.relative_to(SOURCE)): INCLUDE.findall(path.read_text()) for path in headers}
    seen: dict[str, set[str]] = {}

    def reach(name: str, above: tuple[str, ...]) -> set[str]:
        assert name not in above, f"{name} includes itself by way of {above}"
        if name not in seen:
            below = [other for other in included.get(name, ()) if other in included]
            seen[name] = {name}.union(*(reach(other, (*above, name)) for other in below))
        return seen[name]

    for name in included:
        reach(name, ())
