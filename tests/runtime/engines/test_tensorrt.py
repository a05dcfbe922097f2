"""TensorRT, as far as a host without a GPU goes: its cache, its options, and the host code of a call."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
from onnx import helper

from tests.hostile import with_graph
from tests.runtime.engines.fake_gpu import FakeGpu
from tests.runtime.engines.small import WEIGHTS, Small, outside, save, tensor
from tgate_engine.bundle import Bundle
from tgate_engine.errors import BundleError, EngineError
from tgate_engine.graph import BATCH, GraphSpec
from tgate_runtime.cache import digest_of
from tgate_runtime.engines import open_engine
from tgate_runtime.engines.protocol import EngineOptions

pytest.importorskip("polygraphy")
pytest.importorskip("cuda.bindings")
trt: Any = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX builds without a GPU, TensorRT does not")

from tgate_runtime.engines.tensorrt import TensorRt, check_tensors, cuda, make_runtime  # noqa: E402
from tgate_runtime.engines.tensorrt.build import RTX  # noqa: E402

pytestmark = [
    pytest.mark.skipif(not RTX, reason="TensorRT is installed, which builds on the GPU at hand alone"),
    pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX"),  # Polygraphy sets a timing cache
]
without_gpu = pytest.mark.skipif(cuda.gpu_count() > 0, reason="a GPU is visible here")
SHARED = EngineOptions(memory="shared")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path / "cache"))


# --- the cache ----------------------------------------------------------------------------------


def test_all_graphs_of_a_bundle_build_once(small: Small) -> None:
    engine, graphs = open_engine("tensorrt", memory="shared"), tuple(small.graphs.values())
    heard: list[tuple[int, int, str]] = []
    entries = engine.build(small.bundle, graphs, lambda *news: heard.append(news))
    names, total = list(small.graphs), len(graphs)
    assert heard == [*((done, total, name) for done, name in enumerate(names)), (total, total, names[-1])]
    assert list(entries) == [spec.file for spec in graphs]
    assert all((entry / "engine.plan").stat().st_size > 0 for entry in entries.values())
    heard.clear()
    assert engine.build(small.bundle, graphs, lambda *news: heard.append(news)) == entries
    assert heard == []


def test_the_key_says_what_an_engine_is_made_from(small: Small) -> None:
    spec = small.graphs["full"]
    shared = TensorRt(SHARED).key(small.bundle, spec)
    assert shared["graph"] == small.bundle.manifest.files[spec.file].sha256
    assert shared["weights"] == ""
    assert shared["architecture"] == "portable"
    assert shared["batch"] == list(spec.batch)
    turned = replace(spec, inputs=spec.inputs[::-1], outputs=spec.outputs[::-1])
    other = TensorRt(SHARED).key(small.bundle, turned)
    assert [name for name in shared if shared[name] != other[name]] == ["inputs", "outputs"]
    assert trt.__version__ in shared["engine"]
    fast = TensorRt(EngineOptions(memory="fast", architecture="sm_89")).key(small.bundle, spec)
    assert fast["weights"] == small.bundle.manifest.files[WEIGHTS].sha256
    assert fast["architecture"] == "sm_89"


@pytest.mark.parametrize(
    ("what", "other"), [("RECIPE", "another"), ("POLYGRAPHY", "0.1"), ("flags", lambda _: {"TF32": True})]
)
def test_another_recipe_is_another_engine(small: Small, monkeypatch: pytest.MonkeyPatch, what: str, other: Any) -> None:
    """Or an engine of yesterday's settings would be found again."""
    spec = small.graphs["full"]
    before = digest_of(TensorRt(SHARED).key(small.bundle, spec))
    assert digest_of(TensorRt(SHARED).key(small.bundle, spec)) == before
    monkeypatch.setattr(f"tgate_runtime.engines.tensorrt.{what}", other)
    assert digest_of(TensorRt(SHARED).key(small.bundle, spec)) != before


def test_nothing_is_unpacked_where_others_could_reach_it() -> None:
    kinds = trt.TempfileControlFlag
    flags = make_runtime().tempfile_control_flags
    assert flags & 1 << int(kinds.ALLOW_IN_MEMORY_FILES)
    assert not flags & 1 << int(kinds.ALLOW_TEMPORARY_FILES)


@without_gpu
def test_a_stripped_engine_cannot_be_built_without_a_driver(small: Small) -> None:
    """TensorRT-RTX 1.7 compiles the kernels that lay out refitted weights while it builds, and that needs a driver."""
    with pytest.raises(EngineError, match="only with TensorRT-RTX and memory 'shared'"):
        TensorRt(EngineOptions(memory="fast")).build(small.bundle, [small.graphs["full"]])


# --- opening ------------------------------------------------------------------------------------


