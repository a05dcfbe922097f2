"""TensorRT behind the backend protocol, as far as a host without a GPU goes: engines are built, none is run."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar
from unittest.mock import MagicMock

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from tests.toy_bundle import build
from tgate_engine.bundle import Bundle
from tgate_engine.errors import EngineError
from tgate_engine.manifest import Dim, GraphSpec, Macs, TensorSpec
from tgate_runtime.backends import ENGINES, EngineOptions, backend
from tgate_runtime.cache import digest_of

pytest.importorskip("polygraphy")
pytest.importorskip("cuda.bindings")
trt: Any = pytest.importorskip("tensorrt_rtx", reason="TensorRT-RTX builds without a GPU, TensorRT does not")

from tgate_runtime.backends.tensorrt import (  # noqa: E402
    TensorRt,
    check_tensors,
    cuda,
)
from tgate_runtime.backends.tensorrt.build import (  # noqa: E402
    RTX,
    Log,
    build_engine,
    capability,
    flags,
    log,
    polygraphy,
    read_model,
    weight_spans,
    without_weights,
)

pytestmark = [
    pytest.mark.skipif(not RTX, reason="TensorRT is installed, which builds on the GPU at hand alone"),
    pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX"),  # Polygraphy sets a timing cache
]
without_gpu = pytest.mark.skipif(cuda.gpu_count() > 0, reason="a GPU is visible here")
SHARED = EngineOptions(memory="shared")
KIND = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "uint8": TensorProto.UINT8,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(build(tmp_path_factory.mktemp("tensorrt") / "toy"))


def one_graph(
    path: Path,
    nodes: list[onnx.NodeProto],
    inputs: Mapping[str, tuple[str, tuple[Dim, ...]]],
    output: tuple[str, tuple[Dim, ...]],
    weights: Mapping[str, tuple[str, tuple[int, ...]]] | None = None,
) -> GraphSpec:
    """A graph of ``nodes`` with output y; its weights lie in a file that is not there."""

    def info(name: str, dtype: str, shape: tuple[Dim, ...]) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, KIND[dtype], shape)

    graph = helper.make_graph(nodes, "g", [info(n, *of) for n, of in inputs.items()], [info("y", *output)])
    for index, (name, (dtype, shape)) in enumerate((weights or {}).items()):
        tensor = onnx.TensorProto(name=name, data_type=KIND[dtype], dims=shape)
        tensor.data_location = TensorProto.EXTERNAL
        size = int(np.prod(shape)) * (4 if dtype == "float32" else 2)
        for key, value in (("location", "weights.safetensors"), ("offset", str(64 + index * 4096)), ("length", size)):
            tensor.external_data.add(key=key, value=str(value))
        graph.initializer.append(tensor)
    opsets = [helper.make_opsetid("", 23)]
    path.write_bytes(helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString())
    return GraphSpec(
        file=path.name,
        inputs=tuple(TensorSpec(name=n, dtype=d, shape=s) for n, (d, s) in inputs.items()),
        outputs=(TensorSpec(name="y", dtype=output[0], shape=output[1]),),
        macs=Macs(paper=0, all=0),
    )


def attention(path: Path, dtype: str, rows: Dim, *, causal: bool = False) -> GraphSpec:
    shape: tuple[Dim, ...] = (rows, 2, 16, 8)
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], is_causal=int(causal))
    return one_graph(path, [node], dict.fromkeys("qkv", (dtype, shape)), (dtype, shape))


def convolution(path: Path) -> GraphSpec:
    shape = (1, 8, 16, 16)
    node = helper.make_node("Conv", ["x", "w", "b"], ["y"], pads=[1, 1, 1, 1])
    weights = {"w": ("float32", (8, 8, 3, 3)), "b": ("float32", (8,))}
    return one_graph(path, [node], {"x": ("float32", shape)}, ("float32", shape), weights)


# --- building --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_attention_builds_in_every_dtype(tmp_path: Path, dtype: str) -> None:
    """The parser marks attention as one kernel or nothing, and in float32 there is no such kernel."""
    spec = attention(tmp_path / "a.onnx", dtype, 2)
    assert build_engine(tmp_path / "a.onnx", spec, (1, 1), SHARED)


def test_causal_attention_builds(tmp_path: Path) -> None:
    spec = attention(tmp_path / "a.onnx", "float32", 2, causal=True)
    assert build_engine(tmp_path / "a.onnx", spec, (1, 1), SHARED)


@pytest.mark.parametrize("batch", [(1, 4), (4, 4)])
def test_a_dynamic_batch_has_its_own_profile(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, batch: tuple[int, int]
) -> None:
    """Where a profile lacks an input, Polygraphy warns, and takes 1 for every size that varies."""
    spec = attention(tmp_path / "a.onnx", "float16", "2*batch")
    assert build_engine(tmp_path / "a.onnx", spec, batch, SHARED)
    assert "No shapes provided" not in caplog.text


def test_an_engine_is_built_without_its_weights(tmp_path: Path) -> None:
    spec = convolution(tmp_path / "c.onnx")
    assert not (tmp_path / "weights.safetensors").exists()
    assert build_engine(tmp_path / "c.onnx", spec, (1, 1), SHARED)
    assert weight_spans(read_model(tmp_path / "c.onnx")) == {"w": (64, 8 * 8 * 9 * 4), "b": (64 + 4096, 32)}


def test_weights_as_inputs_are_the_same_computation(bundle: Bundle) -> None:
    """Both models in ONNX Runtime, the second fed from the spans of the weight file."""
    ort = pytest.importorskip("onnxruntime")
    path = bundle.file(bundle.manifest.graphs["full"].file)
    stored = bundle.file(bundle.manifest.weights).read_bytes()
    whole, bare = ort.InferenceSession(str(path)), ort.InferenceSession(without_weights(read_model(path)))
    rng = np.random.default_rng(0)
    feed = {i.name: rng.normal(size=[d if isinstance(d, int) else 1 for d in i.shape]) for i in whole.get_inputs()}
    batch = {i.name: i.shape for i in whole.get_inputs()}
    feed = {n: np.repeat(v, 2, 0) if str(batch[n][0]).startswith("2") else v for n, v in feed.items()}
    feed = {name: value.astype(np.float32) for name, value in feed.items()}
    spans = weight_spans(read_model(path))
    shapes = {i.name: i.shape for i in bare.get_inputs()}
    assert shapes.keys() == feed.keys() | spans.keys()
    weights = {
        name: np.frombuffer(stored, np.float32, length // 4, offset).reshape(shapes[name])
        for name, (offset, length) in spans.items()
    }
    for got, want in zip(bare.run(None, feed | weights), whole.run(None, feed), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_the_plan_of_a_large_matrix_is_small(tmp_path: Path) -> None:
    wide = 2048
    node = helper.make_node("MatMul", ["x", "w"], ["y"])
    x: tuple[str, tuple[Dim, ...]] = ("float32", (1, 64, wide))
    spec = one_graph(tmp_path / "m.onnx", [node], {"x": x}, x, {"w": ("float32", (wide, wide))})
    assert len(build_engine(tmp_path / "m.onnx", spec, (1, 1), SHARED)) < wide * wide * 4 / 100


@without_gpu
def test_a_stripped_engine_cannot_be_built_without_a_driver(bundle: Bundle) -> None:
    """TensorRT-RTX 1.7 compiles the kernels that lay out refitted weights while it builds, and that needs a driver."""
    with pytest.raises(EngineError, match="only with TensorRT-RTX and memory 'shared'"):
        TensorRt(EngineOptions(memory="fast")).build(bundle, list(bundle.manifest.graphs))


def test_what_does_not_parse_is_named_in_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    shape: tuple[Dim, ...] = (1, 3)
    node = helper.make_node("NoSuchOp", ["x"], ["y"], domain="")
    spec = one_graph(tmp_path / "n.onnx", [node], {"x": ("float32", shape)}, ("float32", shape))
    with pytest.raises(EngineError, match=r"cannot build n\.onnx: .*NoSuchOp") as caught:
        build_engine(tmp_path / "n.onnx", spec, (1, 1), SHARED)
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_a_complaint_is_taken_once() -> None:
    log.clear()
    assert isinstance(log, Log)
    assert log.take("the reason") == "the reason"


# --- the cache -------------------------------------------------------------------------------------------------------


def test_all_graphs_of_a_bundle_build_once(bundle: Bundle) -> None:
    engine = backend("tensorrt", memory="shared")
    graphs = list(bundle.manifest.graphs)
    heard: list[tuple[int, int, str]] = []
    entries = engine.build(bundle, graphs, lambda *what: heard.append(what))
    total = len(graphs)
    assert heard == [*((done, total, graph) for done, graph in enumerate(graphs)), (total, total, graphs[-1])]
    assert all((entries[graph] / "engine.plan").stat().st_size > 0 for graph in graphs)
    heard.clear()
    assert engine.build(bundle, graphs, lambda *what: heard.append(what)) == entries
    assert heard == []


def test_the_key_says_what_an_engine_is_made_from(bundle: Bundle) -> None:
    graph = next(iter(bundle.manifest.graphs))
    shared = TensorRt(SHARED).key(bundle, graph)
    assert shared["weights"] == ""
    assert shared["architecture"] == "portable"
    assert shared["batch"] == list(bundle.manifest.batch)
    assert trt.__version__ in shared["engine"]
    fast = TensorRt(EngineOptions(memory="fast", architecture="sm_89")).key(bundle, graph)
    assert fast["weights"] == bundle.manifest.files[bundle.manifest.weights].sha256
    assert fast["architecture"] == "sm_89"


@pytest.mark.parametrize(
    ("what", "other"), [("RECIPE", "another"), ("POLYGRAPHY", "0.1"), ("flags", lambda _: {"TF32": True})]
)
def test_another_recipe_is_another_engine(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch, what: str, other: Any
) -> None:
    """Or an engine of yesterday's settings would be found again."""
    graph = next(iter(bundle.manifest.graphs))
    before = digest_of(TensorRt(SHARED).key(bundle, graph))
    assert digest_of(TensorRt(SHARED).key(bundle, graph)) == before
    monkeypatch.setattr(f"tgate_runtime.backends.tensorrt.{what}", other)
    assert digest_of(TensorRt(SHARED).key(bundle, graph)) != before


