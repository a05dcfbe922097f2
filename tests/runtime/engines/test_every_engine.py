"""What the protocol promises, of every engine that runs here; what is one engine's own is in that engine's file."""

from __future__ import annotations

import gc
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from onnx import helper

from tests.hostile import relisted, with_graph
from tests.runtime.engines.small import WEIGHTS, Arrays, Small, assert_close, one_node, random_inputs
from tests.runtime.engines.ways import WAYS
from tgate_engine.dtypes import DTYPES, storage
from tgate_engine.errors import BundleError, EngineError
from tgate_engine.graph import GraphSpec
from tgate_runtime.engines.aoti import TorchBuffer
from tgate_runtime.engines.host import CpuBuffer
from tgate_runtime.engines.protocol import Buffer, Engine, Executable
from tgate_runtime.weights import map_weights

GRAPHS = ("full", "reuse", "text", "decoder")
IN_ROW = 7
"""Rows of a buffer of which calls take some."""


@pytest.fixture(scope="module", params=list(WAYS))
def engine(request: pytest.FixtureRequest, shared_cache: Path) -> Engine:
    if request.param == "aoti" and torch.cuda.is_available():
        pytest.skip("it would run on the GPU")
    return WAYS[request.param]()


@pytest.fixture(scope="module")
def loaded(engine: Engine, small: Small) -> Mapping[str, Executable]:
    """The small bundle's graphs, by name."""
    files = engine.load(small.bundle, tuple(small.graphs.values()))
    assert list(files) == [spec.file for spec in small.graphs.values()]
    return {name: files[spec.file] for name, spec in small.graphs.items()}


def allocated(engine: Engine, tensors: Any, rows: int) -> dict[str, Buffer]:
    return {tensor.name: engine.allocate(tensor.resolve(rows), tensor.dtype) for tensor in tensors}


def filled(engine: Engine, spec: GraphSpec, inputs: Arrays) -> dict[str, Buffer]:
    buffers = allocated(engine, spec.inputs, len(next(iter(inputs.values()))))
    for name, values in inputs.items():
        buffers[name].write(values)
    return buffers


def called(engine: Engine, graph: Executable, spec: GraphSpec, inputs: Arrays) -> dict[str, NDArray[Any]]:
    """The graph's outputs from buffers of their own."""
    outputs = allocated(engine, spec.outputs, len(next(iter(inputs.values()))))
    graph.bind(filled(engine, spec, inputs), outputs)()
    return {name: buffer.read() for name, buffer in outputs.items()}


def numbers(shape: tuple[int, ...], dtype: str, first: int = 1) -> NDArray[Any]:
    """Values that differ from one another."""
    return (np.arange(np.prod(shape)).reshape(shape) + first).astype(storage(dtype))


# --- strangers' graphs --------------------------------------------------------------------------


def elsewhere(model: Any) -> None:
    """A weight from a file that no manifest lists."""
    weight = next(tensor for tensor in model.graph.initializer if tensor.external_data)
    next(entry for entry in weight.external_data if entry.key == "location").value = "other.bin"


def endless(model: Any) -> None:
    body = helper.make_graph([], "body", [], [])
    model.graph.node.append(helper.make_node("Loop", ["", ""], [], body=body))


