"""Prints what one call of each graph of a bundle asks of the GPU.

    python -m tests.cuda_stub -m tests.cuda_stub.counted BUNDLE [--names] [--batch N]

A bundle is a directory, or ``mini``. ``--names`` adds which kernels, and how often.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.cuda_stub.log import Event, Kind, of, recorded
from tgate_engine.bundle import Bundle
from tgate_engine.dtypes import storage
from tgate_engine.graph import DENOISE, GraphSpec
from tgate_runtime.engines.ort_cuda import OrtCuda
from tgate_runtime.engines.protocol import EngineOptions
from tgate_runtime.mini import place_of

COLUMNS = ("launches", "products", "convolutions", "attention", "copies")
"""The numbers of :class:`Counted`, in the order of a table's columns."""


@dataclass(frozen=True)
class Counted:
    """One call of a graph. ``launches``: of kernels, and calls of cuBLAS and cuDNN; of them ``products`` are cuBLAS's,
    ``convolutions`` cuDNN's, and ``attention`` whole attentions. ``copies``: of memory, and fills, beside them.
    ``names``: how often each was launched."""

    launches: int
    products: int
    convolutions: int
    attention: int
    copies: int
    names: Mapping[str, int]


def bound(engine: Any, graph: Any, spec: GraphSpec, batch: int = 1) -> tuple[Any, dict[str, Any]]:
    """A call on buffers of its own, and those by name."""
    inputs, outputs = (
        {t.name: engine.allocate(t.resolve(batch), t.dtype) for t in tensors} for tensors in (spec.inputs, spec.outputs)
    )
    for name, buffer in inputs.items():
        if "mask" in name:  # of which none set is no prompt
            buffer.write(np.ones((), storage(buffer.dtype)))
    return graph.bind(inputs, outputs), inputs | outputs


def counted(engine: OrtCuda, graph: Any, spec: GraphSpec, batch: int = 1) -> Counted:
    """One call of a loaded graph: what was captured of it, or what a second call asks."""
    with recorded() as events:
        call, _ = bound(engine, graph, spec, batch)
    if spec.role == DENOISE:
        return _of([event for event in events if event.captured])
    call()
    with recorded() as events:
        call()
    return _of(events)


def _of(events: list[Event]) -> Counted:
    names = Counter(event.name for event in of(events, Kind.LAUNCH))

    def named(*parts: str) -> int:
        return sum(times for name, times in names.items() if any(part in name for part in parts))

    return Counted(
        launches=names.total(),
        products=named("cublas"),
        convolutions=named("cuDNN on ", "cuDNN without ", "cudnnConvolution"),
        attention=named("flash_fwd", "attention_kernel_batched", "cuDNN attention"),
        copies=len(of(events, Kind.COPY, Kind.SET)),
        names=names,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle")
    parser.add_argument("--names", action="store_true")
    parser.add_argument("--batch", type=int, default=1)
    arguments = parser.parse_args()
    bundle = Bundle.open(place_of(arguments.bundle))
    engine = OrtCuda(EngineOptions())
    print("|", " | ".join(("graph", *COLUMNS)), "|")
    for name, spec in bundle.manifest.shapes[0].graphs.items():
        got = counted(engine, engine.load(bundle, [spec])[spec.file], spec, arguments.batch)
        print("|", " | ".join((f"`{name}`", *(str(getattr(got, column)) for column in COLUMNS))), "|")
        if arguments.names:
            for kernel, times in Counter(got.names).most_common():
                print(f"    {times:5} {kernel:.110}")


if __name__ == "__main__":
    main()
