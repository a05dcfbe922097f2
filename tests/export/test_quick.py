"""Graphs are the same without what is left out, and PyTorch is as it was afterwards."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv
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


class InPlace(nn.Module):
    def forward(self, *inputs: Tensor) -> Tensor:
        y = inputs[0].clone()
        y[:, 1].mul_(2)
        return y


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
    monkeypatch.setattr(graphs, "quick", contextlib.nullcontext)
    assert traced() == quickly


@pytest.mark.parametrize(
    ("module", "batch", "times"),
    [(Views(), (1, 4), 0), (Turned(), (3, 3), 0), (Turned(), (1, 4), 0), (InPlace(), (1, 4), 1)],
    ids=["views", "turned", "turned, of any batch", "in_place"],
)
def test_what_is_traced_once_computes_what_pytorch_computes(
    module: nn.Module, batch: tuple[int, int], times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced again only where operators change tensors in place; then by PyTorch's own rules."""
    again = []
    real = ExportedProgram.run_decompositions

    def counted(program: ExportedProgram, *arguments: Any) -> ExportedProgram:
        again.append(program)
        return real(program, *arguments)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", counted)
    session = ort.InferenceSession(traced(module, batch))
    assert len(again) == times
    for images in sorted({batch[0], 3}):
        x = torch.randn(images, 4, 6, generator=torch.Generator().manual_seed(1))
        np.testing.assert_array_equal(session.run(None, {"x": x.numpy()})[0], module(x).numpy())


def test_translations_are_read_once_and_pytorch_is_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = ONNXRegistry.from_torchlib

    def counted(_table: type, /, **options: int) -> object:
        calls.append(options)
        return real(**options)

    monkeypatch.setattr(ONNXRegistry, "from_torchlib", classmethod(counted))
    monkeypatch.setattr(quick, "_read", {})
    own, run_node = vars(ONNXRegistry)["from_torchlib"], promotion._TypePromotionInterpreter.run_node
    for _ in range(2):
        traced()
    assert len(calls) == 1
    assert vars(ONNXRegistry)["from_torchlib"] is own
    assert promotion._TypePromotionInterpreter.run_node is run_node
    assert torch.fx.config.do_not_emit_stack_traces is False


def test_a_pytorch_that_has_none_of_it_exports_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    before = traced()
    for part in ("lazily", "Translations", "passes", "promotion"):
        monkeypatch.setattr(quick, part, None)
    monkeypatch.delattr(torch.fx.config, "do_not_emit_stack_traces")
    assert traced() == before