@pytest.mark.parametrize("edit", [elsewhere, endless])
def test_a_graph_of_a_stranger_is_refused_before_the_engine_sees_it(
    engine: Engine, tmp_path: Path, edit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listed with a digest that fits; by whatever way it would be loaded."""
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path / "cache"))
    own = Small(tmp_path / "bundle")
    shutil.copy(tmp_path / "bundle" / WEIGHTS, tmp_path / "bundle" / "other.bin")
    hostile, graphs = with_graph(own.bundle, "full.onnx", edit), [own.graphs["full"]]
    for way in (engine.load, engine.build) if engine.name == "aoti" else (engine.load,):
        with pytest.raises(BundleError, match=r"^full\.onnx has .*; export the bundle again$"):
            way(hostile, graphs)


# --- weights ------------------------------------------------------------------------------------


def test_weights_in_place_of_the_files(
    engine: Engine, loaded: Mapping[str, Executable], small: Small, tmp_path: Path
) -> None:
    """All of those that another bundle has, convolutions too; the graphs that were there before keep theirs."""
    other = Small(tmp_path / "bundle", seed=5)
    instead = map_weights(other.bundle.file(WEIGHTS))
    files = engine.load(small.bundle, tuple(small.graphs.values()), instead=instead)
    for name, spec in small.graphs.items():
        inputs = random_inputs(spec, 2)
        assert_close(spec, called(engine, files[spec.file], spec, inputs), other.expected(name, inputs))
        assert_close(spec, called(engine, loaded[name], spec, inputs), small.expected(name, inputs))
    some = dict(list(instead.items())[::2])
    mixed = Small(tmp_path / "mixed")
    mixed.weights.update({name: other.weights[name] for name in some})
    files = engine.load(small.bundle, (small.graphs["full"],), instead=some)
    spec = small.graphs["full"]
    inputs = random_inputs(spec, 1)
    assert_close(spec, called(engine, files[spec.file], spec, inputs), mixed.expected("full", inputs))


# --- buffers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("shape", [(1,), (3, 5), ()])
def test_a_buffer_is_aligned_zeroed_and_fixed(engine: Engine, dtype: str, shape: tuple[int, ...]) -> None:
    buffer = engine.allocate(shape, dtype)
    address = buffer.address
    assert (buffer.shape, buffer.dtype, address % 64) == (shape, dtype, 0)
    assert buffer.read().dtype == storage(dtype)
    assert not buffer.read().any()
    values = numbers(shape, dtype)
    buffer.write(values)
    copy = buffer.read()
    np.testing.assert_array_equal(copy, values)
    copy[...] = 0
    np.testing.assert_array_equal(buffer.read(), values)
    assert buffer.address == address


@pytest.mark.parametrize("shape", [(2**44,), (2**40, 2**40), (2**64,)])
def test_memory_that_is_not_there_is_one_line(engine: Engine, shape: tuple[int, ...]) -> None:
    with pytest.raises(EngineError, match=r"(no memory for|gives no) .*buffer of float32") as error:
        engine.allocate(shape, "float32")
    assert "\n" not in str(error.value)


def test_a_buffer_takes_only_what_fits(engine: Engine) -> None:
    buffer = engine.allocate((2, 3), "bfloat16")
    with pytest.raises(EngineError, match="bfloat16 takes uint16 arrays, got float32"):
        buffer.write(np.zeros((2, 3), np.float32))
    with pytest.raises(EngineError, match=r"shape \(2, 3\) takes no array of shape \(2, 4\)"):
        buffer.write(np.zeros((2, 4), np.uint16))
    buffer.write(np.ones(1, np.uint16))
    assert buffer.read().all()


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_rows_are_a_view(engine: Engine, dtype: str) -> None:
    buffer = engine.allocate((5, 2, 3), dtype)
    values = numbers((5, 2, 3), dtype)
    buffer.write(values)
    view = buffer.rows(1, 3)
    assert (view.shape, view.dtype) == ((3, 2, 3), dtype)
    assert view.address == buffer.address + values[:1].nbytes
    np.testing.assert_array_equal(view.read(), values[1:4])
    inner = view.rows(1, 1)
    assert inner.address == buffer.address + values[:2].nbytes
    inner.write(numbers((1, 2, 3), dtype, first=100))
    values[2] = numbers((2, 3), dtype, first=100)
    np.testing.assert_array_equal(buffer.read(), values)
    np.testing.assert_array_equal(view.read(), values[1:4])
    buffer.write(numbers((5, 2, 3), dtype, first=50))
    np.testing.assert_array_equal(inner.read(), numbers((5, 2, 3), dtype, first=50)[2:3])


def test_a_view_outlives_its_buffer(engine: Engine) -> None:
    shape = (4, 1 << 12)
    view = engine.allocate(shape, "float32").rows(1, 2).rows(1, 1)
    view.write(numbers((1, shape[1]), "float32"))
    gc.collect()
    others = [engine.allocate(shape, "float32") for _ in range(8)]
    for other in others:
        other.write(np.ones(1, np.float32))
    np.testing.assert_array_equal(view.read(), numbers((1, shape[1]), "float32"))


@pytest.mark.parametrize(("first", "count"), [(-1, 1), (0, 0), (2, 2), (3, 1), (0, 4), (1, -1)])
def test_rows_that_are_not_there(engine: Engine, first: int, count: int) -> None:
    with pytest.raises(EngineError, match=rf"shape \(3, 2\) has no {count} rows from row {first} on"):
        engine.allocate((3, 2), "float32").rows(first, count)
    with pytest.raises(EngineError, match=r"shape \(\) has no"):
        engine.allocate((), "float32").rows(first, count)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_a_copy_is_of_values(engine: Engine, dtype: str) -> None:
    source, target = engine.allocate((4, 3), dtype), engine.allocate((4, 3), dtype)
    values = numbers((4, 3), dtype)
    source.write(values)
    target.copy(source)
    np.testing.assert_array_equal(target.read(), values)
    target.rows(1, 1).copy(source.rows(3, 1))
    source.write(np.zeros(1, storage(dtype)))
    np.testing.assert_array_equal(target.read(), values[[0, 3, 2, 3]])
    target.rows(0, 2).copy(target.rows(2, 2))  # of one buffer
    np.testing.assert_array_equal(target.read(), values[[2, 3, 2, 3]])


def test_a_copy_takes_its_like_alone(engine: Engine) -> None:
    target = engine.allocate((2, 3), "float32")
    for source, says in (
        (engine.allocate((2, 3), "int64"), r"float32 \[2, 3\] takes no copy of one of int64 \[2, 3\]"),
        (engine.allocate((3, 3), "float32"), r"float32 \[2, 3\] takes no copy of one of float32 \[3, 3\]"),
        (engine.allocate((3, 3), "float32").rows(0, 1), r"float32 \[2, 3\] takes no copy of one of float32 \[1, 3\]"),
    ):
        with pytest.raises(EngineError, match=says):
            target.copy(source)
    foreign: Buffer = CpuBuffer.zeros((2, 3), "float32")
    if isinstance(target, CpuBuffer):
        foreign = TorchBuffer.zeros((2, 3), "float32", torch.device("cpu"))
    with pytest.raises(EngineError, match=f"a {type(target).__name__} takes no copy of a {type(foreign).__name__}"):
        target.copy(foreign)


# --- calls --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_gives_what_its_arithmetic_gives(
    engine: Engine, loaded: Mapping[str, Executable], small: Small, name: str, batch: int
) -> None:
    spec = small.graphs[name]
    inputs = random_inputs(spec, batch)
    assert_close(spec, called(engine, loaded[name], spec, inputs), small.expected(name, inputs))


@pytest.mark.parametrize(("first", "count"), [(0, 1), (1, 2), (3, 4), (6, 1)])
@pytest.mark.parametrize("name", GRAPHS)
def test_a_call_on_some_rows_touches_no_other(
    engine: Engine, loaded: Mapping[str, Executable], small: Small, name: str, first: int, count: int
) -> None:
    """And gives, to the bit, what a call on buffers of their own gives, wherever its rows begin."""
    spec, own = small.graphs[name], slice(first, first + count)
    values = random_inputs(spec, IN_ROW)
    inputs, outputs = filled(engine, spec, values), allocated(engine, spec.outputs, IN_ROW)
    before = {}
    for tensor in spec.outputs:
        before[tensor.name] = numbers(tensor.resolve(IN_ROW), tensor.dtype)
        outputs[tensor.name].write(before[tensor.name])
    views = [{n: buffer.rows(first, count) for n, buffer in buffers.items()} for buffers in (inputs, outputs)]
    call = loaded[name].bind(*views)
    assert call.addresses == {n: buffer.address for buffers in views for n, buffer in buffers.items()}
    for _ in range(2):
        call()
    alone = called(engine, loaded[name], spec, {n: array[own] for n, array in values.items()})
    for n, buffer in inputs.items():
        np.testing.assert_array_equal(buffer.read(), values[n])
    for n, buffer in outputs.items():
        got = buffer.read()
        np.testing.assert_array_equal(got[own], alone[n])
        for others in (slice(0, first), slice(first + count, None)):
            np.testing.assert_array_equal(got[others], before[n][others])


def test_a_call_reads_and_writes_where_its_buffers_lie(
    engine: Engine, loaded: Mapping[str, Executable], small: Small
) -> None:
    spec = small.graphs["full"]
    inputs, outputs = allocated(engine, spec.inputs, 2), allocated(engine, spec.outputs, 2)
    call = loaded["full"].bind(inputs, outputs)
    for seed in (1, 2):
        values = random_inputs(spec, 2, seed)
        for name, array in values.items():
            inputs[name].write(array)
        call()
        assert_close(spec, {n: b.read() for n, b in outputs.items()}, small.expected("full", values))


def test_what_is_not_bound_is_not_written(engine: Engine, loaded: Mapping[str, Executable], small: Small) -> None:
    spec = small.graphs["full"]
    values = random_inputs(spec, 2)
    inputs, outputs = filled(engine, spec, values), allocated(engine, spec.outputs, 2)
    loaded["full"].bind(inputs, outputs)()
    kept = outputs["self.0"].read()
    inputs["latents"].write(np.ones(1, np.float32))
    for names in (("output",), ("next_latents", "output")):
        loaded["full"].bind(inputs, {name: outputs[name] for name in names})()
    np.testing.assert_array_equal(outputs["self.0"].read(), kept)
    want = small.expected("full", {**values, "latents": np.ones_like(values["latents"])})["output"]
    np.testing.assert_allclose(outputs["output"].read(), want, rtol=1e-4, atol=1e-5)


def test_one_graph_after_another_in_the_same_buffers(
    engine: Engine, loaded: Mapping[str, Executable], small: Small
) -> None:
    """A carry that ``full`` wrote, some of its rows anew, is what ``reuse`` reads, others' calls in between or not."""
    full, reuse = small.graphs["full"], small.graphs["reuse"]
    values = random_inputs(full, 3)
    buffers = {**filled(engine, full, values), **allocated(engine, full.outputs, 3)}
    loaded["full"].bind({n: buffers[n] for n in full.input_names()}, {n: buffers[n] for n in full.output_names()})()
    called(engine, loaded["full"], full, random_inputs(full, 3, seed=9))
    outputs = allocated(engine, reuse.outputs, 3)
    loaded["reuse"].bind({n: buffers[n] for n in reuse.input_names()}, outputs)()
    carry = small.expected("full", values)["self.0"]
    want = small.expected("reuse", {**values, "self.0": carry})
    assert_close(reuse, {n: b.read() for n, b in outputs.items()}, want)


def test_calls_in_several_threads_do_not_meet(engine: Engine, loaded: Mapping[str, Executable], small: Small) -> None:
    """Each on rows of its own of the same buffers."""
    spec = small.graphs["full"]
    values = random_inputs(spec, 4)
    inputs, outputs = filled(engine, spec, values), allocated(engine, spec.outputs, 4)
    calls = [
        loaded["full"].bind(*({n: b.rows(row, 1) for n, b in buffers.items()} for buffers in (inputs, outputs)))
        for row in range(4)
    ]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for buffer in outputs.values():
                buffer.write(np.zeros(1, storage(buffer.dtype)))
            list(pool.map(lambda call: call(), calls))
            assert_close(spec, {n: b.read() for n, b in outputs.items()}, small.expected("full", values))


# --- what is refused ----------------------------------------------------------------------------


def test_buffers_that_do_not_fit_the_graph(engine: Engine, loaded: Mapping[str, Executable], small: Small) -> None:
    """The checks themselves: test_protocol.py."""
    spec = small.graphs["decoder"]
    latents = engine.allocate((2, 2, 4, 4), "float32")
    image = engine.allocate((3, 4, 4, 3), "uint8")
    with pytest.raises(
        EngineError, match=r"decoder\.onnx: image is \[batch, 4, 4, 3\] .*, got a buffer of \[3, 4, 4, 3\]"
    ):
        loaded["decoder"].bind({"latents": latents}, {"image": image})
    loaded["decoder"].bind({"latents": latents}, {"image": image.rows(1, 2)})()
    assert spec.batch == (1, 4)


def test_a_graph_that_is_not_what_its_manifest_says(
    engine: Engine, small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path))
    spec = small.graphs["decoder"]
    renamed = replace(spec, inputs=(replace(spec.inputs[0], name="z"),))
    with pytest.raises(BundleError, match=r"decoder\.onnx does not have the inputs .* says: 'latents', 'z'") as error:
        engine.load(small.bundle, [renamed])
    assert "\n" not in str(error.value)
    retyped = replace(spec, outputs=(replace(spec.outputs[0], dtype="float16"),))
    with pytest.raises(BundleError, match=r"decoder\.onnx has output image of type 2 .*; its manifest says float16"):
        engine.load(small.bundle, [retyped])


@pytest.mark.parametrize("content", [b"", b"nonsense", b"\x00" * 100])
def test_a_damaged_graph_is_one_line(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path / "cache"))
    own = Small(tmp_path / "bundle")
    spec = one_node(tmp_path / "bundle" / "full.onnx", "Tanh")
    (tmp_path / "bundle" / "full.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"^full\.onnx (is not|has|holds)") as error:
        engine.load(relisted(own.bundle, "full.onnx"), [spec])
    assert "\n" not in str(error.value)
