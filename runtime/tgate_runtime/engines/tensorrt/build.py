"""TensorRT's builder: one ONNX file of a bundle to one engine without weights, through Polygraphy.

TensorRT-RTX, with ``memory="shared"``, builds on hosts without a GPU; that is what the tests do.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import re
from collections import deque
from pathlib import Path
from typing import Any

import onnx

from tgate_engine.errors import EngineError
from tgate_engine.graph import GraphSpec
from tgate_runtime.engines.protocol import EngineOptions


def _library() -> Any:
    try:
        return importlib.import_module("tensorrt")
    except ModuleNotFoundError:
        return importlib.import_module("tensorrt_rtx")  # the same API, for GeForce and RTX GPUs


trt: Any = _library()
RTX: bool = trt.__name__ == "tensorrt_rtx"
# Polygraphy reads this while its TensorRT half is imported, and prints unless told otherwise.
_config: Any = importlib.import_module("polygraphy.config")
_config.USE_TENSORRT_RTX = RTX
importlib.import_module("polygraphy.logger.logger").__dict__["COLORED_MODULE_PRESENT"] = False
importlib.import_module("polygraphy.logger").G_LOGGER.use_python_logging_system = True
polygraphy: Any = importlib.import_module("polygraphy.backend.trt")
VERSION = f"{'RTX ' if RTX else ''}{trt.__version__}"
POLYGRAPHY = str(importlib.import_module("polygraphy").__version__)
RECIPE = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
"""The digest of this file: what makes engines of graphs."""


class Log(logging.Handler):
    """TensorRT's and Polygraphy's last complaints, kept for the message of an error instead of printed."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._lines: deque[str] = deque(maxlen=64)
        logger = logging.getLogger("Polygraphy")
        logger.addHandler(self)
        logger.propagate = False

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.ERROR:
            self._lines.append(record.getMessage())

    def clear(self) -> None:
        """Forget the complaints about earlier work."""
        self._lines.clear()

    def take(self, otherwise: str) -> str:
        """The first complaint since the last call: what follows it is consequence."""
        text = " ".join((self._lines[0] if self._lines else otherwise).split())
        self._lines.clear()
        text = re.sub(r"\x1b\[[0-9;]*m|^\[!\] |^\[E\] ", "", text)
        return re.sub(r" ?\(?In \w+ at /_src/\S+\)?", "", text)[:300]


log = Log()


def flags(options: EngineOptions) -> dict[str, bool]:
    """The builder's flags that do not stay as they are; ``options.memory`` must be settled."""
    stripped = options.memory == "fast"
    both = {
        "TF32": False,  # float32 is what the bundle's goldens hold it to
        "STRIP_PLAN": stripped,
        "REFIT_IDENTICAL": stripped,
    }
    # Otherwise TensorRT-RTX allocates by itself, and no CUDA graph can be captured.
    return {**both, "REQUIRE_USER_ALLOCATION": True} if RTX else both


def build_engine(path: Path, spec: GraphSpec, options: EngineOptions) -> bytes:
    """The engine of one ONNX file, serialized, for any batch of ``spec``; tuned for the largest.

    ``options.memory`` must be settled; ``spec`` is the graph's in the manifest. Raises :class:`EngineError`.
    """
    log.clear()
    shared = options.memory == "shared"
    profile = polygraphy.Profile()
    specs = {tensor.name: tensor for tensor in spec.inputs}
    try:
        if shared:
            model = without_weights(read_model(path))
            network = polygraphy.network_from_onnx_bytes(model, strongly_typed=True)
        else:
            network = polygraphy.network_from_onnx_path(str(path), strongly_typed=True)
        for tensor in map(network[1].get_input, range(network[1].num_inputs)):
            if -1 in tuple(tensor.shape) and tensor.name in specs:  # or Polygraphy makes up a shape
                least, most = (specs[tensor.name].resolve(batch) for batch in spec.batch)
                profile.add(tensor.name, least, most, most)
        for layer in map(network[1].get_layer, range(network[1].num_layers)):
            # The parser lets no attention be taken apart, and there are fused kernels for few: none in float32.
            if layer.type == getattr(trt.LayerType, "ATTENTION_INPUT", None):
                layer.__class__ = trt.IAttentionInputLayer
                layer.attention.decomposable = True
        if RTX:
            create = importlib.import_module("polygraphy.backend.tensorrt_rtx").create_config_rtx
            capabilities = [capability(options.architecture)] if options.architecture else None
            config = create(*network[:2], profiles=[profile], compute_capabilities=capabilities)
        else:
            config = polygraphy.create_config(*network[:2], profiles=[profile])
        for flag, on in flags(options).items():
            (config.set_flag if on else config.clear_flag)(getattr(trt.BuilderFlag, flag))
        return bytes(polygraphy.engine_bytes_from_network(network, config))
    except Exception as error:  # Polygraphy's own class, and pybind11's
        raise EngineError(f"TensorRT {VERSION} cannot build {path.name}: {log.take(str(error))}") from error


def weight_spans(model: Any) -> dict[str, tuple[int, int]]:
    """Each external initializer of an ONNX model: where it lies in the weight file, (offset, length) in bytes."""
    spans = {}
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            where = {entry.key: entry.value for entry in tensor.external_data}
            spans[tensor.name] = int(where.get("offset", 0)), int(where["length"])
    return spans


def read_model(path: Path) -> Any:
    """An ONNX file, its external weights left where they are."""
    return onnx.load(path, load_external_data=False)


def without_weights(model: Any) -> bytes:
    """The model with its external initializers as inputs, of the same names."""
    external = weight_spans(model)
    inside = []
    for tensor in model.graph.initializer:
        if tensor.name in external:
            model.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            inside.append(tensor)
    del model.graph.initializer[:]
    model.graph.initializer.extend(inside)
    serialized: bytes = model.SerializeToString()
    return serialized


def capability(name: str) -> tuple[int, int]:
    """``"sm_89"`` as (8, 9). Raises :class:`EngineError` listing what TensorRT-RTX builds for."""
    match = re.fullmatch(r"sm_(\d+)(\d)", name)
    if match is None or f"SM{match[1]}{match[2]}" not in trt.ComputeCapability.__members__:
        known = ", ".join(f"sm_{n[2:]}" for n in trt.ComputeCapability.__members__ if n.startswith("SM"))
        raise EngineError(f"TensorRT-RTX {trt.__version__} builds for {known}, got {name!r}")
    return int(match[1]), int(match[2])
