"""torch-tensorrt where there is neither a GPU nor TensorRT: it lowers a graph, and says what it could not convert.

It is installed without what it depends on, as TensorRT cannot be had from a registry: its own code, the bindings that
go with it, and a stub in TensorRT's place. It asks PyTorch for a GPU while it is imported, and is told of one.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.runtime.engines.bindings import loaded
from tgate_engine.bundle import Bundle
from tgate_engine.graph import GraphSpec
from tgate_runtime.engines.aoti.graph import OnnxModule, Weights, trace

CPU = torch.device("cpu")


@contextmanager
def torch_tensorrt(folder: Path) -> Iterator[ModuleType]:
    """Its ``dynamo`` package, imported over a stub that is built in ``folder``. For one process, which must not have
    imported TensorRT before."""
    bindings = loaded(folder)
    alias = ModuleType("tensorrt")
    alias.__dict__.update({name: value for name, value in vars(bindings).items() if name != "__spec__"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "tensorrt", alias)
        patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
        patch.setattr(torch.cuda, "current_device", lambda: 0)
        patch.setattr(torch._C, "_CudaDeviceProperties", object, raising=False)
        yield importlib.import_module("torch_tensorrt.dynamo")


def unsupported(dynamo: Any, bundle: Bundle, spec: GraphSpec, weights: Weights) -> tuple[int, set[str]]:
    """How many operators the graph is lowered to, as for full compilation, and which of them have no converter."""
    lowering = importlib.import_module("torch_tensorrt.dynamo.lowering")
    converters = importlib.import_module("torch_tensorrt.dynamo.conversion").DYNAMO_CONVERTERS
    settings = dynamo.CompilationSettings(require_full_compilation=True, assume_dynamic_shape_support=True)
    converters.set_compilation_settings(settings)
    program = trace(OnnxModule(bundle.file(spec.file).read_bytes(), spec, weights), CPU)
    program = lowering.pre_export_lowering(program, settings)
    program = program.run_decompositions(lowering.get_decompositions())
    module = lowering.post_lowering(program.module(), settings)
    nodes = [node for node in module.graph.nodes if node.op == "call_function"]
    return len(nodes), {str(node.target) for node in nodes if node not in converters}
