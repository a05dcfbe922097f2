"""OpenVINO: its infer requests, its precisions and its names, beside what test_every_engine.py sees."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import helper

from tests.processor import needs_bfloat16
from tests.runtime.engines.small import (
    Arrays,
    Small,
    assert_close,
    cancelled_and_called_again,
    random_inputs,
    save,
    tensor,
)
from tgate_engine.errors import EngineError
from tgate_engine.graph import BATCH, GraphSpec
from tgate_runtime.engines import openvino
from tgate_runtime.engines.host import CpuBuffer
from tgate_runtime.engines.openvino import OpenVino, OpenVinoExecutable
from tgate_runtime.engines.protocol import EngineOptions


@pytest.fixture(scope="module")
def engine() -> OpenVino:
    return OpenVino(EngineOptions(threads=1, precision="f32"))


@pytest.fixture(scope="module")
def full(engine: OpenVino, small: Small) -> OpenVinoExecutable:
    return engine.load(small.bundle, [small.graphs["full"]])["full.onnx"]


def inputs_of(spec: GraphSpec, values: Arrays) -> dict[str, CpuBuffer]:
    buffers = {}
    for name, array in values.items():
        buffers[name] = CpuBuffer.zeros(array.shape, next(t.dtype for t in spec.inputs if t.name == name))
        buffers[name].write(array)
    return buffers


def outputs_of(spec: GraphSpec, batch: int, *names: str) -> dict[str, CpuBuffer]:
    return {t.name: CpuBuffer.zeros(t.resolve(batch), t.dtype) for t in spec.outputs if not names or t.name in names}


# --- requests -----------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of requests, in order: "bind" and "run"."""
    asked: list[str] = []
    for name in ("bind", "run"):
        call = getattr(openvino._Request, name)

        def asking(self: Any, *args: Any, name: str = name, call: Any = call) -> None:
            asked.append(name)
            call(self, *args)

        monkeypatch.setattr(openvino._Request, name, asking)
    return asked


def test_a_call_binds_once(full: OpenVinoExecutable, small: Small, asked: list[str]) -> None:
    """What a step spends in the engine's name is spent in the engine."""
    spec = small.graphs["full"]
    values = random_inputs(spec, 2)
    outputs = outputs_of(spec, 2)
    call = full.bind(inputs_of(spec, values), outputs)
    for _ in range(3):
        call()
    assert asked == ["bind", "run", "run", "run"]
    assert_close(spec, {n: b.read() for n, b in outputs.items()}, small.expected("full", values))


