"""An ONNX graph of a bundle as a PyTorch module: a table of operators, and a loop over the nodes.

The module gives what the graph gives, computes it with the operators that PyTorch's compilers know best, and can be
traced by ``torch.export``. Its weights are buffers that hold the tensors of the weight file, not copies.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from tgate_engine.dtypes import DTYPES
from tgate_engine.errors import EngineError
from tgate_engine.graph import BATCH, GraphSpec, TensorSpec
from tgate_runtime.engines.aoti.operators import HOST, OPERATORS, SHAPE_OPERATORS, TORCH_DTYPE, Attributes, shape_of
from tgate_runtime.engines.protocol import Instead, check_interface
from tgate_runtime.weights import map_weights

_DTYPE_OF = {dtype.onnx: name for name, dtype in DTYPES.items()}


class Weights:
    """The tensors of a bundle's weight file on one device: each is made when it is first asked for, then shared.

    On the CPU, in the file's own dtype and order, a tensor is a view of the file's pages, read when they are needed; it
    must not be written to. ``instead``: what is taken in place of the file's. Raises
    :class:`~tgate_engine.errors.BundleError` for a damaged file.
    """

    def __init__(self, path: Path, device: torch.device, instead: Instead | None = None) -> None:
        self.device = device
        self._mapped = map_weights(path) | dict(instead or {})
        self._made: dict[tuple[str, torch.dtype, bool], Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._mapped

    def structure(self) -> dict[str, list[Any]]:
        """Each tensor's dtype and shape, as JSON values."""
        return {name: [weight.dtype, list(weight.array.shape)] for name, weight in self._mapped.items()}

    def tensor(self, name: str, compute: torch.dtype | None = None, *, channels_last: bool = False) -> Tensor:
        """The tensor of that name; a float32 one is rounded to ``compute``, if given. ``channels_last`` is how the
        memory of one with four axes is laid out."""
        weight = self._mapped[name]
        own = getattr(torch, weight.dtype)
        dtype = compute if compute is not None and own == torch.float32 else own
        key = (name, dtype, channels_last)
        if key not in self._made:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that the file cannot be written to is meant
                tensor = torch.from_numpy(weight.array).view(own).to(self.device, dtype)
            self._made[key] = tensor.contiguous(memory_format=torch.channels_last) if channels_last else tensor
        return self._made[key]


_PRODUCTS = ("Attention", "Conv", "MatMul")  # nearly all of the work


class Read(NamedTuple):
    """How a graph reads one of the weights: which it is, whether it is rounded, whether channels come last."""

    name: str
    narrow: bool
    channels_last: bool

    def of(self, weights: Weights, compute: torch.dtype | None) -> Tensor:
        """The tensor that it reads."""
        return weights.tensor(self.name, compute if self.narrow else None, channels_last=self.channels_last)


@dataclass(frozen=True)
class _Node:
    operator: str
    attributes: Attributes
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


