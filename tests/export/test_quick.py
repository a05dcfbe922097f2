"""Graphs are the same without what is left out, and PyTorch is as it was afterwards."""

from __future__ import annotations

import contextlib
import gc
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from onnx_ir.schemas import OpSignature
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.experimental import proxy_tensor, symbolic_shapes
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.onnx._internal.exporter import _fx_passes as decompositions
from torch.onnx._internal.exporter._registration import ONNXRegistry
from torch.onnx._internal.fx.passes import type_promotion as promotion

from tgate_engine.graph import DENOISE, TensorSpec
from tgate_export import graphs, quick
from tgate_export.passes.slim import slim


class Layer(nn.Module):
    def forward(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        halves = x.chunk(2, dim=1)
        spread = torch.softmax(halves[0] @ halves[1].transpose(1, 2), -1).std(dim=(1, 2), keepdim=True)
        return (spread + 1) * x * (x > 0) / 2


class Views(nn.Module):
    """Operators without a translation to ONNX, and such as leave sizes to be inferred."""

    def forward(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        first, second = x.reshape(x.shape[0], -1, 3).chunk(2, dim=-2)
        both = (first.flatten(1) + second.movedim(-1, 1).movedim(1, -1).reshape(-1, 12)).view(-1, 2, 6)
        both = (both + 1).detach_()
        return (
            nn.functional.dropout(both.to(torch.float16).to(x.device), training=False)
            .flatten(0, 1)
            .float()
            .reshape(-1, 12)
        )


class Turned(nn.Module):
    """Reshaped in an order in which it does not lie in memory."""

    def forward(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        return torch.rsub(torch.rsub(x, 1), 2.5).movedim(1, 2).reshape(-1, 8, 3)


class Places(nn.Module):
    """A table of places, as the networks without one for their size make it; and what T5 makes of distances."""

    def __init__(self, indexing: str = "xy") -> None:
        super().__init__()
        self.indexing = indexing

    def forward(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        columns, rows = torch.meshgrid(torch.arange(6.0), torch.arange(4.0) * 10, indexing=self.indexing)
        steps = torch.arange(6, dtype=torch.float64)
        steps /= 3.0
        table = torch.outer(torch.arange(4, dtype=torch.float64), steps).float()
        near = torch.arange(6) + 0
        near += torch.min(torch.arange(6) * 2, torch.full((6,), 5))
        seen = (near > 2) & (near < 9)
        return torch.where(seen, x + (columns - rows).reshape(4, 6) + table, x)


class Sorted(nn.Module):
    """Both ways, along different axes; of all there are."""

    def forward(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        order = x.sort(dim=1, descending=True).indices
        return x.sort().values + order.sort(dim=1).indices + torch.sort(x, -2).indices


class InPlace(nn.Module):
    def forward(self, *inputs: Tensor) -> Tensor:
        y = inputs[0].clone()
        y[:, 1].mul_(2)
        return y


class ReadBefore(nn.Module):
    """What is changed in place is read as it was, and as another shows it."""

    def forward(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        y = x + 1
        seen = y.transpose(1, 2)
        doubled = y * 2
        y += x
        return y + seen.transpose(1, 2) + doubled


class Shown(nn.Module):
    """What nothing else reads is changed in place, and shows another's memory, which changes too."""

    def forward(self, *inputs: Tensor) -> Tensor:
        y = inputs[0] * 2
        z = y.transpose(1, 2)
        z += 1
        return y + y


class Narrower(nn.Module):
    """In place, the result is of the kind of what is changed."""

    def forward(self, *inputs: Tensor) -> Tensor:
        y = (inputs[0] * 4).round().half()
        y += (inputs[0] > 0).float()
        return y.float()


def traced(module: nn.Module | None = None, batch: tuple[int, int] = (1, 4)) -> bytes:
    graph = graphs.trace(
        "g",
        DENOISE,
        module or Layer(),
        mode=FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()),
        inputs=[TensorSpec(name="x", dtype="float32", shape=("batch", 4, 6))],
        outputs=["y"],
        batch=batch,
        components={},
        transposed=frozenset(),
    )
    slim(graph.model)
    content: bytes = ir.to_proto(graph.model).SerializeToString()
    return content


def test_a_graph_is_the_same_without_what_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    quickly = traced()
    monkeypatch.setattr(graphs, "quick", lambda **_: contextlib.nullcontext())
    assert traced() == quickly


@pytest.mark.parametrize(
    ("module", "batch", "times"),
    [
        (Views(), (1, 4), 0),
        (Turned(), (3, 3), 0),
        (Turned(), (1, 4), 0),
        (Places(), (1, 4), 0),
        (Places("ij"), (1, 1), 0),
        (Sorted(), (1, 4), 0),
        (InPlace(), (1, 4), 1),
        (ReadBefore(), (1, 1), 1),
        (Shown(), (1, 1), 1),
        (Narrower(), (1, 1), 1),
    ],
    ids=[
        "views",
        "turned",
        "turned, of any batch",
        "places",
        "places of rows first",
        "sorted",
        "in place",
        "read before",
        "shown",
        "narrower",
    ],
)
def test_what_is_traced_once_computes_what_pytorch_computes(
    module: nn.Module, batch: tuple[int, int], times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced again only where operators change tensors in place that something else reads; then by PyTorch's rules."""
    again = []
    real = ExportedProgram.run_decompositions

    def counted(program: ExportedProgram, *arguments: Any) -> ExportedProgram:
        again.append(program)
        return real(program, *arguments)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", counted)
    session = ort.InferenceSession(traced(module, batch))
    assert len(again) == times
    for images in sorted({batch[0], min(batch[1], 3)}):
        x = torch.randn(images, 4, 6, generator=torch.Generator().manual_seed(1))
        np.testing.assert_array_equal(session.run(None, {"x": x.numpy()})[0], module(x).numpy())


@pytest.mark.parametrize("sought", [True, False])
def test_garbage_is_sought_again_if_it_was(sought: bool) -> None:
    before, within = gc.isenabled(), []

    def fail() -> None:
        with quick.quick():
            within.append(gc.isenabled())
            raise ValueError("in the middle")

    try:
        (gc.enable if sought else gc.disable)()
        with pytest.raises(ValueError, match="in the middle"):
            fail()
        assert [*within, gc.isenabled()] == [False, sought]
    finally:
        (gc.enable if before else gc.disable)()


def test_translations_are_read_once_and_pytorch_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = ONNXRegistry.from_torchlib
    owners = (torch.fx.config, dynamo, proxy_tensor, symbolic_shapes, OpSignature, decompositions)
    before = [dict(vars(owner)) for owner in owners]

    def counted(_table: type, /, **options: int) -> object:
        calls.append(options)
        return real(**options)

    monkeypatch.setattr(ONNXRegistry, "from_torchlib", classmethod(counted))
    monkeypatch.setattr(quick, "_read", {})
    own, run_node = vars(ONNXRegistry)["from_torchlib"], promotion._TypePromotionInterpreter.run_node
    for _ in range(2):
        traced()
    assert len(calls) == 1
    assert [dict(vars(owner)) for owner in owners] == before
    assert vars(ONNXRegistry)["from_torchlib"] is own
    assert promotion._TypePromotionInterpreter.run_node is run_node
    assert torch.fx.config.do_not_emit_stack_traces is False


def test_a_pytorch_that_has_none_of_it_exports_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    before = traced()
    for part in ("lazily", "Translations", "passes", "promotion", "recorder", "symbols", "schemas", "results"):
        monkeypatch.setattr(quick, part, None)
    monkeypatch.delattr(torch.fx.config, "do_not_emit_stack_traces")
    assert traced() == before