@pytest.mark.parametrize("memory", ["shared", "fast"])
def test_the_builder_is_set_as_the_key_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str) -> None:
    options = EngineOptions(memory=memory)
    set_to: dict[str, bool] = {}

    def built(_network: Any, config: Any) -> bytes:
        set_to.update({flag: config.get_flag(getattr(trt.BuilderFlag, flag)) for flag in flags(options)})
        return b""

    monkeypatch.setattr(polygraphy, "engine_bytes_from_network", built)
    build_engine(tmp_path / "a.onnx", attention(tmp_path / "a.onnx", "float32", 2), (1, 1), options)
    assert set_to == flags(options)
    assert set_to["STRIP_PLAN"] == (memory == "fast")
    assert not set_to["TF32"]


# --- opening ---------------------------------------------------------------------------------------------------------


@without_gpu
def test_loading_without_a_gpu_says_so(bundle: Bundle) -> None:
    engine = backend("tensorrt", memory="shared")
    with pytest.raises(EngineError, match=r"^engine tensorrt needs an NVIDIA GPU; none is visible here"):
        engine.load(bundle, list(bundle.manifest.graphs))
    with pytest.raises(EngineError, match=r"^engine tensorrt needs an NVIDIA GPU; none is visible here"):
        engine.allocate((1,), "float32")