@without_gpu
def test_loading_without_a_gpu_says_so(small: Small) -> None:
    engine = open_engine("tensorrt", memory="shared")
    with pytest.raises(EngineError, match=r"^engine tensorrt needs an NVIDIA GPU; none is visible here"):
        engine.load(small.bundle, tuple(small.graphs.values()))
    with pytest.raises(EngineError, match=r"^engine tensorrt needs an NVIDIA GPU; none is visible here"):
        engine.allocate((1,), "float32")


def test_without_leave_to_build(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.cuda, "cudaGetDeviceCount", lambda: (0, 1))
    says = r"engine tensorrt has not compiled .*: full\.onnx, text\.onnx; run tgate build .* --engine tensorrt"
    with pytest.raises(EngineError, match=says):
        TensorRt(EngineOptions(build=False)).load(small.bundle, [small.graphs["full"], small.graphs["text"]])


def test_options_are_settled_or_refused() -> None:
    engine = TensorRt(EngineOptions())
    assert (engine.name, engine.options.memory) == ("tensorrt", "shared")
    assert engine.version == f"RTX {trt.__version__}"
    with pytest.raises(EngineError, match="leave out --precision"):
        TensorRt(EngineOptions(precision="f16"))
    with pytest.raises(EngineError, match="tensorrt computes on a GPU; leave out --threads"):
        TensorRt(EngineOptions(threads=2))
    with pytest.raises(EngineError, match=r"builds for sm_75, .*got 'sm_90'"):
        TensorRt(EngineOptions(architecture="sm_90"))


def test_importing_the_engine_prints_nothing_and_loads_no_torch() -> None:
    code = "import sys, tgate_runtime.engines.tensorrt; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- the host code of a call --------------------------------------------------------------------


class _Engine:
    """Stands for a deserialized engine of y = x * w + b, spare = y: its host code alone runs, on a :class:`FakeGpu`."""

    device_memory_size_v2 = 1000

    def __init__(self, tensors: Mapping[str, Any], gpu: FakeGpu | None = None) -> None:
        self._tensors = tensors
        self._gpu = gpu
        self.num_io_tensors = len(tensors)
        self.contexts = 0

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return self._tensors[name]

    def get_tensor_mode(self, name: str) -> Any:
        return trt.TensorIOMode.INPUT if name in "xwb" else trt.TensorIOMode.OUTPUT

    def create_runtime_config(self) -> Any:
        return MagicMock()

    def create_execution_context(self, _config: Any) -> Any:
        assert self._gpu is not None
        self.contexts += 1
        return _Context(self._gpu)


class _Context:
    def __init__(self, gpu: FakeGpu) -> None:
        self._gpu = gpu
        self.addresses: dict[str, int] = {}
        self.shape: tuple[int, ...] = ()

    def set_device_memory(self, address: int, size_bytes: int) -> None:
        assert address
        assert size_bytes == _Engine.device_memory_size_v2

    def set_input_shape(self, _name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % cuda.ALIGNMENT_BYTES == 0
        self.addresses[name] = address
        return True

    def is_stream_capturable(self, _stream: int) -> bool:
        return True

    def execute_async_v3(self, _stream: int) -> bool:
        self._gpu.queue(self._run)
        return True

    def _run(self) -> None:
        at = {name: _floats(address, self.shape) for name, address in self.addresses.items()}
        at["y"][...] = at["x"] * _floats(self.addresses["w"], (1,)) + _floats(self.addresses["b"], (1,))
        at["spare"][...] = at["y"]


def _floats(address: int, shape: tuple[int, ...]) -> Any:
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), shape)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeGpu]:
    fake = FakeGpu()
    fake.install(monkeypatch, cuda.cuda)
    yield fake
    assert not fake.memory


