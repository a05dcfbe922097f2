"""Control pictures on the toy bundle, against the toy written out: scales, steps, rows that share calls, refusals."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests import toy_model
from tests.toy_bundle import Toy, build, random_conditioning
from tgate_engine.control import control_graph, scale_name
from tgate_engine.errors import RequestError
from tgate_engine.graph import CONTROL
from tgate_export.methods.base import Settings
from tgate_runtime.control import Control, check_controls, scales_of_controls, steered
from tgate_runtime.pipeline import Pipeline
from tgate_runtime.record import parse_record
from tgate_runtime.runner import advance, run
from tgate_runtime.session import Session
from tgate_runtime.state import State

PROMPT = "a large red circle"
M, K, N = 5, 2, 8
NETS = ("edges", "depth")


def picture(seed: int = 0, size: tuple[int, int] = (4, 4)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    settings = {"default": Settings(steps=N, gate=M, self_interval=K)}
    return build(tmp_path_factory.mktemp("control") / "toy", Toy(controls=NETS, begins=True, settings=settings))


@pytest.fixture(scope="module")
def pipe(path: Path) -> Iterator[Pipeline]:
    with Pipeline.open(path, threads=1) as opened:
        yield opened


def wanted(
    session: Session, noise: NDArray[Any], controls: Mapping[str, Control], *, gated: bool = True
) -> NDArray[np.float64]:
    """The toy's final latents, written out in float64."""
    plan = session.plan("default")
    scales = [_written_out(control, gated) for control in controls.values()]
    pictures = [np.asarray(control.image) for control in controls.values()]
    states = toy_model.trajectory(
        toy_model.weights(),
        plan.sampler,
        noise,
        random_conditioning(len(noise)),
        3.0,
        m=M if gated else N,
        k=K if gated else 1,
        controls=list(zip(pictures, scales, strict=True)),
    )
    return states[-1]


def _written_out(control: Control, gated: bool) -> list[float]:
    """The scale of each step, in diffusers' words and with the gate's step."""
    keeps = [1.0 - float(i / N < control.start or (i + 1) / N > control.end) for i in range(N)]
    return [control.scale * keep * (not control.until_gate or not gated or i < M) for i, keep in enumerate(keeps)]


