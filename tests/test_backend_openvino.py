"""How OpenVINO's calls keep their infer requests, and what the engine refuses; the rest is in test_engines.py."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import openvino as ov
import pytest

from tests.test_runner import compare, finished
from tests.toy_bundle import Toy, build, make_plan
from tgate_engine.bundle import Bundle
from tgate_engine.errors import EngineError
from tgate_engine.manifest import resolve
from tgate_engine.schedule import Schedule
from tgate_runtime.backends import EngineOptions, openvino
from tgate_runtime.backends.openvino import OpenVino
from tgate_runtime.binding import Binding
from tgate_runtime.session import Session, graphs_of

SCHEDULE = Schedule(steps=9, gate=5, self_interval=2, warm_up=1)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(build(tmp_path_factory.mktemp("openvino") / "toy", Toy(batch=(1, 4))))


def opened(bundle: Bundle) -> Session:
    engine = OpenVino(EngineOptions(threads=1, precision="f32"))
    return Session(bundle, engine, engine.load(bundle, graphs_of(bundle, graphs=("reuse_both",))))


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of requests, in order: "bind" and "run"."""
    asked: list[str] = []
    for name in ("bind", "run"):
        call = getattr(openvino._Request, name)

        def told(self: Any, *args: Any, name: str = name, call: Any = call) -> None:
            asked.append(name)
            call(self, *args)

        monkeypatch.setattr(openvino._Request, name, told)
    return asked


def test_a_step_binds_nothing(toy: Bundle, asked: list[str]) -> None:
    """What a step spends in the engine's name is spent in the engine."""
    with opened(toy) as session:
        binding = Binding(session, make_plan("p", SCHEDULE, Toy(), toy.manifest.graphs), 1)
        assert asked == ["bind"] * len(binding.calls())
        asked.clear()
        first = finished(binding, seed=3)
        np.testing.assert_array_equal(finished(binding, seed=3), first)
        assert asked == ["run"] * 18


def test_calls_whose_requests_would_hold_much_share_some(
    toy: Bundle, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a call that leaves no output out then has a request of its own; what others leave out stays untouched."""
    monkeypatch.setattr(openvino, "_UNBOUND_BYTES", 0)
    with opened(toy) as session:
        plan = make_plan("p", SCHEDULE, Toy(), toy.manifest.graphs)
        for batch in (3, 1, 4):
            compare(session, plan, m=5, k=2, f=1, warm_up=1, batch=batch, tolerance=1e-5)
        bindings = [Binding(session, plan, 1) for _ in range(3)]
        alone = [finished(binding, seed) for seed, binding in enumerate(bindings)]
        asked.clear()
        with ThreadPoolExecutor(3) as pool:
            for _ in range(3):
                for got, want in zip(pool.map(finished, bindings, range(3)), alone, strict=True):
                    np.testing.assert_array_equal(got, want)
        outputs = {name: len(graph.outputs) for name, graph in toy.manifest.graphs.items()}
        sharing = sum(outputs[step.graph] > 2 + len(step.writes) for step in plan.steps)
        assert 0 < sharing < len(plan.steps)
        assert asked.count("bind") == 3 * 3 * sharing


@pytest.mark.parametrize("limit", [-1, 1 << 20])
def test_buffers_that_the_engine_refuses_are_one_line(toy: Bundle, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(openvino, "_UNBOUND_BYTES", limit)
    with opened(toy) as session:
        spec, make = toy.manifest.graphs["full"], session.backend.allocate
        inputs = {t.name: make(resolve(t.shape, 1), t.dtype) for t in spec.inputs}
        inputs["latents"] = make((1, 2, 3), "float32")
        outputs = {t.name: make(resolve(t.shape, 1), t.dtype) for t in spec.outputs}
        with pytest.raises(EngineError, match=r"^graph full\.onnx failed in OpenVINO: [^\n]+$"):
            session.graph("full").bind(inputs, outputs)()


@pytest.mark.parametrize(("precision", "able"), [("bf16", ["FP32", "INT8"]), ("f16", ["FP32", "BF16"])])
def test_a_precision_that_the_processor_has_not(
    monkeypatch: pytest.MonkeyPatch, precision: str, able: list[str]
) -> None:
    class Core:
        def get_property(self, *_: str) -> list[str]:
            return able

    monkeypatch.setattr(ov, "Core", Core)
    says = f"this processor does not compute in {precision}; OpenVINO offers {', '.join(able)} here"
    with pytest.raises(EngineError, match=says):
        OpenVino(EngineOptions(precision=precision))
    assert OpenVino(EngineOptions()).options.precision == ("bf16" if "BF16" in able else "f32")
