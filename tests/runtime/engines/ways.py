"""The engines that run on any machine, and the CUDA engine with a CPU in place of the GPU."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnxruntime as ort

from tests.runtime.engines.ort_cuda.plain import in_plain_operators, with_weights
from tgate_engine.graph import GraphSpec
from tgate_runtime.engines import open_engine
from tgate_runtime.engines.ort_cuda import OrtCuda
from tgate_runtime.engines.ort_cuda.lowering import Lowered
from tgate_runtime.engines.protocol import Engine, EngineOptions


class OnTheCpu(OrtCuda):
    """Everything but CUDA itself, and the operators that it alone has."""

    provider = "CPUExecutionProvider"
    kind = "cpu"

    def providers(self, captured: bool, half: bool) -> list[tuple[str, dict[str, str]]]:
        return [(self.provider, {})]

    def lowered(self, data: bytes, outputs: Collection[str] | None = None) -> Lowered:
        lowered = super().lowered(data, outputs)
        return replace(lowered, data=in_plain_operators(lowered.data))

    def _load(
        self,
        data: bytes,
        folder: Path,
        spec: GraphSpec,
        weights: Mapping[str, Any],
        captured: bool,
        given: Mapping[str, Any],
    ) -> ort.InferenceSession:
        within = {name: value for name, value in weights.items() if name not in given}
        return super()._load(with_weights(data, within), folder, spec, weights, captured, given)


WAYS: Mapping[str, Callable[[], Engine]] = {
    "ort-cpu fast": lambda: open_engine("ort-cpu", threads=1, memory="fast"),
    "ort-cpu shared": lambda: open_engine("ort-cpu", threads=1, memory="shared"),
    "ort-cuda shared, on the CPU": lambda: OnTheCpu(EngineOptions(memory="shared")),
    "ort-cuda fast, on the CPU": lambda: OnTheCpu(EngineOptions(memory="fast")),
    "openvino": lambda: open_engine("openvino", threads=1, precision="f32"),
    "openvino shared": lambda: open_engine("openvino", threads=1, precision="f32", memory="shared"),
    "aoti": lambda: open_engine("aoti", threads=1),
}
