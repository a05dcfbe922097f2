"""libtgate's ``ort-cuda`` over the stub, beside the Python one on the same bundle."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from safetensors.numpy import save

from tests.cuda_stub.build import HERE
from tests.cuda_stub.conftest import Opened
from tests.cuda_stub.log import Kind, of, recorded
from tgate_engine.adapter import DOWN, FACTOR, TURNED, UP
from tgate_engine.bundle import Bundle
from tgate_engine.manifest import Adapter
from tgate_engine.step import STEP_OUTPUTS
from tgate_runtime.engines import open_builder
from tgate_runtime.weights import map_weights

LIBRARY = HERE.parents[1] / "build" / "cpp" / "release" / "libtgate.so"
MODEL = "mini-sdxl"
Told = dict[str, Any]


def told(path: Path) -> Told:
    """What :mod:`tests.cuda_stub.hosted` says of a bundle."""
    assert LIBRARY.is_file(), "make cuda-stub builds libtgate"
    (onnxruntime_library,) = Path(onnxruntime.__file__).parent.glob("capi/libonnxruntime.so.*")
    words = [str(LIBRARY), str(onnxruntime_library), str(path), "default"]
    command = [sys.executable, "-m", "tests.cuda_stub.hosted", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stderr
    found: Told = json.loads(done.stdout)
    return found


@pytest.fixture(scope="module")
def as_exported(bundle_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hosted") / MODEL
    return Path(shutil.copytree(bundle_of(MODEL), path, ignore=shutil.ignore_patterns("engines")))


@pytest.fixture(scope="module")
def changed(as_exported: Path) -> list[int]:
    """The sizes of the weights that an adapter changes which this adds: every third linear layer of a graph."""
    bundle = Bundle.open(as_exported)
    graph = onnx.load(bundle.file(bundle.manifest.shapes[0].graphs["full"].file), load_external_data=False).graph
    weights = map_weights(bundle.file(bundle.manifest.weights))
    names = sorted(t.name for t in graph.initializer if t.name in weights and t.name.endswith(TURNED))[::3]
    tensors: dict[str, Any] = {}
    for name in names:
        inputs, outputs = weights[name].array.shape
        tensors |= {name + UP: np.ones((outputs, 1), np.float16), name + DOWN: np.ones((1, inputs), np.float16)}
        tensors[name + FACTOR] = np.ones(1, np.float32)
    adapter = Adapter(file="adapters/bright.safetensors", layers=len(names), rank=1)
    bundle.save_adapter("bright", adapter, save(tensors))
    return [weights[name].array.nbytes for name in names]


@pytest.fixture(scope="module")
def lowered(as_exported: Path, changed: list[int]) -> Told:
    assert changed
    path = Path(shutil.copytree(as_exported, as_exported.with_name("lowered")))
    bundle = Bundle.open(path)
    open_builder("ort-cuda").build(bundle, [*bundle.manifest.shapes[0].graphs.values()])
    return told(path)


def ways_of(own: Opened) -> list[tuple[str, frozenset[str]]]:
    """The graphs of the plan, each with the carries that a step keeps, as its steps come to them first."""
    steps = own.bundle.manifest.plan("default").steps
    return [*dict.fromkeys((step.graph, frozenset(step.writes)) for step in steps)]


def launched(own: Opened, name: str, writes: frozenset[str]) -> Counter[str]:
    """What the Python engine captures of a call that keeps those carries."""
    spec, wanted = own.specs[name], {*STEP_OUTPUTS, *writes}
    inputs, outputs = (
        {t.name: own.engine.allocate(t.resolve(1), t.dtype) for t in tensors}
        for tensors in (spec.inputs, [t for t in spec.outputs if t.name in wanted])
    )
    with recorded() as events:
        call = own.graphs[name].bind(inputs, outputs)
    assert call.addresses
    return Counter(event.name for event in of(events, Kind.LAUNCH) if event.captured)


def test_it_launches_what_python_launches(lowered: Told, opened: Callable[[str], Opened]) -> None:
    own = opened(MODEL)
    ways = ways_of(own)
    assert len(ways) == len(lowered["binding"]["captures"]) > 3
    for (name, writes), got in zip(ways, lowered["binding"]["captures"], strict=True):
        assert got == launched(own, name, writes), (name, writes)
    assert lowered["advice"] == ""


def test_a_step_is_one_launch(lowered: Told) -> None:
    """Its row of numbers goes up, the graph is replayed, and latents move within the device."""
    kinds = Counter(lowered["stepping"]["kinds"])
    assert kinds["REPLAY"] == 1
    assert set(kinds) == {"COPY", "WAIT", "REPLAY"}
    assert len(lowered["stepping"]["uploads"]) == 1
    assert kinds["COPY"] <= 4


def test_weights_are_uploaded_once(lowered: Told, opened: Callable[[str], Opened]) -> None:
    """All but the encoder's, which libtgate does not open."""
    bundle = opened(MODEL).bundle
    held: dict[str, int] = {}
    for spec in bundle.manifest.shapes[0].graphs.values():
        if spec.role != "encode":
            graph = onnx.load(bundle.file(spec.file), load_external_data=False).graph
            places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in graph.initializer]
            held |= {place["offset"]: int(place["length"]) for place in places if place}
    weights = sum(held.values())
    loading = lowered["loading"]
    assert 0.99 * weights < loading["uploaded_bytes"] < 1.05 * weights
    assert sum(size for _, size in loading["allocated"]) < 1.05 * weights


def test_adapters_upload_what_they_change_alone(lowered: Told, changed: list[int]) -> None:
    """Beside a few constants; the rest is what the session that they come from has there."""
    adapting = lowered["adapting"]
    assert sum(changed) > 100_000
    assert sum(changed) <= adapting["uploaded_bytes"] < 1.1 * sum(changed)


def test_captures_are_whole(lowered: Told) -> None:
    """And a second request's calls are captured anew, at its own places, in the arena that is there."""
    for part in ("binding", "again"):
        kinds = lowered[part]["kinds"]
        assert kinds.count("CAPTURE") == kinds.count("CAPTURED") == len(lowered["binding"]["captures"])
        assert not {"BROKEN", "REFUSED"} & {*kinds}
    assert lowered["again"]["captures"] == lowered["binding"]["captures"]
    assert sum(size for _, size in lowered["again"]["allocated"]) == lowered["buffers_bytes"]


def test_a_request_belongs_to_its_thread(lowered: Told) -> None:
    assert "all requests of a session run in the thread that made them" in lowered["elsewhere"]


def test_graphs_go_with_their_session(lowered: Told) -> None:
    assert lowered["releasing"]["kinds"].count("RELEASE") == 2 * len(lowered["binding"]["captures"])
    freed = lowered["releasing"]["kinds"].count("FREE")
    assert freed >= len(lowered["again"]["allocated"])


def test_without_the_folder_graphs_are_taken_as_exported(lowered: Told, as_exported: Path) -> None:
    plain = told(as_exported)
    assert "ort-cuda takes 5 of 5 graphs as they were exported" in plain["advice"]
    assert "tgate build BUNDLE --engine ort-cuda" in plain["advice"]
    for more, less in zip(plain["binding"]["captures"], lowered["binding"]["captures"], strict=True):
        assert sum(more.values()) > sum(less.values()) > 100
    assert Counter(plain["stepping"]["kinds"]) == Counter(lowered["stepping"]["kinds"])
