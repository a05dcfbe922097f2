"""A stand-in for a GPU: what AOTInductor does on one alone, as far as a CPU can try it; captures, channels last."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.runtime.engines.convolved import Convolved
from tests.runtime.engines.on_torch import CPU, called
from tests.runtime.engines.small import Small, assert_close, random_inputs
from tgate_engine.bundle import Bundle
from tgate_engine.errors import EngineError
from tgate_engine.graph import GraphSpec
from tgate_runtime.engines.aoti import Aoti, AotiExecutable, TorchBuffer
from tgate_runtime.engines.aoti.graph import Read
from tgate_runtime.engines.protocol import EngineOptions

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these are the numbers of a CPU")


@pytest.fixture(scope="module")
def loaded(small: Small, shared_cache: Path) -> dict[str, AotiExecutable]:
    """The small bundle's graphs, by name."""
    files = Aoti(EngineOptions(threads=1)).load(small.bundle, tuple(small.graphs.values()))
    return {name: files[spec.file] for name, spec in small.graphs.items()}


# --- calls on a GPU -----------------------------------------------------------------------------


class StandIn:
    """In place of :class:`~tgate_runtime.engines.aoti.cuda.Gpu`: a capture that runs its work whenever it is replayed.
    The real one is tried in test_aoti_cuda.py."""

    def __init__(self) -> None:
        self.rehearsals: list[bool] = []
        self.turns = 0

    @contextlib.contextmanager
    def turn(self) -> Iterator[None]:
        self.turns += 1
        yield

    def captured(self, work: Callable[[], None], rehearse: Callable[[], None] | None) -> SimpleNamespace:
        self.rehearsals.append(rehearse is not None)
        if rehearse is not None:
            rehearse()
        return SimpleNamespace(replay=work)


def test_what_is_bound_is_captured_and_spoils_nothing(small: Small, loaded: dict[str, AotiExecutable]) -> None:
    """A new batch is rehearsed, once; rows that are bound may be those of an image that is at work."""
    gpu: Any = StandIn()
    full = loaded["full"]
    graph = AotiExecutable(full.spec, full.library, full.constants, gpu, captured=True)
    tensors = (*full.spec.inputs, *full.spec.outputs)
    buffers = {t.name: TorchBuffer.zeros(t.resolve(4), t.dtype, CPU) for t in tensors}
    for name in full.spec.output_names():
        buffers[name].tensor.fill_(7)
    calls = []
    for first, count in ((0, 2), (2, 2), (0, 1)):
        inputs, outputs = (
            {name: buffers[name].rows(first, count) for name in names}
            for names in (full.spec.input_names(), full.spec.output_names())
        )
        calls.append((range(first, first + count), graph.bind(inputs, outputs)))
    assert gpu.rehearsals == [True, False, True]
    assert all((buffers[name].read() == 7).all() for name in full.spec.output_names())
    values = random_inputs(full.spec, 4)
    for name, array in values.items():
        buffers[name].write(array)
    rows, call = calls[1]
    call()
    want = small.expected("full", {name: array[rows.start : rows.stop] for name, array in values.items()})
    got = {name: buffers[name].rows(rows.start, len(rows)).read() for name in want}
    assert_close(full.spec, got, want)
    assert all((buffers[name].rows(0, 2).read() == 7).all() for name in want)
    assert gpu.turns == 1


def test_graphs_around_the_denoiser_are_not_captured(
    small: Small, shared_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu: Any = StandIn()
    monkeypatch.setattr(Aoti, "_gpu", gpu)
    graphs = Aoti(EngineOptions(threads=1)).load(small.bundle, tuple(small.graphs.values()))
    assert {spec: graph.captured for spec, graph in graphs.items()} == {
        "full.onnx": True,
        "reuse.onnx": True,
        "text.onnx": False,
        "decoder.onnx": False,
    }
    inputs = random_inputs(small.graphs["text"], 1)
    assert_close(small.graphs["text"], called(graphs["text.onnx"], inputs), small.expected("text", inputs))
    assert (gpu.rehearsals, gpu.turns) == ([], 1)


# --- channels last ------------------------------------------------------------------------------


class ChannelsLast(Aoti):
    """As on a GPU in 16 bits."""

    def _channels_last(self, bundle: Bundle, spec: GraphSpec) -> bool:
        return True


@pytest.fixture(scope="module")
def convolved(tmp_path_factory: pytest.TempPathFactory) -> Convolved:
    return Convolved(tmp_path_factory.mktemp("convolved") / "bundle")


def test_channels_last_gives_the_same(
    convolved: Convolved, shared_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights of convolutions are compiled for the order that they come in, and kept once for all graphs."""
    engine = ChannelsLast(EngineOptions(threads=1))
    graph = engine.load(convolved.bundle, [convolved.spec])[convolved.spec.file]
    inputs = random_inputs(convolved.spec, 2)
    convolved.assert_close(called(graph, inputs), inputs, 1e-5)
    strides = {tuple(tensor.shape): tensor.stride() for tensor in graph.constants.values() if tensor.ndim == 4}
    assert strides == {(32, 3, 3, 3): (27, 1, 9, 3), (32, 32, 3, 3): (288, 1, 96, 32), (3, 32, 1, 1): (32, 1, 1, 1)}
    # A kernel reads by the strides that it was compiled for, whatever the tensor's own are.
    monkeypatch.setattr(Read, "of", lambda self, weights, compute: weights.tensor(self.name, compute))
    says = r"cannot load full\.onnx: .* strides \[27, 9, 3, 1\], not \[27, 1, 9, 3\]; remove the engine cache"
    with pytest.raises(EngineError, match=says):
        ChannelsLast(EngineOptions(build=False)).load(convolved.bundle, [convolved.spec])


def test_a_weight_in_another_order_is_one_copy(convolved: Convolved) -> None:
    weights = Aoti(EngineOptions())._weights(convolved.bundle)
    last = weights.tensor("conv.in", channels_last=True)
    assert weights.tensor("conv.in", channels_last=True) is last
    assert weights.tensor("conv.in").is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, weights.tensor("conv.in"), rtol=0, atol=0)


def test_channels_last_is_for_16_bits_on_a_gpu(convolved: Convolved) -> None:
    def says(device: str, precision: str | None) -> bool:
        engine = Aoti(EngineOptions())
        engine.device, engine.options = torch.device(device), EngineOptions(precision=precision)
        return engine._channels_last(convolved.bundle, convolved.spec)

    got = [says(device, precision) for device in ("cpu", "cuda") for precision in (None, "f16", "bf16")]
    assert got == [False, False, False, False, True, True]
