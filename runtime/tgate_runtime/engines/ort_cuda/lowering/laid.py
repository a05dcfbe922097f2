"""Weights in the layout and dtype that a kernel wants, where it is not the weight file's."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from tgate_runtime.weights import Weight

LAID = "tgate.laid"
"""Under which key a value's ``meta`` keeps the :class:`Laid` that it is."""
BEYOND = 1 << 50
"""Where in the weight file an initializer says that it lies which is in no file: far beyond its end. Should the engine
ever read it, rather than take the tensor that it is handed, it fails. At the place of its source it would find as many
bytes in the wrong order."""


@dataclass(frozen=True)
class Laid:
    """A tensor of the weight file, by its name there: its dimensions in another ``order``, or as they are, in another
    ``dtype``, or its own."""

    source: str
    order: tuple[int, ...] = ()
    dtype: str = ""

    def of(self, weight: Weight) -> Weight:
        """``weight``, which is the source, laid like this: a copy, or itself where nothing is to be changed."""
        array, dtype = weight.array, weight.dtype
        if self.order:
            array = np.ascontiguousarray(array.transpose(self.order))
        if self.dtype and self.dtype != dtype:
            dtype, array = self.dtype, array.astype(self.dtype)
        return Weight(dtype, array)


def laid(graph: ir.Graph, weight: ir.Value, order: tuple[int, ...]) -> ir.Value:
    """The initializer ``weight`` with its dimensions in that order, one for all who ask."""
    return _made(graph, weight, order, None, "".join(map(str, order)))


def in_float32(graph: ir.Graph, weight: ir.Value) -> ir.Value:
    """The initializer ``weight`` of float16 or float32 as float32, one for all who ask."""
    return weight if weight.dtype == ir.DataType.FLOAT else _made(graph, weight, (), ir.DataType.FLOAT, "float32")


def _made(graph: ir.Graph, weight: ir.Value, order: tuple[int, ...], dtype: ir.DataType | None, how: str) -> ir.Value:
    name = f"{weight.name}:{how}"  # no name of a weight file ends like that: its tensors are a checkpoint's
    if name in graph.initializers:
        return graph.initializers[name]
    tensor = weight.const_value
    assert tensor is not None  # what is no initializer is not asked for
    dims = tensor.shape.numpy()
    shape = [dims[i] for i in order] if order else list(dims)
    made = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype or tensor.dtype))
    if isinstance(tensor, ir.ExternalTensor):
        size = tensor.size * (dtype or tensor.dtype).itemsize
        made.const_value = ir.ExternalTensor(
            tensor.location, BEYOND, int(size), dtype or tensor.dtype, shape=ir.Shape(shape), name=name
        )
        made.meta[LAID] = Laid(str(weight.name), order, "float32" if dtype else "")
    else:
        array = tensor.numpy().transpose(order) if order else tensor.numpy()
        made.const_value = ir.tensor(np.ascontiguousarray(array.astype(np.float32) if dtype else array), name=name)
    graph.register_initializer(made)
    return made
