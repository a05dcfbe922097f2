"""What a trajectory takes in memory, beside what a request really allocates."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.toy_bundle import Toy, build, make_plan
from tests.toy_model import FEATURES
from tgate_engine.bundle import Bundle
from tgate_engine.footprint import buffers, carry_bytes, memory
from tgate_engine.graph import BATCH, DECODE, DENOISE, GraphSpec, Macs, TensorSpec
from tgate_export.methods.base import Settings
from tgate_runtime.engines.ort import OrtCpu
from tgate_runtime.session import Session
from tgate_runtime.state import State

SETTINGS = (
    Settings(steps=8, gate=5, self_interval=2),
    Settings(steps=8, gate=5, self_interval=2, fidelity_interval=2),
    Settings(steps=4, gate=4),
)


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    path = build(tmp_path_factory.mktemp("footprint") / "toy", Toy(carry_dtype=request.param))
    with Session.open(path, threads=1) as opened:
        yield opened


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_request_allocates_what_is_said(
    session: Session, monkeypatch: pytest.MonkeyPatch, settings: Settings, batch: int
) -> None:
    shape = session.shapes()[0]
    plan = make_plan("p", settings, Toy(), shape.graphs)
    with Session.open(session.bundle, plans=[plan], threads=1) as own:
        allocated: list[int] = []
        allocate = OrtCpu.allocate

        def counted(self: OrtCpu, sizes: tuple[int, ...], dtype: str) -> Any:
            allocated.append(math.prod(sizes) * {"float32": 4, "bfloat16": 2}[dtype])
            return allocate(self, sizes, dtype)

        monkeypatch.setattr(OrtCpu, "allocate", counted)
        state = State(own, plan, batch)
    assert memory(plan, session.manifest, shape, batch=batch)["request"] == sum(allocated)
    carried = sum(
        math.prod(buffer.shape) * (2 if buffer.dtype == "bfloat16" else 4) for buffer in state.carries().values()
    )
    assert carry_bytes(plan, shape.graphs, batch=batch) == carried


def test_carries_by_hand(session: Session) -> None:
    """Two blocks: self.i of both halves, cross.i and self.i.mean of one row each."""
    graphs = session.shapes()[0].graphs
    number = 4 if session.shapes()[0].graphs["full"].outputs[2].dtype == "float32" else 2
    rows = [2 * (2 + 1), 2 * (2 + 1 + 1), 0]
    for settings, of_image in zip(SETTINGS, rows, strict=True):
        plan = make_plan("p", settings, Toy(), graphs)
        assert carry_bytes(plan, graphs, batch=1) == of_image * FEATURES * number
        assert carry_bytes(plan, graphs, batch=4) == 4 * of_image * FEATURES * number


def test_weights_are_there_once(large: Path) -> None:
    manifest = Bundle.open(large).manifest
    size = (large / "weights.safetensors").stat().st_size
    for shape in manifest.shapes:
        assert memory(manifest.plan("default"), manifest, shape, batch=4)["weights"] == size
    nothing = replace(manifest, weights="")
    assert memory(manifest.plan("default"), nothing, manifest.shapes[0])["weights"] == 0


def graph(inner: int, *carries: str) -> GraphSpec:
    """A graph with so many bytes of inner values, which gives carries of 7 floats for each image."""
    outputs = [
        TensorSpec(name=name, dtype="float32", shape=(BATCH, 7)) for name in ("next_latents", "output", *carries)
    ]
    return GraphSpec(
        file="g.onnx",
        role=DENOISE,
        batch=(1, 4),
        inputs=(TensorSpec(name="latents", dtype="float32", shape=(BATCH, 7)),),
        outputs=tuple(outputs),
        macs=Macs(paper=0, all=0),
        scratch_bytes=inner,
    )


def test_scratch_is_the_hungriest_steps_with_the_outputs_it_drops(session: Session) -> None:
    shape = session.shapes()[0]
    plan = make_plan("p", Settings(steps=3, gate=3), Toy(), shape.graphs)
    kept, dropped = replace(plan.steps[0], graph="a"), replace(plan.steps[0], graph="b")
    kept = replace(kept, writes=("c",))
    graphs = {"a": graph(100, "c"), "b": graph(90, "c", "d")}
    manifest, small = session.manifest, replace(shape, graphs=graphs)
    for batch in (1, 3):
        of_a = memory(replace(plan, steps=(kept,)), manifest, small, batch=batch)
        assert of_a["scratch"] == batch * 100
        of_both = memory(replace(plan, steps=(kept, dropped)), manifest, small, batch=batch)
        assert of_both["scratch"] == batch * (90 + 2 * 7 * 4)
        assert of_both["request"] == batch * 4 * 7 * 4, "latents, next_latents, output and the carry that is written"
        assert of_both["peak"] == of_both["weights"] + of_both["request"] + of_both["scratch"]


def test_scratch_is_that_of_the_decoder_where_it_takes_more(session: Session) -> None:
    """Which decodes one image at a time, however many are drawn, and has its pixels beside what it works in."""
    shape = session.shapes()[0]
    plan = make_plan("p", Settings(steps=3, gate=3), Toy(), shape.graphs)
    steps = tuple(replace(step, graph="a", reads=(), writes=()) for step in plan.steps)
    pixels = TensorSpec(name="image", dtype="uint8", shape=(BATCH, 5, 5, 3))
    decoder = replace(graph(1000), role=DECODE, batch=(1, 1), outputs=(pixels,))
    for inner, wanted in ((100, 1000 + 7 * 4 + 75), (2000, 2000)):
        small = replace(shape, graphs={"a": graph(inner), "vae_decoder": decoder})
        assert memory(replace(plan, steps=steps), session.manifest, small)["scratch"] == wanted


def test_plans_that_share_a_state_share_its_buffers(session: Session) -> None:
    graphs = session.shapes()[0].graphs
    plans = [make_plan("p", settings, Toy(), graphs) for settings in SETTINGS]
    together = buffers(graphs, plans)
    assert together.keys() == set().union(*(buffers(graphs, [plan]) for plan in plans))
    assert together == buffers(graphs, plans[::-1])