def test_calls_whose_requests_would_hold_much_share_some(
    full: OpenVinoExecutable, small: Small, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only a call that leaves no output out then has a request of its own; what others leave out stays untouched."""
    monkeypatch.setattr(openvino, "_UNBOUND_BYTES", 0)
    spec = small.graphs["full"]
    values = [random_inputs(spec, batch, seed=batch) for batch in (3, 1, 4, 2)]
    batches = [len(each["latents"]) for each in values]
    whole = [outputs_of(spec, batch) for batch in batches]
    some = [outputs_of(spec, batch, "output") for batch in batches]
    own = [full.bind(inputs_of(spec, each), outputs) for each, outputs in zip(values, whole, strict=True)]
    sharing = [full.bind(inputs_of(spec, each), outputs) for each, outputs in zip(values, some, strict=True)]
    assert asked == ["bind"] * len(own)
    for call in own:
        call()
    kept = [outputs["self.0"].read() for outputs in whole]
    asked.clear()
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            list(pool.map(lambda call: call(), sharing))
    assert asked.count("bind") == 3 * len(sharing)
    for each, outputs, carry, full_outputs in zip(values, some, kept, whole, strict=True):
        want = small.expected("full", each)["output"]
        np.testing.assert_allclose(outputs["output"].read(), want, rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(full_outputs["self.0"].read(), carry)


@pytest.mark.parametrize("limit", [-1, 1 << 20])
def test_what_the_engine_refuses_is_one_line(
    engine: OpenVino, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """Whether it is bound early or late: here the file takes 3 columns, and its manifest says 4."""
    monkeypatch.setattr(openvino, "_UNBOUND_BYTES", limit)
    node = helper.make_node("Neg", ["x"], ["y"])
    save(tmp_path / "g.onnx", [node], [tensor("x", BATCH, 3)], [tensor("y", BATCH, 3)])
    spec = save(tmp_path / "h.onnx", [node], [tensor("x", BATCH, 4)], [tensor("y", BATCH, 4)])
    graph = engine.load_graph(tmp_path / "g.onnx", spec)
    with pytest.raises(EngineError, match=r"^graph h\.onnx failed in OpenVINO: [^\n]+$"):
        graph.bind({"x": CpuBuffer.zeros((2, 4), "float32")}, {"y": CpuBuffer.zeros((2, 4), "float32")})()


# --- names --------------------------------------------------------------------------------------


def test_what_changes_nothing_does_not_change_a_name(engine: OpenVino, tmp_path: Path) -> None:
    """The engine drops such a node, and its two values become one with two names."""
    nodes = [
        helper.make_node("Neg", ["x"], ["y"]),
        helper.make_node("Identity", ["y"], ["a"]),
        helper.make_node("Identity", ["y"], ["z.before"]),
        helper.make_node("Neg", ["z.before"], ["z"]),
        helper.make_node("Cast", ["z"], ["b"], to=1),
        helper.make_node("Neg", ["b"], ["w"]),
    ]
    outputs = [tensor(name, BATCH, 3) for name in ("y", "z", "w")]
    spec = save(tmp_path / "g.onnx", nodes, [tensor("x", BATCH, 3)], outputs)
    graph = engine.load_graph(tmp_path / "g.onnx", spec)
    x, buffers = CpuBuffer.zeros((1, 3), "float32"), outputs_of(spec, 1)
    x.write(np.arange(3, dtype=np.float32)[None])
    graph.bind({"x": x}, buffers)()
    assert {name: buffer.read().tolist() for name, buffer in buffers.items()} == {
        "y": [[0, -1, -2]],
        "z": [[0, 1, 2]],
        "w": [[0, -1, -2]],
    }


# --- precision ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_carries_of_half_precision_are_bound(engine: OpenVino, tmp_path: Path, dtype: str) -> None:
    half = Small(tmp_path / "bundle", carry_dtype=dtype)
    for name, graph in zip(
        ("full", "reuse"), engine.load(half.bundle, [half.graphs[n] for n in ("full", "reuse")]).values(), strict=True
    ):
        spec = half.graphs[name]
        values = random_inputs(spec, 2)
        outputs = outputs_of(spec, 2)
        graph.bind(inputs_of(spec, values), outputs)()
        assert_close(spec, {n: b.read() for n, b in outputs.items()}, half.expected(name, values), 1e-2)


@needs_bfloat16
@pytest.mark.parametrize("batch", [1, 3])
def test_bfloat16_takes_any_batch_and_is_not_float32(small: Small, batch: int) -> None:
    """The timestep's part, of which test_timestep.py tells, follows the batch."""
    spec = small.graphs["full"]
    graph = OpenVino(EngineOptions(threads=1, precision="bf16")).load(small.bundle, [spec])["full.onnx"]
    values = random_inputs(spec, batch)
    outputs = outputs_of(spec, batch)
    graph.bind(inputs_of(spec, values), outputs)()
    want = small.expected("full", values)
    assert_close(spec, {n: b.read() for n, b in outputs.items()}, want, 3e-2)
    assert np.abs(outputs["output"].read() - want["output"]).max() > 1e-4


def test_options_are_settled() -> None:
    assert OpenVino(EngineOptions()).options.precision in ("f32", "bf16")
    settled = OpenVino(EngineOptions(precision="f32", threads=2)).options
    assert settled == EngineOptions(precision="f32", threads=2, memory="fast")


@pytest.mark.parametrize(("precision", "able"), [("bf16", ["FP32", "INT8"]), ("f16", ["FP32", "BF16"])])
def test_a_precision_that_the_processor_has_not(
    monkeypatch: pytest.MonkeyPatch, precision: str, able: list[str]
) -> None:
    class Core:
        def get_property(self, *_: str) -> list[str]:
            return able

    monkeypatch.setattr(openvino, "_core", Core)
    says = f"this processor does not compute in {precision}; OpenVINO offers {', '.join(able)} here"
    with pytest.raises(EngineError, match=says):
        OpenVino(EngineOptions(precision=precision))
    assert OpenVino(EngineOptions()).options.precision == ("bf16" if "BF16" in able else "f32")


SIGNALLED = """
import signal
from tgate_runtime.engines import open_engine

heard = []
first, second = (open_engine("openvino", threads=1) for _ in range(2))
del first
del second
signal.signal(signal.SIGTERM, lambda *_: heard.append("heard"))
signal.raise_signal(signal.SIGTERM)
print(*heard)
"""


def test_a_signal_after_engines_are_gone_does_not_end_the_process() -> None:
    """OpenVINO's cores leave a thread the stack of one that is gone, where its handlers of signals are to run."""
    done = subprocess.run([sys.executable, "-c", SIGNALLED], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "heard"), done.stderr


def test_nothing_is_compiled_ahead_of_time(engine: OpenVino, small: Small) -> None:
    assert engine.build(small.bundle, tuple(small.graphs.values())) == {}


def test_a_call_is_cancelled_from_another_thread(tmp_path: Path) -> None:
    engine = OpenVino(EngineOptions(threads=2, precision="f32"))
    cancelled_and_called_again(engine, engine.load_graph, tmp_path)