def test_options_are_settled_or_refused() -> None:
    engine = TensorRt(EngineOptions())
    assert (engine.name, engine.options.memory) == ("tensorrt", "shared")
    assert engine.version == f"RTX {trt.__version__}"
    assert ENGINES["tensorrt"].cls == TensorRt.__name__
    with pytest.raises(EngineError, match="leave out --precision"):
        TensorRt(EngineOptions(precision="f16"))
    with pytest.raises(EngineError, match="tensorrt computes on a GPU; leave out --threads"):
        TensorRt(EngineOptions(threads=2))
    assert capability("sm_120") == (12, 0)
    for unknown in ("sm_90", "ada"):
        with pytest.raises(EngineError, match=rf"builds for sm_75, .*got '{unknown}'"):
            TensorRt(EngineOptions(architecture=unknown))


class _Engine:
    """Stands for a deserialized engine of y = x * w + b, spare = y: its host code alone runs, in :func:`fake_gpu`."""

    device_memory_size_v2 = 1000

    def __init__(self, tensors: Mapping[str, Any]) -> None:
        self._tensors = tensors
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
        self.contexts += 1
        return _Context()


class _Context:
    def __init__(self) -> None:
        self.addresses: dict[str, int] = {}
        self.shape: tuple[int, ...] = ()

    def set_device_memory(self, address: int, size_bytes: int) -> None:
        assert address
        assert size_bytes == _Engine.device_memory_size_v2

    def set_input_shape(self, _name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return True

    def get_tensor_shape(self, _name: str) -> tuple[int, ...]:
        return self.shape

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert address % cuda.ALIGNMENT_BYTES == 0
        self.addresses[name] = address
        return True

    def is_stream_capturable(self, _stream: int) -> bool:
        return True

    def execute_async_v3(self, stream: int) -> bool:
        _Gpu.queue(stream, self._run)
        return True

    def _run(self) -> None:
        at = {name: _floats(address, self.shape) for name, address in self.addresses.items()}
        at["y"][...] = at["x"] * _floats(self.addresses["w"], (1,)) + _floats(self.addresses["b"], (1,))
        at["spare"][...] = at["y"]


def _floats(address: int, shape: tuple[int, ...]) -> Any:
    return np.ctypeslib.as_array(ctypes.cast(address, ctypes.POINTER(ctypes.c_float)), shape)


class _Gpu:
    """A CUDA runtime of host memory: what is queued runs at once, or is recorded while its stream is captured."""

    capturing: ClassVar[list[Any] | None] = None
    launches: ClassVar[int] = 0
    memory: ClassVar[dict[int, Any]] = {}

    @classmethod
    def queue(cls, _stream: int, work: Any) -> None:
        if cls.capturing is None:
            work()
        else:
            assert not gc.isenabled()  # a buffer collected now would be freed within the capture, which ends it
            cls.capturing.append(work)

    @classmethod
    def malloc(cls, size_bytes: int) -> tuple[int, int]:
        block = np.full(size_bytes + cuda.ALIGNMENT_BYTES, 0xAB, np.uint8)
        address = cuda.aligned(block.ctypes.data)
        cls.memory[address] = block
        return 0, address

    @classmethod
    def free(cls, address: int) -> tuple[int]:
        del cls.memory[address]
        return (0,)

    @classmethod
    def begin(cls, *_: Any) -> tuple[int]:
        cls.capturing = []
        return (0,)

    @classmethod
    def end(cls, _stream: int) -> tuple[int, Any]:
        recorded, cls.capturing = cls.capturing, None
        return 0, recorded

    @classmethod
    def launch(cls, recorded: Any, _stream: int) -> tuple[int]:
        cls.launches += 1
        for work in recorded:
            work()
        return (0,)


@pytest.fixture
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> type[_Gpu]:
    def done(*_: Any) -> tuple[int]:
        return (0,)

    calls = {
        "cudaGetDeviceCount": lambda: (0, 1),
        "cudaMalloc": _Gpu.malloc,
        "cudaFree": _Gpu.free,
        "cudaMemsetAsync": lambda to, value, size, _stream: (ctypes.memset(to, value, size) and 0,),
        "cudaMemcpyAsync": lambda to, source, size, _kind, _stream: (ctypes.memmove(to, source, size) and 0,),
        "cudaStreamCreateWithFlags": lambda _flags: (0, 7),
        "cudaStreamBeginCapture": _Gpu.begin,
        "cudaStreamEndCapture": _Gpu.end,
        "cudaGraphInstantiate": lambda graph, _flags: (0, graph),
        "cudaGraphLaunch": _Gpu.launch,
    }
    ignored = (
        "cudaSetDevice",
        "cudaStreamSynchronize",
        "cudaStreamDestroy",
        "cudaGraphDestroy",
        "cudaGraphExecDestroy",
    )
    for name, stand_in in (*calls.items(), *((name, done) for name in ignored)):
        monkeypatch.setattr(cuda.cuda, name, stand_in)
    _Gpu.launches = 0
    assert not _Gpu.memory
    return _Gpu


def test_the_host_code_of_a_call(fake_gpu: type[_Gpu], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU and no engine: that weights, buffers and CUDA graphs are handed over as they should be, and freed."""
    shape: tuple[Dim, ...] = ("batch", 3)
    nodes = [helper.make_node("Mul", ["x", "w"], ["p"]), helper.make_node("Add", ["p", "b"], ["y"])]
    weights = {"w": ("float32", (1,)), "b": ("float32", (1,))}
    spec = one_graph(tmp_path / "g.onnx", nodes, {"x": ("float32", shape)}, ("float32", shape), weights)
    spec = replace(spec, outputs=(*spec.outputs, TensorSpec(name="spare", dtype="float32", shape=shape)))
    content = np.zeros(2048, np.float32)
    content[16], content[16 + 1024] = 2, 5  # w and b, at the offsets of one_graph
    (tmp_path / "weights.safetensors").write_bytes(content.tobytes())
    bundle = SimpleNamespace(
        manifest=SimpleNamespace(graphs={"g": spec}, weights="weights.safetensors"), file=lambda name: tmp_path / name
    )
    engine = _Engine(dict.fromkeys(("x", "w", "b", "y", "spare"), trt.DataType.FLOAT))
    backend = TensorRt(SHARED)
    monkeypatch.setattr(TensorRt, "build", lambda *_: {"g": tmp_path})
    monkeypatch.setattr(TensorRt, "_engine", lambda *_: engine)
    monkeypatch.setattr(trt, "Runtime", MagicMock())
    graph = backend.load(bundle, ["g"])["g"]  # type: ignore[arg-type]
    x, y = (backend.allocate((2, 3), "float32") for _ in "xy")
    assert not x.read().any()
    first, second = graph.bind({"x": x}, {"y": y}), graph.bind({"x": y}, {"y": x})
    assert first.addresses == {"x": x.address, "y": y.address}
    assert engine.contexts == 2
    x.write(np.full((1, 3), 10, np.float32))
    for run in range(3):
        first()
        np.testing.assert_array_equal(y.read(), np.full((2, 3), 25))
        assert fake_gpu.launches == run  # the first run warms up and records
        assert gc.isenabled()
    second()
    np.testing.assert_array_equal(x.read(), np.full((2, 3), 55))
    with pytest.raises(EngineError, match="takes float32 arrays"):
        x.write(np.zeros(3))
    with pytest.raises(EngineError, match="inputs missing or not known: x"):
        graph.bind({}, {"y": y})
    assert len(fake_gpu.memory) == 5  # x, y, weights, scratch, spare: the two calls share the last
    del graph, first, second, x, y
    assert not fake_gpu.memory


def test_an_engine_that_does_not_match_its_manifest_is_refused(tmp_path: Path) -> None:
    spec = convolution(tmp_path / "c.onnx")
    kind = trt.DataType.FLOAT
    check_tensors(_Engine({"x": kind, "w": kind, "b": kind, "y": kind}), spec, {"w", "b"})
    with pytest.raises(
        EngineError, match=r"c\.onnx does not have the outputs .*: y float16, y float32; export it again"
    ):
        check_tensors(_Engine({"x": kind, "y": trt.DataType.HALF}), spec, set())


def test_importing_the_engine_prints_nothing_and_loads_no_torch() -> None:
    code = "import sys, tgate_runtime.backends.tensorrt; assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# --- whole models ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("architecture", [None, "sm_89", "sm_120"])
def test_the_embedded_model_builds(mini_full_bundle: Path, architecture: str | None) -> None:
    bundle = Bundle.open(mini_full_bundle, check_digests=False)
    engine = TensorRt(EngineOptions(memory="shared", architecture=architecture))
    assert engine.build(bundle, list(bundle.manifest.graphs)).keys() == bundle.manifest.graphs.keys()
