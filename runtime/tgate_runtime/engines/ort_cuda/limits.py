"""What ONNX Runtime's CUDA provider makes of a graph's numbers, known before it is loaded."""

from __future__ import annotations

from typing import Any

from tgate_engine.dtypes import DTYPES
from tgate_engine.errors import EngineError
from tgate_engine.graph import GraphSpec
from tgate_runtime.graph_check import ModelMessage

_EXTERNAL = 1  # TensorProto.EXTERNAL: a weight
_HALVES = {DTYPES[name].onnx for name in ("float16", "bfloat16")}
_NO_BFLOAT16 = "Resize"
"""What every U-Net and every decoder has, and ONNX Runtime has no kernel for in bfloat16, on any device. It lacks Pad,
Round and Reciprocal too, but those may take numbers of float32 in such a graph; it says so itself when it is loaded."""


def multiplies_in_half(data: bytes) -> bool:
    """Whether a graph, an ONNX file's bytes, has weights of 16 bits."""
    return bool(_HALVES & _weights(ModelMessage.FromString(data)))


def refuse_bfloat16(data: bytes, spec: GraphSpec) -> None:
    """Raises :class:`EngineError` for a graph in bfloat16 that ONNX Runtime has not all kernels for: a U-Net's or a
    decoder's."""
    model = ModelMessage.FromString(data)
    has = any(node.op_type == _NO_BFLOAT16 for node in model.graph.node)
    if has and DTYPES["bfloat16"].onnx in _weights(model):
        raise EngineError(
            f"{spec.file} is in bfloat16, in which ONNX Runtime has no {_NO_BFLOAT16}; export with --dtype fp16, or "
            "take --engine aoti"
        )


def _weights(model: Any) -> set[int]:
    """The types of a graph's weights, by their numbers in ``TensorProto.DataType``."""
    return {tensor.data_type for tensor in model.graph.initializer if tensor.data_location == _EXTERNAL}
