"""Every engine that runs here walks plans as the written-out reference does. Engines alone: tests/runtime/engines."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests import toy_model
from tests.processor import needs_bfloat16
from tests.runtime.engines.ways import WAYS
from tests.tiny_families import FAMILY_VARIANTS
from tests.toy_bundle import Toy, build, make_plan, random_conditioning
from tests.toy_model import LATENTS
from tgate_engine.bundle import Bundle
from tgate_engine.footprint import memory
from tgate_engine.plan import Plan
from tgate_export.methods.base import Settings
from tgate_runtime import Pipeline, Session, State, advance, run
from tgate_runtime.engines import open_engine
from tgate_runtime.verify import relative_error, verify

TOY = Toy(batches=((1, 4),))
GUIDANCE = 3.0
ONE_OF_EACH = ("latte_a", "svd_a", "pixart_sigma_a", "sd21_v")
"""One small model of each architecture beside SDXL's; the others of their families go through the same code of an
engine. Not in the order of tests/whole/test_families.py, which runs at the same time: neither waits for the other."""


def noise(rows: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((rows, *LATENTS)).astype(np.float32)


def planned(session: Session, **settings: int) -> Plan:
    own = Settings(**{"steps": 9, "gate": 5, "self_interval": 2, "warm_up": 1} | settings)
    return make_plan("p", own, TOY, session.shapes()[0].graphs)


def every_graph(bundle: Bundle) -> Plan:
    """A plan that runs every graph of the method."""
    settings = Settings(steps=9, gate=5, self_interval=2, fidelity_interval=2, warm_up=1)
    return make_plan("every", settings, TOY, bundle.manifest.shapes[0].graphs)


def expected(plan: Plan, seed: int, rows: int, **rules: Any) -> list[NDArray[Any]]:
    """The latents after each step, of the trajectory that :func:`finished` takes."""
    own, conditioning = noise(rows, seed), random_conditioning(rows, seed=seed + 1)
    return toy_model.trajectory(toy_model.weights(), plan.sampler, own, conditioning, GUIDANCE, **rules)


def finished(state: State, seed: int) -> NDArray[np.float32]:
    """The final latents of one whole run."""
    conditioning = random_conditioning(state.rows, seed=seed + 1)
    for _ in run(state, latents=noise(state.rows, seed), conditioning=conditioning, guidance_scale=GUIDANCE):
        pass
    return state.latents()


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(build(tmp_path_factory.mktemp("engines") / "toy", TOY))


SLOW = ("aoti",)  # it compiles all graphs; what it is by itself is tried on smaller ones


@pytest.fixture(
    scope="module", params=[pytest.param(way, marks=pytest.mark.slow) if way in SLOW else way for way in WAYS]
)
def session(request: pytest.FixtureRequest, toy: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    if request.param == "aoti" and torch.cuda.is_available():
        pytest.skip("it would run on the GPU")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TGATE_CACHE", str(tmp_path_factory.mktemp("cache")))
        with Session.open(toy, engine=WAYS[request.param](), plans=[every_graph(toy)]) as opened:
            yield opened


# --- whole runs ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("k", "f", "rows"), [(1, 1, 1), (2, 1, 2), (3, 2, 3)])
def test_every_step_equals_the_reference(session: Session, k: int, f: int, rows: int) -> None:
    plan = planned(session, self_interval=k, fidelity_interval=f)
    want = expected(plan, 0, rows, m=5, k=k, f=f, warm_up=1)
    state, conditioning = State(session, plan, rows), random_conditioning(rows, seed=1)
    for done in run(state, latents=noise(rows), conditioning=conditioning, guidance_scale=GUIDANCE):
        assert relative_error(state.latents(), want[done.index + 1]) < 1e-5


def test_requests_in_several_threads_do_not_meet(session: Session) -> None:
    plan = planned(session)
    states = [State(session, plan, 1) for _ in range(4)]
    want = [expected(plan, seed, 1, m=5, k=2, warm_up=1)[-1] for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            for got, reference in zip(pool.map(finished, states, range(4)), want, strict=True):
                assert relative_error(got, reference) < 1e-5


def test_one_request_after_another_at_any_batch(session: Session) -> None:
    """Buffers of a request that is over leave their addresses to those of the next, of another shape."""
    plan = planned(session)
    want = {rows: expected(plan, rows, rows, m=5, k=2, warm_up=1)[-1] for rows in (1, 2, 3, 4)}
    for rows in (4, 1, 3, 2, 1, 4, 2):
        assert relative_error(finished(State(session, plan, rows), rows), want[rows]) < 1e-5


def test_images_at_steps_of_their_own_share_calls(session: Session) -> None:
    """Each begins two steps after the one above it, with a plan of its own; neighbours of one graph go together."""
    plans = [planned(session, gate=gate, self_interval=k) for gate, k in ((5, 2), (7, 3), (4, 1))]
    rules: list[dict[str, int]] = [{"m": 5, "k": 2}, {"m": 7, "k": 3}, {"m": 4, "k": 1}]
    want = [expected(p, row, 1, warm_up=1, **own)[-1] for row, (p, own) in enumerate(zip(plans, rules, strict=True))]
    state, widths = State(session, plans, 3), set()
    for turn in range(20):
        if turn in (0, 2, 4):
            row = turn // 2
            conditioning = {name: values[0] for name, values in random_conditioning(1, seed=row + 1).items()}
            state.begin(row, noise(1, row)[0], conditioning, guidance_scale=GUIDANCE, plan=plans[row])
        for rows in state.together():
            advance(state, rows)
            widths.add(len(rows))
    assert not state.together()
    assert widths >= {1, 2}
    for row in range(3):
        assert relative_error(state.latents(row), want[row][0]) < 1e-5


def test_a_carry_outlives_steps_that_do_not_write_it(session: Session) -> None:
    """An engine that reuses memory for outputs which nobody bound must not reuse a carry's."""
    plan = planned(session, steps=8, gate=6, self_interval=3)
    state = State(session, plan, 1)
    before: dict[str, Any] = {}
    for done in run(state, latents=noise(1), conditioning=random_conditioning(1), guidance_scale=GUIDANCE):
        now = {name: buffer.read() for name, buffer in state.carries().items()}
        for name in before.keys() - set(done.step.writes):
            np.testing.assert_array_equal(now[name], before[name])
        before = now


