"""Files of bundles, as :mod:`tests.fuzz.targets` lists them."""

from __future__ import annotations

import functools
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from tests.fuzz.graph_mutations import mutate_graph
from tests.fuzz.mutations import mutate_json, mutate_safetensors
from tests.fuzz.target import Target, drawing, file_of, toy, workspace, written
from tests.hostile import relisted
from tests.toy_bundle import SAMPLERS, WEIGHTS, build
from tgate_cli import views
from tgate_cli.inspect import describe
from tgate_engine.adapter import DOWN, FACTOR, UP
from tgate_engine.bundle import Bundle
from tgate_engine.dtypes import decode
from tgate_engine.graph import GraphSpec
from tgate_engine.manifest import MANIFEST_FILE, Adapter, FileDigest
from tgate_engine.manifest_json import content_digest, dump_manifest, parse_manifest
from tgate_engine.plan import Plan
from tgate_engine.sampler_tables import dump_tables, load_tables
from tgate_runtime.adapters import weights_with
from tgate_runtime.engines import open_engine
from tgate_runtime.graph_check import read_graphs
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.verify import verify
from tgate_runtime.weights import map_weights, read_places


def signed(text: bytes) -> bytes:
    """A manifest's JSON without its digest, with it: whatever a stranger writes, they can sign."""
    try:
        digest = content_digest(json.loads(text))
    except (ValueError, RecursionError, TypeError, AttributeError):
        digest = "0" * 64
    head, brace, rest = text.partition(b"{")
    comma = b"" if rest.lstrip().startswith(b"}") else b","
    return head + brace + b'"digest":"' + digest.encode() + b'"' + comma + rest if brace and not head.strip() else text


def _unsigned() -> Sequence[bytes]:
    data = json.loads((toy().path / MANIFEST_FILE).read_text("utf-8"))
    del data["digest"]
    return [json.dumps(data).encode()]


def manifest(text: bytes) -> None:
    """What is read is what is written again."""
    read = parse_manifest(signed(text))
    assert parse_manifest(dump_manifest(read)) == read


@functools.cache
def _copy(name: str) -> Bundle:
    """Another toy like the first, of which some files are exchanged: each user has its own."""
    return Bundle.open(build(workspace() / name))


def _opened(text: bytes) -> Bundle:
    folder = _copy("resigned").path
    (folder / MANIFEST_FILE).write_bytes(signed(text))
    return Bundle.open(folder, check_digests=False)


def bundle(text: bytes) -> None:
    """What opens can be shown: as JSON, and as lines that a terminal takes for text."""
    data = describe(_opened(text))
    json.dumps(data, allow_nan=False)
    out = io.StringIO()
    views.inspection(data, out)
    assert all(line.isprintable() for line in out.getvalue().replace("\xa0", " ").split("\n"))


def draw(text: bytes) -> None:
    with Pipeline.open(_opened(text), threads=1) as pipeline:
        draws = pipeline("a red circle", seed=1, plan=next(iter(pipeline.session.manifest.plans), "default"))
        assert np.isfinite(draws.latents).all()


def plan(data: bytes) -> None:
    """A plan file, which draws where the toy has what it names."""
    path = written("plan.json", data)
    read = Plan.load(path)
    assert Plan.from_json(json.loads(json.dumps(read.to_json()))) == read
    assert np.isfinite(drawing()("a red circle", seed=1, plan=path).latents).all()


def _plans() -> Sequence[bytes]:
    return [json.dumps(each.to_json()).encode() for each in toy().manifest.plans.values()]


def samplers(data: bytes) -> None:
    tables = load_tables(written("samplers.safetensors", data))
    assert load_tables(written("again.safetensors", dump_tables(tables.values()))) == tables


def weights(data: bytes) -> None:
    """What is mapped is what graphs are checked against."""
    path = written("weights.safetensors", data)
    mapped, places = map_weights(path), read_places(path)
    assert {name: each.array.shape for name, each in mapped.items()} == {n: p.shape for n, p in places.items()}
    for each in mapped.values():
        each.array.tobytes()


def golden(data: bytes) -> None:
    """What was recorded, which ``tgate verify`` replays: all goldens of the toy with one file for them."""
    wanted = b"latents.0" in data
    name = next(n for n, each in toy().manifest.goldens.items() if (each.plan is not None) == wanted)
    file = toy().manifest.goldens[name].file
    (_copy("replayed").path / file).write_bytes(data)
    hostile = relisted(_copy("replayed"), file)
    goldens = {name: hostile.manifest.goldens[name]}
    hostile = replace(hostile, manifest=replace(hostile.manifest, goldens=goldens))
    for checked in verify(hostile, threads=1):
        assert checked.ok or checked.error > checked.tolerance or math.isnan(checked.error)


