"""What tracing makes of attention, against the module that was traced, in eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from tgate_engine.graph import DENOISE, TensorSpec
from tgate_export.graphs import TracedGraph, trace
from tgate_export.macs import count
from tgate_export.scratch import peak_bytes

HEADS, WIDTH, QUERIES, KEYS = 3, 8, 5, 7


class Layer(nn.Module):
    """Attention as diffusers writes it. ``turn``: what is done to each head's queries after they are split."""

    def __init__(self, turn: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.turn = turn

    def forward(self, *inputs: Tensor) -> Tensor:
        mask = inputs[3] if len(inputs) > 3 else None
        q, k, v = (x.view(x.shape[0], -1, HEADS, WIDTH).transpose(1, 2) for x in inputs[:3])
        q = q if self.turn is None else self.turn(q)
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return found.transpose(1, 2).reshape(q.shape[0], -1, HEADS * WIDTH) * 2


def traced(layer: Layer, batch: tuple[int, int], mask: tuple[int, ...] | None) -> TracedGraph:
    inputs = [
        TensorSpec(name=name, dtype="float32", shape=("batch", length, HEADS * WIDTH))
        for name, length in (("q", QUERIES), ("k", KEYS), ("v", KEYS))
    ]
    if mask is not None:
        inputs.append(TensorSpec(name="mask", dtype="float32", shape=("batch", *mask)))
    return trace(
        "layer",
        DENOISE,
        layer,
        mode=FakeTensorMode(),
        inputs=inputs,
        outputs=["y"],
        batch=batch,
        components={},
        transposed=frozenset(),
    )


def differs(graph: TracedGraph, layer: Layer, batch: int) -> float:
    """The largest difference between ONNX Runtime and eager PyTorch."""
    generator = torch.Generator().manual_seed(0)
    sizes = {spec.name: (batch, *(int(dim) for dim in spec.shape[1:])) for spec in graph.inputs}
    values = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    session = ort.InferenceSession(ir.to_proto(graph.model).SerializeToString(), providers=["CPUExecutionProvider"])
    got = session.run(None, {name: value.numpy() for name, value in values.items()})[0]
    return float(np.abs(np.asarray(got) - layer(*values.values()).numpy()).max())


def operators(graph: TracedGraph) -> list[str]:
    return [node.op_type for node in graph.model.graph]


@pytest.mark.parametrize(
    ("batch", "mask"),
    [((2, 2), None), ((1, 4), (1, 1, KEYS)), ((2, 2), (1, QUERIES, KEYS)), ((1, 4), (HEADS, 5, KEYS))],
)
def test_heads_stay_merged(batch: tuple[int, int], mask: tuple[int, ...] | None) -> None:
    graph = traced(Layer(), batch, mask)
    assert set(operators(graph)) <= {"Attention", "Expand", "Mul"}
    assert differs(graph, Layer(), 2) < 1e-6


def test_what_attention_costs_does_not_depend_on_how_it_is_written() -> None:
    merged = traced(Layer(), (1, 1), None)
    split = traced(Layer(turn=torch.neg), (1, 1), None)
    macs = HEADS * QUERIES * KEYS * 2 * WIDTH
    assert count(merged.model, frozenset(), 1).all == count(split.model, frozenset(), 1).all == macs
    scores, result = 4 * HEADS * QUERIES * KEYS, 4 * QUERIES * HEADS * WIDTH
    assert peak_bytes(merged.model) == scores + result
    assert peak_bytes(split.model) > scores + result  # and the queries that were turned
