"""How long a call takes, by size, graph and images: computed for SDXL on an H100, measured for a bundle on this one.

What is computed says so, and what it is computed from.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.loops import request
from tgate_runtime.runner import advance
from tgate_runtime.session import Session
from tgate_runtime.state import State

Key = tuple[str, str, int]
"""Size, graph, images in the call."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """``ms``: of a call. ``most``: the images that a call has at most. ``sizes``: how often each is asked for, as a
    share. ``origin``: where the numbers are from, in words."""

    name: str
    ms: Mapping[Key, float]
    most: int
    sizes: Mapping[str, float]
    origin: str


ROOFLINE_MS = {"full": 33.0, "reuse_self": 23.5, "reuse_cross": 15.0}
"""SDXL at 1024x1024, float16, one guided image, on an H100: GEMM at 620 TFLOP/s, convolution at 520, attention at 330,
memory at 2.8 TB/s. Arithmetic on the graphs' operators."""
FIXED_MS = 2.0
"""What a call of them takes however many images it has: gaps of 1 us between some 2,000 kernels. Nothing is taken off
for weights that are read once for all images, since these kernels wait for arithmetic."""
SDXL_SIZES = {"1024x1024": 0.6, "832x1216": 0.25, "768x768": 0.15}


def sdxl_h100(most: int = 4, fixed_ms: float = FIXED_MS) -> Table:
    """Computed: beyond what is fixed, time goes with images and pixels."""
    ms = {}
    for size in SDXL_SIZES:
        width, height = map(int, size.split("x"))
        for graph, one_ms in ROOFLINE_MS.items():
            for images in range(1, most + 1):
                ms[size, graph, images] = fixed_ms + (one_ms - fixed_ms) * images * width * height / 2**20
    origin = (
        f"computed, not measured: roofline of SDXL on an H100 at one image, {fixed_ms} ms of each call fixed, the rest "
        "in proportion to images and pixels"
    )
    return Table(name="sdxl-h100", ms=ms, most=most, sizes=SDXL_SIZES, origin=origin)


def adding(table: Table, added: float) -> Table:
    """The same calls for one image, and each further image adds that share of it: made up, to see what hangs on it."""
    ms = {
        (size, graph, images): table.ms[size, graph, 1] * (1 + added * (images - 1)) for size, graph, images in table.ms
    }
    origin = f"made up: one image as in {table.name}, and each further one adds {added} of it"
    return replace(table, name=f"{table.name}, added {added}", ms=ms, origin=origin)


def one_size(table: Table) -> Table:
    """All requests are of the first size."""
    size = next(iter(table.sizes))
    return replace(table, sizes={size: 1.0}, ms={key: ms for key, ms in table.ms.items() if key[0] == size})


def measured(session: Session, *, repeats: int = 5) -> Table:
    """The calls of a bundle's default plan on the session's engine, at its first size; the median of each."""
    size, plan = session.sizes[0], session.plan("default")
    most = max(shape.batch[1] for shape in session.shapes(size))
    state = State(session, plan, most)
    start, rows = request(session.manifest, 1)
    one: dict[str, Any] = {name: values[0] for name, values in rows.items()}
    times: dict[Key, list[float]] = {}
    for images in [count for count in range(1, most + 1) if any(a <= count <= b for a, b in state.batches())]:
        for repeat in range(repeats + 1):
            for row in range(images):
                state.begin(row, start[0], one, guidance_scale=plan.guidance_scale)
            while state.step(0) is not None:
                begin = time.perf_counter()
                done = advance(state, range(images))
                if repeat:  # the first walk binds the calls
                    times.setdefault((size, done.step.graph, images), []).append(time.perf_counter() - begin)
    return Table(
        name=session.manifest.model,
        ms={key: statistics.median(seconds) * 1e3 for key, seconds in times.items()},
        most=most,
        sizes={size: 1.0},
        origin=f"measured: {session.manifest.model} on {session.engine.name} {session.engine.version}, this machine",
    )