NO_PICTURE: Any = "edges.png"
WRONG: dict[str, Any] = {"until_gate": 1}
CASES: dict[str, dict[str, Control]] = {
    "one": {"edges": Control(image=picture())},
    "scaled": {"depth": Control(image=picture(1), scale=-0.4)},
    "part": {"edges": Control(image=picture(), start=0.25, end=0.8)},
    "two": {"edges": Control(image=picture(), end=0.5), "depth": Control(image=picture(1), scale=0.5, start=0.3)},
    "until the gate": {"edges": Control(image=picture(), until_gate=True), "depth": Control(image=picture(1))},
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("gated", [True, False], ids=["gated", "ungated"])
def test_latents_are_those_of_the_toy_written_out(pipe: Pipeline, name: str, gated: bool) -> None:
    session, controls = pipe.session, CASES[name]
    plan = session.plan("default")
    if not gated:
        plan = session.plan(plan.baselines[0])
        controls = {net: replace(control, until_gate=False) for net, control in controls.items()}
    noise = np.random.default_rng(4).standard_normal((2, 2, 4, 4)).astype(np.float32)
    state, own = State(session, plan, 2), steered(session, controls, plan)
    for _ in run(
        state, latents=noise, conditioning=random_conditioning(2), guidance_scale=3.0, controls=[own] * len(noise)
    ):
        pass
    np.testing.assert_allclose(state.latents(), wanted(session, noise, controls, gated=gated), rtol=0, atol=2e-5)
    assert np.abs(wanted(session, noise, {}, gated=gated) - state.latents()).max() > 1e-2


def test_rows_with_and_without_share_calls_and_are_what_they_are_alone(pipe: Pipeline) -> None:
    """Bit for bit, wherever they lie, wherever they are in their plans and where they have moved."""
    session = pipe.session
    plan = session.plan("default")
    kinds = [CASES["two"], {}, CASES["until the gate"], CASES["part"]]
    noise = np.random.default_rng(5).standard_normal((4, 2, 4, 4)).astype(np.float32)
    conditioning = random_conditioning(4)

    def begin(state: State, row: int, j: int) -> None:
        own = {name: values[j] for name, values in conditioning.items()}
        state.begin(row, noise[j], own, guidance_scale=3.0, controls=steered(session, kinds[j], plan))

    def alone(j: int) -> NDArray[np.float32]:
        state = State(session, plan, 1)
        begin(state, 0, j)
        while state.step(0):
            advance(state)
        return state.latents(0)

    state, through = State(session, plan, 5), {}
    at = {0: 4, 1: 1, 2: 2, 3: 3}
    for j in (0, 1):
        begin(state, at[j], j)
    advance(state, range(4, 5))
    state.move(4, 0)
    at[0] = 0
    for j in (2, 3):
        begin(state, at[j], j)
    while live := [j for j in at if j not in through]:
        for rows in state.together():
            advance(state, rows)
        for j in live:
            if state.step(at[j]) is None:
                through[j] = state.latents(at[j])
                state.end(at[j])
    for j, latents in through.items():
        np.testing.assert_array_equal(latents, alone(j))
    # A row that an image with a picture has left draws one without.
    begin(state, 0, 1)
    while state.step(0):
        advance(state, range(1))
    np.testing.assert_array_equal(state.latents(0), alone(1))


def test_a_controlnet_is_loaded_and_run_when_it_is_wanted_alone(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Pipeline.open(path, threads=1) as pipe:
        session, ran = pipe.session, list[str]()
        assert not [name for name in session._executables or {} if name.startswith("control")]
        plain = pipe(PROMPT, seed=1).latents
        assert not [name for name in session._executables or {} if name.startswith("control")]
        pipe(PROMPT, seed=1, controls={"edges": Control(image=picture(), end=0.5)})
        loaded = [name for name in session._executables or {} if name.startswith("control")]
        assert loaded == ["control-edges-negative-positive.onnx"], "nothing of depth, nothing after the gate"
        real = type(session).executable

        def executable(self: Session, graph: Any) -> Any:
            ran.append(graph.file)
            return real(self, graph)

        monkeypatch.setattr(type(session), "executable", executable)
        np.testing.assert_array_equal(pipe(PROMPT, seed=1).latents, plain)
        pipe(PROMPT, seed=1, controls={"edges": Control(image=picture())})
        assert [name for name in session._executables or {} if name.startswith("control")] == [
            "control-edges-negative-positive.onnx",
            "control-edges-negative.onnx",
        ]


def test_several_images_of_a_request_have_one_picture(pipe: Pipeline) -> None:
    controls = CASES["two"]
    several = pipe([PROMPT, "a blue square"], seed=3, num_images=3, controls=controls).latents
    for j in range(6):
        alone = pipe([PROMPT, "a blue square"][j // 3], seed=3 + j, controls=controls).latents[0]
        np.testing.assert_array_equal(several[j], alone)


def test_with_a_picture_to_begin_from_the_way_is_what_is_left_of_it(pipe: Pipeline) -> None:
    """Steps are counted as diffusers' image-to-image pipeline counts them: of those that are taken."""
    begun: dict[str, Any] = {"image": picture(2), "strength": 0.5, "seed": 1}
    half = pipe(PROMPT, **begun, controls={"edges": Control(image=picture(), end=0.5)}).latents
    plain = pipe(PROMPT, **begun).latents
    assert np.abs(half - plain).max() > 1e-3
    ran = list[bool]()

    real = State.turn

    def turn(self: State, rows: range) -> None:
        ran.append(bool(self._buffers[scale_name("edges")].read().any()))
        real(self, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(State, "turn", turn)
        pipe(PROMPT, **begun, controls={"edges": Control(image=picture(), end=0.5)})
    assert ran == [True, True, False, False]


def test_a_picture_of_another_size_is_resized_and_one_that_is_grey_is_rgb(
    pipe: Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    large = picture(3, (8, 8))
    with caplog.at_level(logging.WARNING, "tgate"):
        resized = pipe(PROMPT, seed=1, controls={"edges": Control(image=large)}).latents
    assert "is resized to 4 x 4" in caplog.text
    own = large.resize((4, 4), Image.Resampling.LANCZOS)
    np.testing.assert_array_equal(pipe(PROMPT, seed=1, controls={"edges": Control(image=own)}).latents, resized)
    grey = picture().convert("L")
    np.testing.assert_array_equal(
        pipe(PROMPT, seed=1, controls={"edges": Control(image=grey)}).latents,
        pipe(PROMPT, seed=1, controls={"edges": Control(image=grey.convert("RGB"))}).latents,
    )


def test_a_record_says_what_steered_it(pipe: Pipeline) -> None:
    controls = CASES["two"] | {"edges": Control(image=picture(), until_gate=True)}
    drawn = pipe(PROMPT, seed=1, controls=controls)
    record = parse_record(json.dumps(drawn.records[0].to_json()), "x")
    assert record == drawn.records[0]
    assert [*record.controls] == ["depth", "edges"]
    assert (record.controls["depth"].scale, record.controls["edges"].until_gate) == (0.5, True)
    again = pipe(**record.request(), plan=record.plan.name, controls=controls)
    np.testing.assert_array_equal(again.latents, drawn.latents)
    assert "controls" not in pipe(PROMPT, seed=1).records[0].to_json()
    other = pipe(PROMPT, seed=1, controls=controls | {"edges": Control(image=picture(4))}).records[0]
    (difference,) = record.differences(other)
    assert difference.startswith("ControlNet edges 1 of ")
    assert difference.endswith(", until the gate")


def test_with_adapters_and_without_the_same_controlnet_runs(pipe: Pipeline) -> None:
    """No adapter changes a ControlNet, even one that shares weights with the denoiser."""
    session = pipe.session
    spec = control_graph(session.shapes()[0].graphs, "full", "edges")
    lent = Session(session.bundle, session.engine, {}, session.shapes())
    lent._plain = session
    assert lent.executable(spec) is session.executable(spec)
    assert spec.role == CONTROL


@pytest.mark.parametrize(
    ("controls", "told"),
    [
        ([picture()], "controls are Control"),
        ({"canny": Control(image=picture())}, "no ControlNet 'canny'; it has edges, depth"),
        ({"edges": picture()}, "ControlNet 'edges' takes a Control"),
        ({"edges": Control(image=picture(), scale=0)}, "the scale of ControlNet 'edges' is 0; a number other than 0"),
        ({"edges": Control(image=picture(), scale=float("nan"))}, "is nan"),
        ({"edges": Control(image=picture(), scale=2e4)}, "of at most 10000 is wanted"),
        ({"edges": Control(image=picture(), scale=True)}, "is True"),
        ({"edges": Control(image=picture(), start=0.5, end=0.5)}, "runs from 0.5 to 0.5 of the way"),
        ({"edges": Control(image=picture(), start=-0.1)}, "runs from -0.1 to 1.0"),
        ({"edges": Control(image=picture(), end=1.5)}, "runs from 0.0 to 1.5"),
        ({"edges": Control(image=picture(), start=0.51, end=0.55)}, "runs at none of the 8 network calls"),
        ({"edges": Control(image=picture(), start=0.7, until_gate=True)}, "and not beyond the gate runs at none"),
        ({"edges": Control(image=picture(), end=0.6, until_gate=True)}, "has its gate at call 5 of 8, after the last"),
        ({"edges": Control(image=picture(), **WRONG)}, "until_gate of ControlNet 'edges' must be True or False"),
        ({"edges": Control(image=NO_PICTURE)}, "an image must be a PIL.Image.Image, got str"),
    ],
)
def test_what_is_refused(pipe: Pipeline, controls: Any, told: str) -> None:
    calls = list[object]()
    with pytest.raises(RequestError, match="(?s).*".join(told.split("…"))) as caught:
        pipe(PROMPT, seed=1, controls=controls, on_step=calls.append)
    assert not calls
    assert "\n" not in str(caught.value)


def test_a_plan_without_a_gate_has_none_to_stop_at(pipe: Pipeline) -> None:
    plan = pipe.session.plan(pipe.session.plan("default").baselines[0])
    with pytest.raises(RequestError, match="plan 'ungated' has no gate"):
        pipe(PROMPT, plan=plan, controls={"edges": Control(image=picture(), until_gate=True)})


def test_a_bundle_without_one_says_how_to_get_one(toy_path: Path) -> None:
    with Pipeline.open(toy_path, threads=1) as pipe:
        with pytest.raises(RequestError, match="it has none; export it with --controlnet NAME=DIR"):
            pipe(PROMPT, controls={"edges": Control(image=picture())})
        check_controls(None, pipe.session.manifest)
        assert scales_of_controls({}, pipe.session.plan("default"), pipe.session.manifest) == {}


def test_a_state_takes_what_belongs_to_the_plan(pipe: Pipeline) -> None:
    session = pipe.session
    plan = session.plan("default")
    state, own = State(session, plan, 1), steered(session, CASES["one"], plan)
    noise = np.zeros((2, 4, 4), np.float32)
    text = {name: values[0] for name, values in random_conditioning(1).items()}
    with pytest.raises(RequestError, match="take nothing of a ControlNet 'canny'"):
        state.begin(0, noise, text, guidance_scale=3.0, controls={"canny": own["edges"]})
    short = replace(own["edges"], scales=own["edges"].scales[1:])
    with pytest.raises(RequestError, match="ControlNet 'edges' has 7 scales, and plan 'default' takes 8 steps"):
        state.begin(0, noise, text, guidance_scale=3.0, controls={"edges": short})
