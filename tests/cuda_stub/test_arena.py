"""Where things lie: a captured graph writes to its places in the sessions' arena for good, so all else is elsewhere.

The first file by its name: what its calls allocate, nobody has allocated before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import onnxruntime

from tests.cuda_stub.conftest import Bound, Opened
from tests.cuda_stub.counted import bound
from tests.cuda_stub.log import Event, Kind, memory, of, recorded
from tgate_engine.bundle import Bundle
from tgate_engine.graph import DENOISE
from tgate_runtime.engines.ort_cuda import OrtCuda
from tgate_runtime.engines.protocol import EngineOptions

HUNGRIEST_BYTES = 9_960_960
"""What ``reuse_self`` of ``mini`` worked in with an arena of its own. All six together took 31,376,384."""


def blocks(events: Iterable[Event]) -> set[tuple[int, int]]:
    """(begin, end) of the device memory that was allocated."""
    return {(e.address, e.address + e.size_bytes) for e in events if e.kind == Kind.ALLOCATE}


def block_of(address: int) -> tuple[int, int]:
    kind, begin, end = memory(address)
    assert kind == "device"
    return begin, end


def worked_in(opened: Callable[[str], Opened], once_bound: Callable[[str, str], Bound]) -> set[tuple[int, int]]:
    """The blocks that calls of ``mini`` made their sessions allocate."""
    own = opened("mini")
    scratch: set[tuple[int, int]] = set()
    for name, spec in own.specs.items():
        once = once_bound("mini", name)
        lasting = {block_of(buffer.address) for buffer in once.buffers.values()}
        scratch |= blocks(once.binding) - lasting
        if spec.role != DENOISE:
            with recorded() as events:
                once.call()
            scratch |= blocks(events)
    return scratch


def test_what_lasts_lies_outside_the_arena(
    opened: Callable[[str], Opened], once_bound: Callable[[str, str], Bound]
) -> None:
    """Buffers and weights of a bundle, and of the same one opened after its graphs were captured."""
    scratch = worked_in(opened, once_bound)
    assert len(scratch) > 10
    own = opened("mini")
    engine = OrtCuda(EngineOptions())
    with recorded() as loading:
        later = engine.load(own.bundle, tuple(own.specs.values()))
    uploaded = {block_of(event.address) for event in of(loading, Kind.COPY) if event.across}
    assert uploaded
    assert not uploaded & scratch
    weights = {block_of(value.data_ptr()) for graph in own.graphs.values() for value in graph._weights.values()}
    assert weights
    assert not weights & scratch
    for name, spec in own.specs.items():
        _, buffers = bound(engine, later[spec.file], spec)
        for each in (*once_bound("mini", name).buffers.values(), *buffers.values()):
            assert block_of(each.address) not in scratch


def test_ONNX_Runtime_would_put_a_buffer_there(
    opened: Callable[[str], Opened], once_bound: Callable[[str, str], Bound]
) -> None:
    """Why buffers come from elsewhere; and that between calls nothing is kept in the arena: each of its blocks can be
    had whole."""
    scratch = worked_in(opened, once_bound)
    with recorded() as events:
        values = [
            onnxruntime.OrtValue.ortvalue_from_shape_and_type((end - begin,), np.uint8, "cuda", 0)
            for begin, end in sorted(scratch, key=lambda block: block[0] - block[1])
        ]
    assert not of(events, Kind.ALLOCATE)
    assert {(v.data_ptr(), v.data_ptr() + v.shape()[0]) for v in values} == scratch


def test_graphs_share_what_they_work_in(
    opened: Callable[[str], Opened], once_bound: Callable[[str, str], Bound]
) -> None:
    """Six graphs work in less than twice what the hungriest does alone; another bundle's, of the same sizes, need no
    more."""
    scratch = worked_in(opened, once_bound)
    assert sum(end - begin for begin, end in scratch) < 2 * HUNGRIEST_BYTES
    own = opened("mini")
    engine = OrtCuda(EngineOptions())
    spec = own.specs["full"]
    graph = engine.load(own.bundle, [spec])[spec.file]
    held = [engine.allocate(t.resolve(1), t.dtype) for t in (*spec.inputs, *spec.outputs)]
    free = {buffer.address for buffer in held}
    del held  # so that the buffers themselves need no new block
    with recorded() as events:
        _, buffers = bound(engine, graph, spec)
    assert {buffer.address for buffer in buffers.values()} <= free
    assert not of(events, Kind.ALLOCATE)


def test_a_bundle_in_private_copies_lies_outside_too(
    opened: Callable[[str], Opened], once_bound: Callable[[str, str], Bound]
) -> None:
    scratch = worked_in(opened, once_bound)
    own = opened("mini")
    bundle: Bundle = own.bundle
    with recorded() as loading:
        OrtCuda(EngineOptions(memory="fast")).load(bundle, [own.specs["full"]])
    uploads = [event.address for event in of(loading, Kind.COPY) if event.across]
    assert len(uploads) > 100
    assert not [address for address in uploads for begin, end in scratch if begin <= address < end]
