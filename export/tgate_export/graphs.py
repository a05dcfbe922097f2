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

import numpy as np
import onnx_ir as ir
import onnxscript.optimizer
import sympy
import torch
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    DeduplicateInitializersPass,
    IdentityEliminationPass,
    LiftConstantsToInitializersPass,
    RemoveUnusedNodesPass,
    RemoveUnusedOpsetsPass,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from tgate_engine.errors import ExportError
from tgate_engine.manifest import TensorSpec, batches, multiple, resolve

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

    ``weights`` maps the names of its weight initializers to where their values come from; ``inputs`` and
    ``outputs`` are what is left of the requested ones after everything unused has been removed.
    """

    name: str
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
    ``outputs``: the results' names; their first dimensions are multiples of the batch.
    ``components``: prefixes of parameter names to components of the checkpoint. ``transposed``: parameter names
    whose values are transposed on their way into the weight file. Raises :class:`ExportError` where PyTorch cannot.
    """
    example_batch = batch[0] if batch[0] == batch[1] else max(2, batch[0])
    symbol = torch.export.Dim("batch", min=batch[0], max=batch[1]) if batch[0] != batch[1] else None
    dynamic = tuple(_dynamic(spec, symbol) for spec in inputs) if symbol is not None else None
    with mode, torch.no_grad(), _quiet():
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
    _simplify(model)
    kept = _drop_unused_inputs(graph, {spec.name: spec for spec in inputs}, weights)
    return TracedGraph(
        name=name,
        model=model,
        inputs=kept,
        outputs=tuple(_spec_of(value, example_batch) for value in graph.outputs),
        weights={n: w for n, w in weights.items() if n in graph.initializers},
    )


def _example(spec: TensorSpec, batch: int) -> Tensor:
    return torch.zeros(resolve(spec.shape, batch), dtype=getattr(torch, spec.dtype))


def _dynamic(spec: TensorSpec, symbol: Any) -> dict[int, Any]:
    counts = {i: multiple(d) for i, d in enumerate(spec.shape) if isinstance(d, str)}
    return {i: symbol if count == 1 else count * symbol for i, count in counts.items()}


def _restore_constants(graph: ir.Graph, buffers: Mapping[str, Tensor]) -> None:
    """Tracing made the module's buffers fake, too; their values are known, and belong in the graph."""
    for name, value in graph.initializers.items():
        if name in buffers:
            value.const_value = ir.tensor(buffers[name].detach().numpy(), name=name)


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


def slim(model: ir.Model) -> None:
    """Leave only what an engine needs: short names, no notes, no shapes of inner values (engines infer them)."""
    graph = model.graph
    kept = {*graph.inputs, *graph.outputs, *graph.initializers.values()}
    count = 0
    for i, node in enumerate(graph):
        node.name = f"n{i}"
        node.doc_string = None
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in kept:
                value.name, value.shape, value.type = f"v{count}", None, None
                count += 1
    for value in kept:
        value.metadata_props.clear()
        value.doc_string = None
    graph.metadata_props.clear()
    graph.doc_string = None
    model.metadata_props.clear()
    model.doc_string = None


