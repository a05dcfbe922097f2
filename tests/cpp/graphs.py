"""Asks the probe what libtgate says of graphs, and Python the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cpp.probes import ask, record
from tgate_engine.errors import BundleError
from tgate_engine.graph import GraphSpec, TensorSpec
from tgate_engine.onnx_form import Placed, check_graph
from tgate_runtime.graph_check import ModelMessage

OK = "ok"


@dataclass(frozen=True)
class Case:
    """A graph's file, and what it is checked against."""

    data: bytes
    spec: GraphSpec
    weights_file: str
    weights: Mapping[str, Placed]
    lowered: bool = False

    def described(self) -> bytes:
        """All but the graph, as the probe reads it."""
        return json.dumps(
            {
                "file": self.spec.file,
                "batch": self.spec.batch,
                "inputs": [*map(_tensor, self.spec.inputs)],
                "outputs": [*map(_tensor, self.spec.outputs)],
                "weights_file": self.weights_file,
                "lowered": self.lowered,
                "weights": {n: [p.dtype, p.shape, p.offset, p.length] for n, p in self.weights.items()},
            }
        ).encode()


def _tensor(spec: TensorSpec) -> Any:
    return [spec.name, spec.dtype, [-1 if isinstance(size, str) else size for size in spec.shape]]


def cpp_verdicts(cpp_build: Path, cases: Sequence[Case], kind: str = "G") -> list[str]:
    """A line for each case: "ok", or why it is refused."""
    records, described = [], b""
    for case in cases:
        if (text := case.described()) != described:
            records.append(record("S", text))
            described = text
        records.append(record(kind, case.data))
    lines = ask(cpp_build / "probe-graph", records)
    assert len(lines) == len(cases)
    return lines


def python_verdict(case: Case) -> str:
    try:
        check_graph(case.data, ModelMessage(), case.spec, case.weights_file, case.weights, lowered=case.lowered)
    except BundleError as error:
        return str(error)
    return OK