class OnnxModule(torch.nn.Module):  # type: ignore[misc]
    """A bundle's graph: called with the inputs of its spec in their order, it gives the outputs in theirs.

    ``data``: its file, as :func:`~tgate_runtime.graph_check.read_graphs` gives it.
    ``weights`` are referred to, not copied; ``reads`` says which tensor of the weight file each buffer ``w<i>`` is, and
    how it is read. Other buffers, ``c<i>``, are constants of the graph itself. With ``compute``, a narrower dtype,
    matrix products, convolutions and attention of a float32 graph take their inputs rounded to it. Their results, and
    all that lies between them, stay float32, and so does each last product, whose rounding guidance would amplify, with
    all that follows: guidance and the sampler. With ``channels_last`` the weights of convolutions of images lie so;
    what is computed is the same.

    Raises :class:`EngineError` for a file that is no such graph, or an operator that is not in the table.
    """

    def __init__(
        self,
        data: bytes,
        spec: GraphSpec,
        weights: Weights,
        compute: torch.dtype | None = None,
        *,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        try:
            graph = onnx.load_model_from_string(data).graph
        except Exception as error:  # protobuf has classes of its own
            raise EngineError(f"{spec.file} is not an ONNX graph ({error}); export the bundle again") from error
        inputs, outputs = (
            {t.name: _DTYPE_OF.get(t.type.tensor_type.elem_type, "unknown") for t in tensors}
            for tensors in (graph.input, graph.output)
        )
        check_interface(spec, inputs, outputs)
        self.spec = spec
        self.compute = compute
        self.reads: dict[str, Read] = {}
        self._file = spec.file
        self._nodes = [_node(spec.file, node) for node in graph.node]
        self._arrays: dict[str, NDArray[Any]] = {}  # whole numbers that may be shapes
        self._scalars: dict[str, tuple[tuple[int, ...], Any, torch.dtype]] = {}
        self._buffer_of: dict[str, str] = {}
        as_tensors = {
            name for node in self._nodes for i, name in enumerate(node.inputs) if i not in HOST.get(node.operator, ())
        }
        self._narrow = _leading_to_products(self._nodes) if compute is not None else frozenset()
        rounded = {name for node in self._nodes if self._is_narrow(node) for name in node.inputs}
        kernels = {node.inputs[1] for node in self._nodes if channels_last and node.operator == "Conv"}
        for i, tensor in enumerate(graph.initializer):
            self._keep(i, tensor, weights, as_tensors, rounded, kernels)
        self._device = weights.device

    def _keep(
        self, i: int, tensor: Any, weights: Weights, as_tensors: set[str], rounded: set[str], kernels: set[str]
    ) -> None:
        if tensor.data_location == TensorProto.EXTERNAL:
            if tensor.name not in weights:
                raise EngineError(
                    f"{self._file}: weight {tensor.name} is not in the weight file; export the bundle again"
                )
            self._buffer_of[tensor.name] = f"w{i}"
            images = tensor.name in kernels and len(tensor.dims) == 4
            read = self.reads[f"w{i}"] = Read(tensor.name, tensor.name in rounded, images)
            self.register_buffer(f"w{i}", read.of(weights, self.compute))
            return
        array = numpy_helper.to_array(tensor)
        dtype = TORCH_DTYPE[tensor.data_type]
        if array.size == 1:
            # Made in place, so that compilers see the number and not a tensor.
            self._scalars[tensor.name] = (array.shape, array.item(), dtype)
        elif tensor.name in as_tensors:
            bits = array.view(np.uint16) if dtype == torch.bfloat16 else array
            value = torch.from_numpy(bits.copy())
            self._buffer_of[tensor.name] = f"c{i}"
            value = value.view(dtype) if dtype == torch.bfloat16 else value
            self.register_buffer(f"c{i}", value.to(weights.device))
        if array.ndim <= 1 and array.dtype.kind in "if":
            self._arrays[tensor.name] = array

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        values: dict[str, Any] = dict(zip(self.spec.input_names(), inputs, strict=True))
        for node in self._nodes:
            try:
                results = self._run(node, values)
            except NotImplementedError as error:
                raise EngineError(f"engine aoti knows no {error}, which {self._file} has") from error
            values.update(zip(node.outputs, results, strict=False))
        return tuple(values[t.name].to(getattr(torch, t.dtype)) for t in self.spec.outputs)

    def _run(self, node: _Node, values: Mapping[str, Any]) -> Sequence[Any]:
        if node.operator == "Shape":
            return [shape_of(node.attributes, values[node.inputs[0]])]
        if isinstance(values.get(node.inputs[0]), np.ndarray) or (
            node.operator in ("Concat", "Mul") and any(isinstance(values.get(n), np.ndarray) for n in node.inputs)
        ):
            arrays = [values[name] if name in values else self._arrays[name] for name in node.inputs]
            if node.operator not in SHAPE_OPERATORS:
                raise NotImplementedError(f"{node.operator} of shapes")
            return [SHAPE_OPERATORS[node.operator](node.attributes, *arrays)]
        host = HOST.get(node.operator, ())
        args = [self._value(name, i in host, values) for i, name in enumerate(node.inputs)]
        if self._is_narrow(node):
            args = [x.to(self.compute) if _is_float32(x) else x for x in args]
            return [OPERATORS[node.operator](node.attributes, *args).float()]
        if self.compute is not None:  # a rounded weight that is read elsewhere, too
            args = [x.float() if isinstance(x, Tensor) and x.dtype == self.compute else x for x in args]
        result = OPERATORS[node.operator](node.attributes, *args)
        return result if isinstance(result, (list, tuple)) else [result]

    def _is_narrow(self, node: _Node) -> bool:
        return node.operator in _PRODUCTS and node.outputs[0] in self._narrow

    def _value(self, name: str, host: bool, values: Mapping[str, Any]) -> Any:
        if not name:
            return None
        if host:
            array = values.get(name, self._arrays.get(name))
            if not isinstance(array, np.ndarray):
                raise NotImplementedError("shapes, axes or bounds that are computed from values")
            return array.tolist() if array.ndim else [array.item()]
        if name in values:
            return values[name]
        if name in self._scalars:
            shape, value, dtype = self._scalars[name]
            return torch.full(shape, value, dtype=dtype, device=self._device)
        return getattr(self, self._buffer_of[name])


def _node(file: str, node: Any) -> _Node:
    known = node.domain in ("", "ai.onnx") and (node.op_type == "Shape" or node.op_type in OPERATORS)
    if not known:
        raise EngineError(f"engine aoti knows no operator {node.op_type}, which {file} has; use another engine")
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    return _Node(node.op_type, attributes, tuple(node.input), tuple(node.output))


def _leading_to_products(nodes: Sequence[_Node]) -> frozenset[str]:
    """The values that some product is computed from, at once or by way of other nodes."""
    leading: set[str] = set()
    for node in reversed(nodes):
        if node.operator in _PRODUCTS or not leading.isdisjoint(node.outputs):
            leading.update(node.inputs)
    return frozenset(leading)


def _is_float32(x: Any) -> bool:
    return isinstance(x, Tensor) and x.dtype == torch.float32


# --- tracing ------------------------------------------------------------------------------------


def trace(module: OnnxModule, device: torch.device) -> torch.export.ExportedProgram:
    """The module as ``torch.export`` sees it, for any batch of its spec."""
    least, most = module.spec.batch
    example = least if least == most else max(2, least)
    inputs = tuple(_zeros(tensor, example, device) for tensor in module.spec.inputs)
    symbol = None if least == most else torch.export.Dim(BATCH, min=least, max=most)
    dynamic = None if symbol is None else (tuple(_symbols(tensor, symbol) for tensor in module.spec.inputs),)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.export.export(module, inputs, dynamic_shapes=dynamic, strict=False)


def _zeros(tensor: TensorSpec, batch: int, device: torch.device) -> Tensor:
    return torch.zeros(tensor.resolve(batch), dtype=getattr(torch, tensor.dtype), device=device)


def _symbols(tensor: TensorSpec, symbol: Any) -> dict[int, Any]:
    return {axis: symbol for axis, dim in enumerate(tensor.shape) if dim == BATCH}
