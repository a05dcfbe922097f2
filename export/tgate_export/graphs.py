"""A PyTorch module, traced without weights, becomes an ONNX graph that points into the weight file.

Tracing happens under FakeTensorMode, so no weight is ever allocated. Linear layers are traced as a product with
their weight stored [in, out], the layout that engines consume: nothing is transposed, or copied for it, at load.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import sympy
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tgate_engine.errors import ExportError
from tgate_engine.graph import BATCH, Role, TensorSpec
from tgate_export.passes import simplify
from tgate_export.quick import quick

OPSET = 23


@dataclass(frozen=True)
class WeightRef:
    """One weight of a graph: the checkpoint's component and key it comes from, and whether it is stored transposed."""

    component: str
    key: str
    transposed: bool
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class TracedGraph:
    """An ONNX graph without its weights.

    ``name``: what plans call it. ``batch``: least and largest number of images in a call. ``weights`` maps the names of
    its weight initializers to where their values come from; ``inputs`` and ``outputs`` are what is left of
    the requested ones after everything unused has been removed.
    """

    name: str
    role: Role
    batch: tuple[int, int]
    model: ir.Model
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    weights: Mapping[str, WeightRef]


class _StoredLinear(nn.Module):
    """``nn.Linear`` with its weight kept as [in, out]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.new_empty(linear.in_features, linear.out_features), False)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        product = torch.matmul(x, self.weight)
        return product if self.bias is None else product + self.bias


def store_linears_transposed(module: nn.Module) -> frozenset[str]:
    """Replace every ``nn.Linear`` below ``module`` in place; returns the names of the weights that are transposed."""
    names: set[str] = set()
    for name, child in list(module.named_modules()):
        if type(child) is nn.Linear:
            parent_name, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(parent_name), leaf, _StoredLinear(child))
            names.add(f"{name}.weight")
    return frozenset(names)


def trace(
    name: str,
    role: Role,
    module: nn.Module,
    *,
    mode: FakeTensorMode,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[str],
    batch: tuple[int, int],
    components: Mapping[str, str],
    transposed: frozenset[str],
) -> TracedGraph:
    """Trace ``module`` (its parameters fake, of ``mode``) to an opset-23 graph.

    ``inputs``: the positional inputs, in order; their first dimension may be symbolic, between ``batch``'s bounds.
    ``outputs``: the results' names; where the batch may vary, it is their first dimension.
    ``components``: prefixes of parameter names to components of the checkpoint. ``transposed``: parameter names
    whose values are transposed on their way into the weight file. Raises :class:`ExportError` where PyTorch cannot.
    """
    example_batch = batch[0] if batch[0] == batch[1] else max(2, batch[0])
    # For a range up to 2 PyTorch 2.13 leaves nodes whose translation is a sequence, which no engine takes.
    largest = max(batch[1], 3)
    symbol = torch.export.Dim("batch", min=batch[0], max=largest) if batch[0] != batch[1] else None
    dynamic = tuple(_dynamic(spec, symbol) for spec in inputs) if symbol is not None else None
    with mode, torch.no_grad(), _quiet(), quick(symbolic=symbol is not None):
        args = tuple(_example(spec, example_batch) for spec in inputs)
        try:
            program = torch.export.export(module, args, dynamic_shapes=(dynamic,) if dynamic else None, strict=False)
            onnx_program = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, optimize=False, verbose=False, external_data=True
            )
        except Exception as error:  # torch raises many kinds; the user needs to know which graph, and why
            raise ExportError(f"graph {name!r} could not be traced: {type(error).__name__}: {error}") from error
    assert onnx_program is not None
    model = onnx_program.model
    graph = model.graph
    graph.name = name
    _restore_constants(graph, dict(module.named_buffers()))
    weights = _detach_weights(graph, frozenset(n for n, _ in module.named_parameters()), components, transposed)
    _name_values(graph, [spec.name for spec in inputs], tuple(outputs))
    with _quiet():
        simplify(model)
    kept = _drop_unused_inputs(graph, {spec.name: spec for spec in inputs}, weights)
    return TracedGraph(
        name=name,
        role=role,
        batch=batch,
        model=model,
        inputs=kept,
        outputs=tuple(_spec_of(value, example_batch) for value in graph.outputs),
        weights={n: w for n, w in weights.items() if n in graph.initializers},
    )


def _example(spec: TensorSpec, batch: int) -> Tensor:
    return torch.zeros(spec.resolve(batch), dtype=getattr(torch, spec.dtype))


def _dynamic(spec: TensorSpec, symbol: Any) -> dict[int, Any]:
    return {0: symbol} if spec.shape[0] == BATCH else {}


def _restore_constants(graph: ir.Graph, buffers: Mapping[str, Tensor]) -> None:
    """Tracing made the module's buffers fake, too; their values are known, and belong in the graph."""
    for name, value in graph.initializers.items():
        if name in buffers:
            value.const_value = TorchTensor(buffers[name].detach(), name=name)  # NumPy has no bfloat16