def _goldens() -> Sequence[bytes]:
    return [(toy().path / each.file).read_bytes() for each in toy().manifest.goldens.values()]


_ADAPTER = "adapter.safetensors"


def adapter(data: bytes) -> None:
    """What changes weights leaves their shapes and dtypes, and numbers that are finite."""
    hostile = _copy("adapted")
    (hostile.path / _ADAPTER).write_bytes(data)
    files = {**hostile.manifest.files, _ADAPTER: FileDigest(sha256=sha256(data).hexdigest(), bytes=len(data))}
    adapters = {"a": Adapter(file=_ADAPTER, layers=1, rank=1)}
    hostile = replace(hostile, manifest=replace(hostile.manifest, adapters=adapters, files=files))
    own = map_weights(hostile.file(hostile.manifest.weights))
    for name, weight in weights_with(hostile, (("a", 0.5),)).items():
        assert (weight.dtype, weight.array.shape) == (own[name].dtype, own[name].array.shape)
        assert np.isfinite(decode(weight.array, weight.dtype)).all()


def _adapters() -> Sequence[bytes]:
    own = map_weights(toy().file(toy().manifest.weights))
    tensors: dict[str, NDArray[Any]] = {}
    for name in ("w.self.0", "w.cross.1"):
        outputs, inputs = own[name].array.shape
        tensors[name + UP] = np.full((outputs, 2), 0.5, np.float16)
        tensors[name + DOWN] = np.full((2, inputs), 0.25, np.float32)
        tensors[name + FACTOR] = np.ones(1, np.float32)
    return [save(tensors)]


# --- graphs -------------------------------------------------------------------------------------


def _checked(data: bytes) -> tuple[Bundle, GraphSpec]:
    """The toy with one graph exchanged: that of the name which the file bears, where there is one."""
    specs = toy().manifest.shapes[0].graphs
    named = (spec for spec in specs.values() if _field(Path(spec.file).stem) in data)
    spec = next(named, specs["full"])
    (_copy("exchanged").path / spec.file).write_bytes(data)
    bundle = relisted(_copy("exchanged"), spec.file)
    read_graphs(bundle, [spec])
    return bundle, spec


def _field(name: str) -> bytes:
    """The name of a graph, as protobuf writes it."""
    return bytes([0x12, len(name)]) + name.encode()


def _graphs() -> Mapping[str, GraphSpec]:
    return toy().manifest.shapes[0].graphs


def _graph_files() -> Sequence[bytes]:
    return [(toy().path / _graphs()[name].file).read_bytes() for name in ("full", "reuse_both", "text", "decoder")]


def graph(data: bytes) -> None:
    _checked(data)


def on_engine(data: bytes, *, engine: str) -> None:
    """A graph that is let through, on an engine: what it does not take, it says."""
    bundle, spec = _checked(data)
    loader = open_engine(engine, threads=1)
    executable = loader.load(bundle, [spec])[spec.file]
    rng = np.random.default_rng(0)
    inputs = {t.name: loader.allocate(t.resolve(1), t.dtype) for t in spec.inputs}
    for buffer in inputs.values():
        values = rng.standard_normal(buffer.shape) if buffer.dtype == "float32" else rng.integers(0, 4, buffer.shape)
        buffer.write(values.astype(buffer.dtype))
    outputs = {t.name: loader.allocate(t.resolve(1), t.dtype) for t in spec.outputs}
    executable.bind(inputs, outputs)()


TARGETS = (
    Target(name="manifest", run=manifest, sound=_unsigned, mutate=mutate_json, examples=60),
    Target(name="bundle", run=bundle, sound=_unsigned, mutate=mutate_json, examples=60),
    Target(name="draw", run=draw, sound=_unsigned, mutate=mutate_json, examples=30),
    Target(name="plan", run=plan, sound=_plans, mutate=mutate_json),
    Target(name="samplers", run=samplers, sound=file_of(SAMPLERS), mutate=mutate_safetensors, examples=60),
    Target(name="weights", run=weights, sound=file_of(WEIGHTS), mutate=mutate_safetensors),
    Target(name="golden", run=golden, sound=_goldens, mutate=mutate_safetensors, examples=40),
    Target(name="adapter", run=adapter, sound=_adapters, mutate=mutate_safetensors),
    Target(name="graph", run=graph, sound=_graph_files, mutate=mutate_graph),
    Target(name="ort", run=partial(on_engine, engine="ort-cpu"), sound=_graph_files, mutate=mutate_graph, endless=True),
)