def fake_engine(
    folder: Path, monkeypatch: pytest.MonkeyPatch, gpu: FakeGpu
) -> tuple[TensorRt, GraphSpec, Any, _Engine]:
    """The engine, the graph's spec and executable, and the stand-in: y = x * 2 + 5, over [batch, 3]."""
    nodes = [
        helper.make_node("Mul", ["x", "w"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["y"]),
        helper.make_node("Identity", ["y"], ["spare"]),
    ]
    outputs = [tensor(name, BATCH, 3) for name in ("y", "spare")]
    places = [outside(name, offset, 4, (1,)) for name, offset in (("w", 64), ("b", 4160))]
    spec = save(folder / "g.onnx", nodes, [tensor("x", BATCH, 3)], outputs, places)
    content = np.zeros(2048, np.float32)
    content[64 // 4], content[4160 // 4] = 2, 5
    (folder / WEIGHTS).write_bytes(content.tobytes())
    bundle: Any = SimpleNamespace(manifest=SimpleNamespace(weights=WEIGHTS), file=lambda name: folder / name)
    stand_in = _Engine(dict.fromkeys(("x", "w", "b", "y", "spare"), trt.DataType.FLOAT), gpu)
    monkeypatch.setattr("tgate_runtime.engines.tensorrt.read_graphs", lambda *_: {})
    monkeypatch.setattr(TensorRt, "build", lambda *_: {"g.onnx": folder})
    monkeypatch.setattr(TensorRt, "_engine", lambda *_: stand_in)
    monkeypatch.setattr(trt, "Runtime", MagicMock())
    engine = TensorRt(SHARED)
    return engine, spec, engine.load(bundle, [spec])["g.onnx"], stand_in


def test_the_host_code_of_a_call(gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU and no engine: that weights, buffers and CUDA graphs are handed over as they should be, and freed."""
    engine, _, graph, stand_in = fake_engine(tmp_path, monkeypatch, gpu)
    x, y = (engine.allocate((2, 3), "float32") for _ in "xy")
    assert not x.read().any()
    first, second = graph.bind({"x": x}, {"y": y}), graph.bind({"x": y}, {"y": x})
    assert first.addresses == {"x": x.address, "y": y.address}
    assert stand_in.contexts == 2
    x.write(np.full((1, 3), 10, np.float32))
    for run in range(3):
        first()
        np.testing.assert_array_equal(y.read(), np.full((2, 3), 25))
        assert gpu.launches == run  # the first run warms up and records
        assert gc.isenabled()
    second()
    np.testing.assert_array_equal(x.read(), np.full((2, 3), 55))
    with pytest.raises(EngineError, match="takes float32 arrays"):
        x.write(np.zeros(3))
    with pytest.raises(EngineError, match="inputs missing or not known: x"):
        graph.bind({}, {"y": y})
    assert len(gpu.memory) == 5  # x, y, weights, scratch, spare: the two calls share the last


def test_rows_that_tensorrt_could_not_take_are_copied(
    gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of 3 numbers begins at a multiple of 12 bytes; the copies are part of the recorded graph."""
    engine, _, graph, _ = fake_engine(tmp_path, monkeypatch, gpu)
    x, y = (engine.allocate((5, 3), "float32") for _ in "xy")
    values = np.arange(15, dtype=np.float32).reshape(5, 3)
    x.write(values)
    views = x.rows(1, 2), y.rows(2, 2)
    call = graph.bind({"x": views[0]}, {"y": views[1]})
    assert call.addresses == {"x": views[0].address, "y": views[1].address}
    for run in range(3):
        y.write(np.zeros(1, np.float32))
        call()
        want = np.zeros((5, 3))
        want[2:4] = values[1:3] * 2 + 5
        np.testing.assert_array_equal(y.read(), want)
        np.testing.assert_array_equal(x.read(), values)
        assert gpu.launches == run


def test_a_graph_of_a_stranger_is_refused_before_tensorrt_sees_it(
    gpu: FakeGpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path / "cache"))
    own = Small(tmp_path / "bundle")

    def edit(model: Any) -> None:
        model.graph.node.append(helper.make_node("Loop", ["", ""], [], body=helper.make_graph([], "b", [], [])))

    hostile = with_graph(own.bundle, "full.onnx", edit)
    for way in (TensorRt(SHARED).load, TensorRt(SHARED).build):
        with pytest.raises(BundleError, match=r"full\.onnx has g in a AttributeProto"):
            way(hostile, [own.graphs["full"]])


def test_an_engine_that_does_not_match_its_manifest_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("Sum", ["x", "w", "b"], ["y"])
    spec = save(tmp_path / "c.onnx", [node], [tensor("x", 1, 3)], [tensor("y", 1, 3)])
    kind = trt.DataType.FLOAT
    check_tensors(_Engine({"x": kind, "w": kind, "b": kind, "y": kind}), spec, {"w", "b"})
    with pytest.raises(
        EngineError, match=r"c\.onnx does not have the outputs .*: y float16, y float32; export it again"
    ):
        check_tensors(_Engine({"x": kind, "y": trt.DataType.HALF}), spec, set())
    other = replace(spec, inputs=(tensor("z", 1, 3),))
    with pytest.raises(EngineError, match=r"c\.onnx does not have the inputs .*: x float32, z float32"):
        check_tensors(_Engine({"x": kind, "y": kind}), other, set())


# --- whole models -------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [None, "sm_89", "sm_120"])
def test_the_embedded_model_builds(mini_bundle: Path, architecture: str | None) -> None:
    bundle = Bundle.open(mini_bundle, check_digests=False)
    graphs = tuple(bundle.manifest.shapes[0].graphs.values())
    engine = TensorRt(EngineOptions(memory="shared", architecture=architecture))
    assert list(engine.build(bundle, graphs)) == [spec.file for spec in graphs]
