"""Calls of AOTInductor's graphs on the CPU, for tests."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray

from tgate_runtime.engines.aoti import AotiExecutable, TorchBuffer

CPU = torch.device("cpu")


def called(graph: AotiExecutable, inputs: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """The graph's outputs from buffers of their own."""
    spec, batch = graph.spec, len(next(iter(inputs.values())))
    buffers = {t.name: TorchBuffer.zeros(t.resolve(batch), t.dtype, CPU) for t in (*spec.inputs, *spec.outputs)}
    for name, values in inputs.items():
        buffers[name].write(values)
    graph.bind({n: buffers[n] for n in spec.input_names()}, {n: buffers[n] for n in spec.output_names()})()
    return {name: buffers[name].read() for name in spec.output_names()}
