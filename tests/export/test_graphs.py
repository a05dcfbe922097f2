"""What tracing makes of a module, against that module in eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.nn import functional as F

from tgate_engine.errors import ExportError
from tgate_engine.graph import BATCH, DENOISE, TensorSpec
from tgate_export.graphs import TracedGraph, store_linears_transposed, trace
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
        TensorSpec(name=name, dtype="float32", shape=(BATCH, length, HEADS * WIDTH))
        for name, length in (("q", QUERIES), ("k", KEYS), ("v", KEYS))
    ]
    if mask is not None:
        inputs.append(TensorSpec(name="mask", dtype="float32", shape=(BATCH, *mask)))
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


class Ends(nn.Module):
    """Reads two of three inputs; one output has the batch first, the other a size of its own."""

    def __init__(self, spoil: bool = False) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)
        self.spoil = spoil

    def forward(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        a, _, b = inputs
        joined = torch.cat([a, a]) if self.spoil else a
        return self.linear(joined), b.sum(dim=0, keepdim=True).expand(7, 4) * 2


def traced_ends(batch: tuple[int, int], spoil: bool = False) -> TracedGraph:
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    with mode:
        module = Ends(spoil)
        transposed = store_linears_transposed(module)
    return trace(
        "ends",
        DENOISE,
        module,
        mode=mode,
        inputs=[TensorSpec(name=name, dtype="float32", shape=(BATCH, 4)) for name in ("a", "idle", "b")],
        outputs=["x", "y"],
        batch=batch,
        components={"": "network"},
        transposed=transposed,
    )


@pytest.mark.parametrize("batch", [(1, 4), (2, 2)])
def test_a_graph_says_what_is_left_of_it(batch: tuple[int, int]) -> None:
    graph = traced_ends(batch)
    assert (graph.name, graph.role, graph.batch) == ("ends", DENOISE, batch)
    assert [(t.name, t.shape) for t in graph.inputs] == [("a", (BATCH, 4)), ("b", (BATCH, 4))]
    assert [(t.name, t.shape) for t in graph.outputs] == [("x", (BATCH, 3)), ("y", (7, 4))]
    weights = {name: (ref.component, ref.key, ref.transposed, ref.shape) for name, ref in graph.weights.items()}
    assert weights == {
        "linear.weight": ("network", "linear.weight", True, (4, 3)),
        "linear.bias": ("network", "linear.bias", False, (3,)),
    }


def test_an_output_that_is_not_the_batch_s_is_refused() -> None:
    """Two rows of an image would not lie in one row of its buffer."""
    with pytest.raises(ExportError, match="its first dimension must be the batch"):
        traced_ends((1, 4), spoil=True)


class Placed(nn.Module):
    """Adds a table of numbers, as networks have for positions."""

    table: Tensor

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("table", torch.linspace(-1, 1, 12).reshape(3, 4).to(dtype), persistent=False)

    def forward(self, *inputs: Tensor) -> Tensor:
        return inputs[0] + self.table


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_table_is_in_the_graph_in_any_dtype(dtype: torch.dtype) -> None:
    """NumPy, which has no bfloat16, is not asked."""
    module = Placed(dtype)
    graph = trace(
        "placed",
        DENOISE,
        module,
        mode=FakeTensorMode(allow_non_fake_inputs=True),
        inputs=[TensorSpec(name="x", dtype=str(dtype).removeprefix("torch."), shape=(BATCH, 3, 4))],
        outputs=["y"],
        batch=(2, 2),
        components={},
        transposed=frozenset(),
    )
    (table,) = [tensor for tensor in ir.to_proto(graph.model).graph.initializer if tensor.dims == [3, 4]]
    assert table.raw_data == module.table.view(torch.uint8).numpy().tobytes()
