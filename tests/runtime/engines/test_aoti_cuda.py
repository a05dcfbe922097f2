"""AOTInductor on a GPU: what is captured once gives what running it gives, whatever lies in its buffers by then.

For a machine with PyTorch and a GPU, and little else: ``pytest --noconftest tests/runtime/engines/test_aoti_cuda.py``
needs NumPy, onnx and safetensors beside them.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.runtime.engines.convolved import CHANNELS, LATENTS, Convolved
from tests.runtime.engines.small import Small, assert_close, random_inputs
from tgate_engine.dtypes import decode
from tgate_engine.errors import EngineError
from tgate_engine.graph import GraphSpec
from tgate_runtime.engines.aoti import Aoti, AotiExecutable, TorchBuffer
from tgate_runtime.engines.protocol import EngineOptions

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no GPU")
ROWS = 3
Graphs = Mapping[str, AotiExecutable]


class PlainAoti(Aoti):
    captured = ()


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("cache")
        patch.setenv("TGATE_CACHE", str(path))
        yield path


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Small:
    return Small(tmp_path_factory.mktemp("small") / "bundle")


@pytest.fixture(scope="module")
def ways(bundle: Small) -> dict[bool, Graphs]:
    """The small bundle's graphs, by whether the denoiser's calls are captured."""
    engines = {True: Aoti(EngineOptions()), False: PlainAoti(EngineOptions())}
    return {captured: each.load(bundle.bundle, tuple(bundle.graphs.values())) for captured, each in engines.items()}


@pytest.fixture(scope="module")
def half(tmp_path_factory: pytest.TempPathFactory) -> Convolved:
    return Convolved(tmp_path_factory.mktemp("half") / "bundle", dtype="float16")


@pytest.fixture(scope="module")
def half_ways(half: Convolved) -> dict[bool, AotiExecutable]:
    engines = {True: Aoti(EngineOptions()), False: PlainAoti(EngineOptions())}
    return {captured: each.load(half.bundle, [half.spec])[half.spec.file] for captured, each in engines.items()}


def allocated(spec: GraphSpec, rows: int) -> dict[str, TorchBuffer]:
    """A buffer for each of the graph's inputs and outputs."""
    device = torch.device("cuda", 0)
    return {t.name: TorchBuffer.zeros(t.resolve(rows), t.dtype, device) for t in (*spec.inputs, *spec.outputs)}


def bound(graph: AotiExecutable, buffers: Mapping[str, TorchBuffer], first: int, count: int) -> Any:
    view = {name: buffer.rows(first, count) for name, buffer in buffers.items()}
    spec = graph.spec
    return graph.bind({n: view[n] for n in spec.input_names()}, {n: view[n] for n in spec.output_names()})


def write(buffers: Mapping[str, TorchBuffer], inputs: Mapping[str, NDArray[Any]]) -> None:
    for name, values in inputs.items():
        buffers[name].write(values)


def read(buffers: Mapping[str, TorchBuffer], spec: GraphSpec, first: int, count: int) -> dict[str, NDArray[Any]]:
    return {name: buffers[name].read()[first : first + count] for name in spec.output_names()}


def rows_of(inputs: Mapping[str, NDArray[Any]], first: int, count: int) -> dict[str, NDArray[Any]]:
    return {name: values[first : first + count] for name, values in inputs.items()}


def assert_same(got: Mapping[str, NDArray[Any]], want: Mapping[str, NDArray[Any]]) -> None:
    for name, values in want.items():
        np.testing.assert_array_equal(got[name], values, name)


# --- numbers ------------------------------------------------------------------------------------


def test_graphs_around_the_denoiser(bundle: Small, ways: dict[bool, Graphs]) -> None:
    for name in ("text", "decoder"):
        spec = bundle.graphs[name]
        buffers, inputs = allocated(spec, 2), random_inputs(spec, 2)
        write(buffers, inputs)
        bound(ways[True][spec.file], buffers, 0, 2)()
        assert_close(spec, read(buffers, spec, 0, 2), bundle.expected(name, inputs), 1e-4)


def test_captured_calls_give_the_same_bits(bundle: Small, ways: dict[bool, Graphs]) -> None:
    """Rows of one state, ``full`` and then ``reuse`` of its carry; twice, with other numbers in the same buffers."""
    full, reuse = bundle.graphs["full"], bundle.graphs["reuse"]
    results: dict[bool, list[dict[str, NDArray[Any]]]] = {}
    for way, graphs in ways.items():
        buffers = {**allocated(full, ROWS), "self.0": allocated(reuse, ROWS)["self.0"]}
        calls = [bound(graphs[spec.file], buffers, 1, 2) for spec in (full, reuse)]
        got = results[way] = []
        for seed in (1, 2):
            inputs = random_inputs(full, ROWS, seed)
            write(buffers, inputs)
            for spec, call in zip((full, reuse), calls, strict=True):
                call()
                got.append(read(buffers, spec, 1, 2))
            given = rows_of(inputs, 1, 2)
            want = bundle.expected("full", given)
            assert_close(full, got[-2], want, 1e-4)
            assert_close(reuse, got[-1], bundle.expected("reuse", {**given, "self.0": want["self.0"]}), 1e-4)
    for captured, plain in zip(results[True], results[False], strict=True):
        assert_same(captured, plain)