def test_the_text_and_the_decoder_run_too(session: Session, toy: Bundle) -> None:
    plan = planned(session)
    got = Pipeline(session)("a red cat", seed=1, plan=plan)
    with Pipeline.open(toy, plans=[plan], threads=1) as pipe:
        want = pipe("a red cat", seed=1, plan=plan)
    assert relative_error(got.latents, want.latents) < 1e-5
    difference = np.asarray(got.images[0], np.int16) - np.asarray(want.images[0], np.int16)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("way", ["ort-cpu fast", "openvino"])
def test_carries_of_half_precision(tmp_path: Path, way: str, dtype: str) -> None:
    bundle = Bundle.open(build(tmp_path / "toy", Toy(carry_dtype=dtype)))
    plan = every_graph(bundle)
    with Session.open(bundle, engine=WAYS[way](), plans=[plan]) as session:
        got = finished(State(session, plan, 2), 0)
    want = expected(plan, 0, 2, m=5, k=2, f=2, warm_up=1)[-1]
    assert relative_error(got, want) < (1e-2 if dtype == "float16" else 6e-2)


@needs_bfloat16
@pytest.mark.parametrize("rows", [1, 3])
def test_openvino_in_bfloat16_takes_any_batch(toy: Bundle, rows: int) -> None:
    plan = every_graph(toy)
    with Session.open(toy, engine="openvino", plans=[plan], threads=1, precision="bf16") as session:
        got = finished(State(session, plan, rows), 0)
    assert relative_error(got, expected(plan, 0, rows, m=5, k=2, f=2, warm_up=1)[-1]) < 6e-2


# --- goldens ------------------------------------------------------------------------------------


def passes(path: Path, engine: str, **options: Any) -> list[float]:
    """Replays the goldens of a bundle, which must pass; their errors."""
    checked = verify(Bundle.open(path), engine=open_engine(engine, **options))
    assert checked
    assert all(golden.ok for golden in checked), checked
    return [golden.error for golden in checked]


@pytest.mark.parametrize("name", ["mini_bundle", "shipped_bundle"])
def test_goldens_pass_on_openvino(request: pytest.FixtureRequest, name: str) -> None:
    passes(request.getfixturevalue(name), "openvino", precision="f32")


def test_goldens_pass_on_openvino_with_projections_by_convolution(tiny_bundle: Callable[..., Path]) -> None:
    passes(tiny_bundle("conv_projection"), "openvino", precision="f32", threads=1)


@needs_bfloat16
def test_bfloat16_stays_near_and_is_not_float32(mini_bundle: Path) -> None:
    assert max(passes(mini_bundle, "openvino", precision="bf16")) > 1e-3  # its mantissa has 8 bits


@pytest.mark.parametrize("variant", ONE_OF_EACH)
def test_goldens_of_each_architecture_pass_on_openvino(
    family_bundle: Callable[[str], tuple[Path, Path]], variant: str
) -> None:
    passes(family_bundle(variant)[1], "openvino", precision="f32", threads=1)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [variant for variant in FAMILY_VARIANTS if variant not in ONE_OF_EACH])
def test_goldens_of_every_other_small_model_pass_on_openvino(
    family_bundle: Callable[[str], tuple[Path, Path]], variant: str
) -> None:
    passes(family_bundle(variant)[1], "openvino", precision="f32", threads=1)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="it would run on the GPU")
def test_goldens_pass_on_aoti(mini_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path))
    passes(mini_bundle, "aoti")


# --- memory -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD 1.5's own sizes at 256x256, with random weights: 3.4 GB."""
    from tgate_engine.report import Silent
    from tgate_export.build import ExportSettings, export

    settings = ExportSettings(
        model="sd15",
        weights="random",
        components=("denoiser",),
        verify=False,
        height=256,
        width=256,
        steps=6,
        m=3,
        k=2,
        output=tmp_path_factory.mktemp("sd15") / "bundle",
    )
    return export(settings, Silent())


def held(bundle: Path, *what: str) -> dict[str, int]:
    command: Sequence[str] = [sys.executable, "-m", "tests.holds", str(bundle), *what]
    sizes: dict[str, int] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return sizes


@pytest.mark.slow
def test_shared_memory_holds_one_copy_of_the_weights(sd15: Path) -> None:
    """Three graphs take at most 1.3 times the proportional set size of one."""
    one = held(sd15, "graphs", "full")["after"]
    three = held(sd15, "graphs", "full", "reuse_self", "reuse_cross")["after"]
    assert one > 3 * 2**30
    assert three < 1.3 * one


@pytest.mark.slow
def test_the_memory_of_a_request_is_known_before_it_starts(sd15: Path) -> None:
    manifest = Bundle.open(sd15, check_digests=False).manifest
    need = memory(manifest.plan("default"), manifest, manifest.shapes[0])
    measured = held(sd15, "plan", "default")
    taken = measured["after"] - measured["before"]
    assert need["peak"] < taken < 1.1 * need["peak"]
    # Beside the weights the engine takes more than is planned: its arena splits, and keeps what it freed.
    assert taken - need["weights"] < 3 * (need["request"] + need["scratch"])