def _detach_weights(
    graph: ir.Graph, parameters: frozenset[str], components: Mapping[str, str], transposed: frozenset[str]
) -> dict[str, WeightRef]:
    """Turn weight initializers into graph inputs, so that no pass tries to read values that do not exist yet."""
    weights: dict[str, WeightRef] = {}
    for name, value in list(graph.initializers.items()):
        if name not in parameters:
            continue  # a constant that tracing met, such as a table of positions
        prefix = next(p for p in components if name.startswith(p))
        assert value.shape is not None
        assert value.dtype is not None
        weights[name] = WeightRef(
            component=components[prefix],
            key=name[len(prefix) :],
            transposed=name in transposed,
            shape=value.shape.numpy(),
            dtype=_dtype_name(value.dtype),
        )
        del graph.initializers[name]
        value.const_value = None
        graph.inputs.append(value)
    return weights


def _name_values(graph: ir.Graph, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    for value, name in zip(graph.inputs, inputs, strict=False):
        value.name = name
    for value, name in zip(graph.outputs, outputs, strict=True):
        value.name = name


def _drop_unused_inputs(
    graph: ir.Graph, specs: Mapping[str, TensorSpec], weights: Mapping[str, WeightRef]
) -> tuple[TensorSpec, ...]:
    """Inputs that nothing reads are no inputs: after the gate, the text disappears from the graph's signature."""
    used: list[TensorSpec] = []
    outputs = set(graph.outputs)
    for value in list(graph.inputs):
        alive = bool(value.uses()) or value in outputs
        assert value.name is not None
        if value.name in weights:
            graph.inputs.remove(value)
            if alive:
                value.const_value = None
                graph.initializers[value.name] = value
        elif alive:
            used.append(specs[value.name])
        else:
            graph.inputs.remove(value)
    return tuple(used)


def _spec_of(value: ir.Value, batch: int) -> TensorSpec:
    """The spec of a graph output, whose first dimension is the batch or, where that is fixed, any size."""
    shape = value.shape
    if shape is None or value.dtype is None or not all(isinstance(dim, int) for dim in shape[1:]):
        raise ExportError(f"output {value.name!r} has shape {shape}; fixed sizes after the first are needed")
    first, rest = shape[0], tuple(int(dim) for dim in shape[1:] if isinstance(dim, int))
    if not isinstance(first, int) and size_for_one(first) != 1:
        raise ExportError(f"output {value.name!r} has shape {shape}; its first dimension must be the batch")
    dim = first if isinstance(first, int) and first != batch else BATCH
    return TensorSpec(name=str(value.name), dtype=_dtype_name(value.dtype), shape=(dim, *rest))


def size_for_one(dim: int | ir.SymbolicDim) -> int:
    """A dimension's size for a batch of one; symbolic ones are expressions in the batch."""
    if isinstance(dim, int):
        return dim
    expression = sympy.sympify(str(dim.value))
    return int(expression.subs(dict.fromkeys(expression.free_symbols, 1)))


def _dtype_name(dtype: ir.DataType) -> str:
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())


@contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch's exporters talk about packages that are not there; only their errors matter here."""
    loggers = [logging.getLogger(n) for n in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