def test_rows_that_begin_where_no_kernel_reads(half: Convolved, half_ways: dict[bool, AotiExecutable]) -> None:
    """They are copied at each replay, not once when they were captured."""
    results: dict[bool, list[dict[str, NDArray[Any]]]] = {}
    for way, graph in half_ways.items():
        buffers = allocated(half.spec, ROWS)
        assert buffers["latents"].rows(1, 2).address % 16
        call = bound(graph, buffers, 1, 2)
        got = results[way] = []
        for seed in (1, 2):
            inputs = random_inputs(half.spec, ROWS, seed)
            write(buffers, inputs)
            call()
            got.append(read(buffers, half.spec, 1, 2))
            half.assert_close(got[-1], rows_of(inputs, 1, 2), 1e-2)
            assert not read(buffers, half.spec, 0, 1)["next_latents"].any()  # a row that is not the call's
    for captured, plain in zip(results[True], results[False], strict=True):
        assert_same(captured, plain)


@pytest.mark.parametrize("precision", [None, "f16"])
def test_a_bundle_in_float32(tmp_path: Path, precision: Any) -> None:
    own = Convolved(tmp_path / "bundle", batch=(2, 2))
    graph = Aoti(EngineOptions(precision=precision)).load(own.bundle, [own.spec])[own.spec.file]
    buffers, inputs = allocated(own.spec, 2), random_inputs(own.spec, 2)
    write(buffers, inputs)
    bound(graph, buffers, 0, 2)()
    got = read(buffers, own.spec, 0, 2)
    own.assert_close(got, inputs, 1e-4 if precision is None else 3e-2)
    if precision is not None:
        want = own.expected(inputs)["next_latents"]
        assert np.abs(got["next_latents"] - want).max() > 1e-5  # it was computed in less than float32


def test_convolutions_in_16_bits_have_their_channels_last(
    half: Convolved, half_ways: dict[bool, AotiExecutable], cache: Path
) -> None:
    kernels = [each for each in half_ways[True].constants.values() if each.ndim == 4]
    assert len(kernels) == 3
    assert all(each.is_contiguous(memory_format=torch.channels_last) for each in kernels)
    (entry,) = Aoti(EngineOptions()).build(half.bundle, [half.spec]).values()
    reads = json.loads((entry / "weights.json").read_text())
    strides = [stride for name, _, last, stride in reads.values() if last and name == "conv.middle"]
    assert strides == [[9 * CHANNELS, 1, 3 * CHANNELS, CHANNELS]]


# --- captures -----------------------------------------------------------------------------------


def test_binding_spoils_nothing(half: Convolved, half_ways: dict[bool, AotiExecutable]) -> None:
    """The rows may be those of an image that is at work."""
    buffers = allocated(half.spec, ROWS)
    for buffer in buffers.values():
        buffer.tensor.fill_(7)
    bound(half_ways[True], buffers, 0, ROWS)
    assert all((decode(buffer.read(), buffer.dtype) == 7).all() for buffer in buffers.values())


def test_all_captures_work_in_the_same_memory(half: Convolved, half_ways: dict[bool, AotiExecutable]) -> None:
    graph, buffers = half_ways[True], allocated(half.spec, ROWS)
    inputs = random_inputs(half.spec, ROWS)
    write(buffers, inputs)
    calls = [bound(graph, buffers, 0, count) for count in (ROWS, 1)]
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    for first in range(ROWS):
        calls += [bound(graph, buffers, first, count) for count in range(1, ROWS - first + 1) for _ in range(4)]
    assert len(calls) > 20
    assert torch.cuda.memory_reserved() <= before + 8 * 2**20  # a pool for each would take two megabytes at least
    for call in reversed(calls):  # in any order: nothing of one is there for another
        call()
    half.assert_close(read(buffers, half.spec, 0, ROWS), inputs, 1e-2)


def test_what_is_bound_after_every_call_has_gone(half: Convolved) -> None:
    graph = Aoti(EngineOptions()).load(half.bundle, [half.spec])[half.spec.file]
    inputs = random_inputs(half.spec, 1)
    for _ in range(3):
        buffers = allocated(half.spec, 1)
        write(buffers, inputs)
        call = bound(graph, buffers, 0, 1)
        call()
        half.assert_close(read(buffers, half.spec, 0, 1), inputs, 1e-2)
        del call, buffers
        gc.collect()
        torch.cuda.empty_cache()


def test_threads_take_turns(half: Convolved, half_ways: dict[bool, AotiExecutable]) -> None:
    """They bind, write, call and read as they like."""

    def work(seed: int) -> None:
        for turn in range(5):
            buffers, inputs = allocated(half.spec, 2), random_inputs(half.spec, 2, 100 * seed + turn)
            write(buffers, inputs)
            call = bound(half_ways[seed % 2 == 0], buffers, 0, 2)
            for _ in range(3):
                call()
            half.assert_close(read(buffers, half.spec, 0, 2), inputs, 1e-2)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


def test_a_capture_that_fails_is_one_line_and_the_next_one_works(half: Convolved) -> None:
    graph = Aoti(EngineOptions()).load(half.bundle, [half.spec])[half.spec.file]
    buffers, inputs = allocated(half.spec, 1), random_inputs(half.spec, 1)
    write(buffers, inputs)
    bound(graph, buffers, 0, 1)
    library = graph.library

    class Waiting:
        def run(self, tensors: Any) -> Any:
            results = library.run(tensors)
            results[0].cpu()  # which no capture can hold
            return results

    graph.library = Waiting()
    with pytest.raises(EngineError, match=r"graph full\.onnx failed in AOTInductor: ") as error:
        bound(graph, buffers, 0, 1)
    assert "\n" not in str(error.value)
    graph.library = library
    call = bound(graph, buffers, 0, 1)
    call()
    half.assert_close(read(buffers, half.spec, 0, 1), inputs, 1e-2)
    assert buffers["latents"].shape == (1, *LATENTS)