def _name_values(graph: ir.Graph, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    for value, name in zip(graph.inputs, inputs, strict=False):
        value.name = name
    for value, name in zip(graph.outputs, outputs, strict=True):
        value.name = name


def _simplify(model: ir.Model) -> None:
    for _ in range(2):  # folding one shape can make another one constant
        with np.errstate(all="ignore"):  # T5 takes the logarithm of zero, and does not use it
            onnxscript.optimizer.fold_constants(model, input_size_limit=1 << 20, output_size_limit=1 << 20)
        RemoveUnusedNodesPass()(model)
    _drop_units(model.graph)
    _drop_vain_squeezes(model.graph)
    _merge_heads(model.graph)
    _widen_masks(model.graph)
    IdentityEliminationPass()(model)
    LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    CommonSubexpressionEliminationPass()(model)
    DeduplicateInitializersPass()(model)
    RemoveUnusedNodesPass()(model)
    RemoveUnusedOpsetsPass()(model)


def _drop_units(graph: ir.Graph) -> None:
    """Multiplying or dividing by the constant 1 is the identity; diffusers does so after every attention."""
    for node in list(graph):
        if node.op_type not in ("Mul", "Div") or len(node.inputs) != 2:
            continue
        value, unit = node.inputs
        constant = None if unit is None else ir.convenience.get_const_tensor(unit)
        if value is None or constant is None or constant.size != 1 or len(constant.shape) > 0:
            continue
        if float(constant.numpy()) == 1.0 and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(value)
            graph.remove(node, safe=True)


def _drop_vain_squeezes(graph: ir.Graph) -> None:
    """Squeezing a dimension that is not 1 does nothing in PyTorch, and is an error in ONNX."""
    for node in list(graph):
        if node.op_type != "Squeeze" or len(node.inputs) != 2:
            continue
        value, axes = node.inputs
        wanted = None if axes is None else ir.convenience.get_const_tensor(axes)
        if value is None or value.shape is None or wanted is None or wanted.size != 1:
            continue
        size = value.shape[int(wanted.numpy().reshape(-1)[0])]
        if isinstance(size, int) and size != 1 and not node.outputs[0].is_graph_output():
            node.outputs[0].replace_all_uses_with(value)
            graph.remove(node, safe=True)


def _merge_heads(graph: ir.Graph) -> None:
    """Give attention its queries, keys and values as [B, L, heads * width]: engines that split the heads themselves
    need no kernel for it, where PyTorch's [B, heads, L, width] takes a transposition for each of them."""
    for node in list(graph):
        if node.op_type != "Attention" or node.domain or len(node.outputs) != 1:
            continue
        merged = [_before_split(value) for value in node.inputs[:3]]
        after = _only_use(_only_use(node, "Transpose"), "Reshape")
        found = [value for value in merged if value is not None]
        if len(found) < 3 or after is None or after.outputs[0].is_graph_output() or not _is_merged(after.outputs[0]):
            continue
        for place, (value, heads) in enumerate(found):
            node.replace_input_with(place, value)
            if place < 2:
                name = ("q_num_heads", "kv_num_heads")[place]
                node.attributes[name] = ir.AttrInt64(name, heads)
        node.outputs[0].shape = after.outputs[0].shape
        after.outputs[0].replace_all_uses_with(node.outputs[0])


def _before_split(value: ir.Value | None) -> tuple[ir.Value, int] | None:
    """Where ``value`` [B, heads, L, width] is a tensor [B, L, heads * width], reshaped and transposed: that tensor, and
    its heads."""
    transpose = None if value is None else value.producer()
    if transpose is None or not _swaps_heads(transpose) or transpose.inputs[0] is None:
        return None
    split = transpose.inputs[0].producer()
    if split is None or split.op_type != "Reshape" or split.inputs[0] is None:
        return None
    whole, parts = split.inputs[0].shape, split.outputs[0].shape
    if whole is None or parts is None or len(whole) != 3 or len(parts) != 4 or not isinstance(parts[2], int):
        return None
    same = whole[1] == parts[1] and isinstance(parts[3], int) and whole[2] == parts[2] * parts[3]
    return (split.inputs[0], parts[2]) if same else None


def _only_use(node: ir.Node | None, op_type: str) -> ir.Node | None:
    """The one node that reads the first output of ``node``, if it is of that type, and nothing else reads it."""
    uses = [] if node is None else [use.node for use in node.outputs[0].uses()]
    if node is None or node.outputs[0].is_graph_output() or len(uses) != 1 or uses[0].op_type != op_type:
        return None
    return uses[0] if op_type != "Transpose" or _swaps_heads(uses[0]) else None


def _swaps_heads(node: ir.Node) -> bool:
    permutation = node.attributes.get("perm") if node.op_type == "Transpose" else None
    return permutation is not None and tuple(permutation.as_ints()) == (0, 2, 1, 3)


def _is_merged(value: ir.Value) -> bool:
    return value.shape is not None and len(value.shape) == 3


def _widen_masks(graph: ir.Graph) -> None:
    """Give attention masks a row for every query: engines do not repeat one row, though the operator says so."""
    for node in list(graph):
        if node.op_type != "Attention" or len(node.inputs) < 4:
            continue
        query, mask = node.inputs[0], node.inputs[3]
        if query is None or mask is None or query.shape is None or mask.shape is None or len(mask.shape) != 4:
            continue
        length = query.shape[-2]
        if mask.shape[-2] != 1 or not isinstance(length, int) or length == 1:
            continue
        rows = ir.Value(name=f"{node.name}.rows", const_value=ir.tensor([1, 1, length, 1], dtype=ir.DataType.INT64))
        graph.register_initializer(rows)
        expand = ir.Node("", "Expand", [mask, rows])
        wide = expand.outputs[0]
        wide.name, wide.type = f"{node.name}.mask", mask.type
        wide.shape = ir.Shape([*mask.shape[:2], length, mask.shape[3]])
        graph.insert_before(node, expand)
        node.replace_input_with(3, wide)


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
    """The spec of a graph output whose first dimension is a multiple of the batch and whose others are fixed."""
    if value.shape is None or value.dtype is None or not all(isinstance(dim, int) for dim in value.shape[1:]):
        raise ExportError(f"output {value.name!r} has shape {value.shape}; fixed sizes after the first are wanted")
    first, rest = value.shape[0], tuple(int(dim) for dim in value.shape[1:] if isinstance(dim, int))
    count, left = divmod(first, batch) if isinstance(first, int) else (size_for_one(first), 0)
    if left or count < 1:
        raise ExportError(f"output {value.name!r} has shape {value.shape} at a batch of {batch}; a multiple is wanted")
    return TensorSpec(name=str(value.name), dtype=_dtype_name(value.dtype), shape=(batches(count), *rest))


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
