"""ONNX Runtime on a GPU, as far as a CPU goes: one thread, what is captured, what its log says, copies by address.

That it computes what it should, with the CPU in place of the GPU: test_every_engine.py.
"""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import numpy as np
import onnxruntime
import pytest
from onnx import helper, numpy_helper
from safetensors.numpy import save_file

from tests.runtime.engines.ort_cuda.halves import halves
from tests.runtime.engines.small import (
    WEIGHTS,
    Small,
    assert_close,
    manifest_of,
    outside,
    random_inputs,
    save,
    tensor,
)
from tests.runtime.engines.ways import OnTheCpu
from tgate_engine.bundle import Bundle
from tgate_engine.dtypes import DTYPES, encode, storage
from tgate_engine.errors import EngineError
from tgate_engine.graph import BATCH, GraphSpec
from tgate_engine.manifest import Shape
from tgate_runtime.engines.ort import OrtCpu
from tgate_runtime.engines.ort_cuda import OrtCuda, memory
from tgate_runtime.engines.ort_cuda.limits import multiplies_in_half, refuse_bfloat16
from tgate_runtime.engines.ort_cuda.memory import CudaBuffer
from tgate_runtime.engines.protocol import EngineOptions
from tgate_runtime.weights import Weight, map_weights, read_places


def bound(engine: Any, graph: Any, spec: GraphSpec, batch: int = 1) -> tuple[Any, dict[str, CudaBuffer]]:
    """A call on buffers of its own, and those by name."""
    inputs, outputs = (
        {t.name: engine.allocate(t.resolve(batch), t.dtype) for t in tensors} for tensors in (spec.inputs, spec.outputs)
    )
    return graph.bind(inputs, outputs), inputs | outputs


# --- one thread ---------------------------------------------------------------------------------


def test_one_thread_works_on_the_gpu(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks: ONNX Runtime keeps a CUDA graph with its thread, and other threads' work breaks a capture."""
    heard: dict[str, set[int]] = {}

    def listen(owner: Any, name: str) -> None:
        call = getattr(owner, name)

        def listening(*args: Any, **settings: Any) -> Any:
            heard.setdefault(name, set()).add(threading.get_ident())
            return call(*args, **settings)

        is_static = isinstance(vars(owner).get(name), staticmethod | classmethod)
        monkeypatch.setattr(owner, name, staticmethod(listening) if is_static else listening)

    for name in ("ortvalue_from_shape_and_type", "update_inplace"):
        listen(onnxruntime.OrtValue, name)
    for name in ("__init__", "io_binding", "run_with_iobinding"):
        listen(onnxruntime.InferenceSession, name)
    listen(memory, "_move")
    spec = small.graphs["full"]
    engine = OnTheCpu(EngineOptions())
    graph = engine.load(small.bundle, [spec])[spec.file]

    def served(seed: int) -> None:
        values = random_inputs(spec, 2, seed)
        call, buffers = bound(engine, graph, spec, 2)
        for name, array in values.items():
            buffers[name].rows(0, 2).write(array)
        call()
        buffers["latents"].copy(buffers["next_latents"])
        assert_close(spec, {n: buffers[n].read() for n in spec.output_names()}, small.expected("full", values))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(served, range(8)))
    assert len(heard) == 6
    assert len(set().union(*heard.values())) == 1
    assert threading.get_ident() not in heard["__init__"]


# --- capturing ----------------------------------------------------------------------------------


def test_only_denoising_graphs_are_captured(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs around the denoiser may hold nodes without CUDA kernels, and a graph that is not captured is not run
    before it is called."""
    settings: dict[str, Any] = {}
    load, runs = onnxruntime.InferenceSession, []

    names = {small.bundle.read(spec.file): name for name, spec in small.graphs.items()}

    def on_the_cpu(data: bytes, options: Any, *, providers: Any, enable_fallback: int) -> Any:
        assert enable_fallback == 0
        settings[names[data]] = providers[0][1]
        return load(data, options, providers=["CPUExecutionProvider"])

    engine = OnTheCpu(EngineOptions())
    monkeypatch.setattr(onnxruntime, "InferenceSession", on_the_cpu)
    monkeypatch.setattr(OnTheCpu, "providers", OrtCuda.providers)
    monkeypatch.setattr(load, "run_with_iobinding", lambda *args: runs.append(args))
    executables = engine.load(small.bundle, tuple(small.graphs.values()))
    assert {name: "enable_cuda_graph" in own for name, own in settings.items()} == {
        **{"full": True, "reuse": True, "text": False, "decoder": False}
    }
    assert {own["use_tf32"] for own in settings.values()} == {"0"}
    for name, spec in small.graphs.items():
        before = len(runs)
        bound(engine, executables[spec.file], spec)
        assert len(runs) - before == (name in ("full", "reuse"))


def test_a_capture_is_not_disturbed(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """A session that the collector found meanwhile would be freed, which ends a capture; and no two graphs of the
    process have a number in common, whichever session's they are."""
    collecting, numbers = [], []
    run = onnxruntime.InferenceSession.run_with_iobinding

    def running(session: Any, binding: Any, options: Any) -> None:
        collecting.append(gc.isenabled())
        numbers.append(options.get_run_config_entry("gpu_graph_id"))
        run(session, binding, options)

    monkeypatch.setattr(onnxruntime.InferenceSession, "run_with_iobinding", running)
    engine = OnTheCpu(EngineOptions())
    specs = [small.graphs[name] for name in ("full", "reuse")]
    files = engine.load(small.bundle, specs)
    for spec in (*specs, *specs):
        assert gc.isenabled()
        call, _ = bound(engine, files[spec.file], spec)
        assert gc.isenabled()
        call()
    assert collecting == [False, True] * 4
    assert [*map(int, numbers)] == [number for first in numbers[::2] for number in [int(first)] * 2]
    assert len({*numbers}) == 4


def test_the_collector_stays_off_where_it_was(small: Small) -> None:
    engine, spec = OnTheCpu(EngineOptions()), small.graphs["full"]
    graph = engine.load(small.bundle, [spec])[spec.file]
    gc.disable()
    try:
        bound(engine, graph, spec)
        assert not gc.isenabled()
    finally:
        gc.enable()


def test_rows_that_kernels_could_not_take_are_copied(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of ``step`` and of pictures begin at multiples of 48 bytes, all others at ones of 64."""
    monkeypatch.setattr("tgate_runtime.engines.ort_cuda._ALIGNMENT_BYTES", 64)
    moves: list[tuple[int, int]] = []
    move = memory._move

    def moving(to: int, source: int, *how: Any) -> None:
        moves.append((to, source))
        move(to, source, *how)

    monkeypatch.setattr(memory, "_move", moving)
    engine = OnTheCpu(EngineOptions())
    for name, inputs, outputs in (("full", ["step"], []), ("decoder", [], ["image"])):
        spec = small.graphs[name]
        graph = engine.load(small.bundle, [spec])[spec.file]
        _, buffers = bound(engine, graph, spec, 3)
        values = random_inputs(spec, 3)
        for each, array in values.items():
            buffers[each].write(array)
        for each in spec.output_names():
            buffers[each].write(np.zeros((), storage(buffers[each].dtype)))
        rows = {each: buffer.rows(1, 1) for each, buffer in buffers.items()}
        call = graph.bind({n: rows[n] for n in spec.input_names()}, {n: rows[n] for n in spec.output_names()})
        assert call.addresses == {each: buffer.address for each, buffer in rows.items()}
        moves.clear()
        call()
        assert [source for _, source in moves if source in {rows[n].address for n in rows}] == [
            rows[n].address for n in inputs
        ]
        assert [to for to, _ in moves if to in {rows[n].address for n in rows}] == [rows[n].address for n in outputs]
        got = {n: rows[n].read() for n in spec.output_names()}
        assert_close(spec, got, small.expected(name, {n: array[1:2] for n, array in values.items()}))
        for each in spec.output_names():
            assert not buffers[each].read()[[0, 2]].any()


# --- weights ------------------------------------------------------------------------------------


def convolving(folder: Path) -> Bundle:
    """Two graphs of one convolution and one normalization in half precision, whose weights lie in a file."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    shapes = {"w": (8, 4, 3, 3), "c": (8,), "scale": (8,), "shift": (8,)}
    save_file({name: rng.standard_normal(shape).astype(np.float16) for name, shape in shapes.items()}, folder / WEIGHTS)
    places = read_places(folder / WEIGHTS)
    weights = [outside(name, each.offset, each.length, each.shape, each.dtype) for name, each in places.items()]
    nodes = [
        helper.make_node("Conv", ["x", "w", "c"], ["a"], pads=[1, 1, 1, 1]),
        helper.make_node("GroupNormalization", ["a", "scale", "shift"], ["y"], num_groups=2),
    ]
    x, y = (tensor(name, BATCH, channels, 5, 6, dtype="float16") for name, channels in (("x", 4), ("y", 8)))
    graphs = {name: save(folder / f"{name}.onnx", nodes, [x], [y], weights) for name in ("one", "two")}
    shape = Shape(width=6, height=5, batch=(1, 4), latents=(4, 5, 6), constants={}, graphs=graphs)
    return Bundle(folder, manifest_of(folder, shape))


@pytest.mark.parametrize("memory", ["shared", "fast"])
def test_weights_are_uploaded_once_as_kernels_want_them(tmp_path: Path, memory: Literal["shared", "fast"]) -> None:
    """And are not, where no graph asks for them as they lie."""
    bundle = convolving(tmp_path / "bundle")
    specs = [*bundle.manifest.shapes[0].graphs.values()]
    engine, reference = OnTheCpu(EngineOptions(memory=memory)), OrtCpu(EngineOptions())
    graphs = engine.load(bundle, specs)
    one, two = (graphs[spec.file]._weights for spec in specs)
    assert {*one} == {"w:0231", "scale:float32", "shift:float32"} | ({"c"} if memory == "shared" else set())
    assert all(one[name] is two[name] for name in one)
    assert one["w:0231"].shape() == [8, 3, 3, 4]
    for spec in specs:
        values = {"x": encode(np.random.default_rng(1).standard_normal((2, 4, 5, 6)), "float16")}
        results = []
        for each, graph in ((engine, graphs[spec.file]), (reference, reference.load(bundle, [spec])[spec.file])):
            call, buffers = bound(each, graph, spec, 2)
            buffers["x"].write(values["x"])
            call()
            results.append(buffers["y"].read())
        assert np.abs(results[0] - results[1]).max() <= 4e-3 * np.abs(results[1]).max()


def test_what_is_loaded_with_other_weights_shares_the_rest(tmp_path: Path) -> None:
    """And holds no weight any longer than its graphs are there."""
    bundle = convolving(tmp_path / "bundle")
    spec = bundle.manifest.shapes[0].graphs["one"]
    engine = OnTheCpu(EngineOptions())
    first = engine.load(bundle, [spec])[spec.file]
    weights = map_weights(bundle.file(WEIGHTS))
    instead = {name: Weight(weights[name].dtype, weights[name].array * 2) for name in ("w", "shift")}
    other = engine.load(bundle, [spec], instead=instead)[spec.file]
    same = {name for name in first._weights if first._weights[name] is other._weights[name]}
    assert same == {*first._weights} - {"w:0231", "shift:float32"}
    assert len(engine._uploaded) == len(first._weights)
    del first, other
    gc.collect()
    assert not engine._uploaded


def test_a_weight_that_the_engine_reads_instead_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime reads the file where it takes no value that it is handed: it finds nothing there."""
    bundle = convolving(tmp_path / "bundle")
    monkeypatch.setattr(OnTheCpu, "_load", OrtCuda._load)
    monkeypatch.setattr(onnxruntime.SessionOptions, "add_initializer", lambda *_: None)
    with pytest.raises(EngineError, match=r"cannot load one\.onnx on the GPU: .+ out of bounds"):
        OnTheCpu(EngineOptions()).load(bundle, [bundle.manifest.shapes[0].graphs["one"]])


# --- numbers ------------------------------------------------------------------------------------


def graph_of(operators: Sequence[str], dtype: str) -> bytes:
    """An ONNX file of those operators, one after another, and one weight."""
    names = [*(f"h{i}" for i in range(len(operators))), "y"]
    nodes = [helper.make_node(each, [a], [b]) for each, (a, b) in zip(operators, pairwise(names), strict=True)]
    one = helper.make_tensor_value_info("h0", DTYPES[dtype].onnx, [1, 1])
    last = helper.make_tensor_value_info("y", DTYPES[dtype].onnx, [1, 1])
    constant = numpy_helper.from_array(np.zeros(1, np.float16), "a constant in the file")
    graph = helper.make_graph(nodes, "g", [one], [last], [outside("w", 0, 4, (1,), dtype), constant])
    data: bytes = helper.make_model(graph).SerializeToString()
    return data


@pytest.mark.parametrize(("dtype", "half"), [("float32", False), ("float16", True), ("bfloat16", True)])
def test_tf32_is_off_in_float32_alone(dtype: str, half: bool) -> None:
    """In 16 bits the setting forbids convolutions the tensor cores; a constant is no weight."""
    assert multiplies_in_half(graph_of(["Gelu"], dtype)) is half
    ((_, settings), _) = OrtCuda.providers(OnTheCpu(EngineOptions()), False, half)
    assert settings["use_tf32"] == ("1" if half else "0")


def test_bfloat16_without_kernels_is_refused_before_loading(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = small.graphs["full"]
    for operators, dtype in (
        (["Gelu", "Attention"], "bfloat16"),
        (["Resize"], "float16"),
        (["Resize"], "float32"),
    ):
        refuse_bfloat16(graph_of(operators, dtype), spec)
    data = graph_of(["Gelu", "Resize"], "bfloat16")
    monkeypatch.setattr("tgate_runtime.engines.ort_cuda.read_graphs", lambda *_: {spec.file: data})
    monkeypatch.setattr(onnxruntime, "InferenceSession", None)
    with pytest.raises(EngineError, match=r"^full\.onnx is in bfloat16, .+ has no Resize; "):
        OnTheCpu(EngineOptions()).load(small.bundle, [spec])


# --- copies -------------------------------------------------------------------------------------


@pytest.fixture
def cuda_of_host_memory(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A CUDA runtime that copies host memory; what it was asked for, in order."""
    asked: list[str] = []

    def copy(to: Any, source: Any, size: Any, kind: int) -> int:
        asked.append(f"cudaMemcpy {size.value} {kind}")
        ctypes.memmove(to.value, source.value, size.value)
        return 0

    def done(name: str) -> Callable[[Any], int]:
        def call(argument: Any) -> int:
            asked.append(f"{name} {argument}")
            return 0

        return call

    library = SimpleNamespace(
        cudaMemcpy=copy, cudaSetDevice=done("cudaSetDevice"), cudaStreamSynchronize=done("cudaStreamSynchronize")
    )
    monkeypatch.setattr(memory, "_cuda_runtime", lambda: library)
    return asked


def test_a_copy_is_waited_for(cuda_of_host_memory: list[str]) -> None:
    """CUDA's own function returns before a copy within the device is done."""
    source, target = np.arange(4.0), np.zeros(4)
    memory._move(target.ctypes.data, source.ctypes.data, 32, ("cuda", 1))
    np.testing.assert_array_equal(target, source)
    assert cuda_of_host_memory == ["cudaSetDevice 1", "cudaMemcpy 32 4", "cudaStreamSynchronize None"]


def test_what_cuda_says_is_raised(cuda_of_host_memory: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    library = memory._cuda_runtime()
    library.cudaSetDevice = lambda _: 700
    library.cudaGetErrorString = lambda error: f"error {error}: an illegal memory access".encode()
    engine = OnTheCpu(EngineOptions())
    buffer = engine.allocate((2, 3), "float32")
    buffer._device = ("cuda", 0)
    other = engine.allocate((2, 3), "float32")
    calls: list[tuple[str, Callable[[], object], Callable[[], object]]] = [
        ("write", lambda: buffer.write(np.zeros((2, 3), np.float32)), other.read),
        ("read", lambda: None, buffer.read),
        ("copy", lambda: buffer.copy(other), other.read),
    ]
    for verb, call, again in calls:
        call()  # nobody waits for it: whoever waits next is told
        with pytest.raises(
            EngineError, match=rf"^CUDA cannot {verb} a buffer of float32 \[2, 3\]: error 700: an illegal"
        ):
            again()
    assert not other.read().any()  # told once
    assert cuda_of_host_memory == []


def test_what_is_written_is_what_the_array_held() -> None:
    """Though it may be written after the caller has gone on, and whoever reads finds all that was written before."""
    buffer, other = (OnTheCpu(EngineOptions()).allocate((2, 3), "float32") for _ in range(2))
    numbers = np.zeros((2, 3), np.float32)
    for n in range(100):
        numbers[:] = n
        buffer.write(numbers)
        numbers[:] = -1
        other.copy(buffer)
    assert (other.read() == 99).all()


def test_a_call_computes_what_it_is_asked_for(small: Small) -> None:
    """One that wants fewer outputs has a session without what only the others need: its numbers are the same."""
    engine, spec = OnTheCpu(EngineOptions()), small.graphs["full"]
    executable = engine.load(small.bundle, [spec])[spec.file]
    inputs = random_inputs(spec, 1)
    got = {}
    few = spec.output_names()[:1]
    for wanted in (spec.output_names(), few):
        buffers = {t.name: engine.allocate(t.resolve(1), t.dtype) for t in (*spec.inputs, *spec.outputs)}
        for name, array in inputs.items():
            buffers[name].write(array)
        executable.bind({name: buffers[name] for name in inputs}, {name: buffers[name] for name in wanted})()
        got[len(wanted)] = {name: buffers[name].read() for name in wanted}
    assert [{value.name for value in s.get_outputs()} for s in executable._sessions.values()] == [
        set(spec.output_names()),
        set(few),
    ]
    assert all((got[1][name] == got[len(spec.outputs)][name]).all() for name in few)


def test_the_cuda_runtime_is_onnxruntime_s(monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[str] = []

    def load(name: str) -> Any:
        loaded.append(name)
        return SimpleNamespace(cudaGetErrorString=SimpleNamespace())

    monkeypatch.setattr(onnxruntime, "cuda_version", "13.0")
    monkeypatch.setattr(ctypes, "CDLL", load)
    memory._cuda_runtime.__wrapped__()
    assert loaded == ["libcudart.so.13"]


# --- opening ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (EngineOptions(), "has no CUDAExecutionProvider: pip uninstall onnxruntime"),
        (EngineOptions(threads=2), "ort-cuda computes on a GPU; leave out --threads"),
        (
            EngineOptions(architecture="sm_90"),
            "ort-cuda brings kernels for every GPU that it knows; leave out --architecture",
        ),
        (EngineOptions(precision="f16"), "computes in the dtype that the bundle was exported with"),
    ],
)
def test_options_it_cannot_follow(options: EngineOptions, says: str) -> None:
    with pytest.raises(EngineError, match=says):
        OrtCuda(options)


def test_options_are_settled(tmp_path: Path) -> None:
    engine = OnTheCpu(EngineOptions())
    assert (engine.name, engine.options) == ("ort-cuda", EngineOptions(memory="shared"))
    bundle = halves(tmp_path / "bundle")
    (place,) = engine.build(bundle, tuple(bundle.manifest.shapes[0].graphs.values())).values()
    assert place.parent == bundle.path / "engines" / "ort-cuda"


@pytest.mark.filterwarnings("ignore:Specified provider")  # this onnxruntime has no CUDA
def test_cuda_is_found_in_any_folder_of_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wheel of ONNX Runtime in one folder, CUDA's in another, cuDNN in neither."""
    folder = tmp_path / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(onnxruntime, "cuda_version", "13.0")
    asked: list[dict[str, Any]] = []

    def preload(**settings: Any) -> None:
        asked.append(settings)
        print("Failed to load libwhat.so: no such file")

    monkeypatch.setattr(onnxruntime, "preload_dlls", preload)
    monkeypatch.setattr(OnTheCpu, "kind", "cuda")
    with pytest.raises(EngineError, match=r"^ort-cuda finds no GPU 0 here: .+ \(Failed to load libwhat\.so: no such"):
        OnTheCpu(EngineOptions())
    assert asked == [{"cudnn": False, "directory": str(folder)}, {"cuda": False, "directory": None}]


# --- what the engine says -----------------------------------------------------------------------


def test_a_weight_that_would_be_copied_is_an_error(small: Small, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine says so in its log alone; here the log is made to say it."""
    load = onnxruntime.InferenceSession

    def copying(*args: Any, **settings: Any) -> Any:
        os.write(2, b"[W:onnxruntime:, a.cc:1 F] Cannot use user supplied initializer with name: (w) because the ORT\n")
        return load(*args, **settings)

    monkeypatch.setattr(onnxruntime, "InferenceSession", copying)
    with pytest.raises(EngineError, match=r"copied 1 weights of full\.onnx instead of sharing them"):
        OnTheCpu(EngineOptions(memory="shared")).load(small.bundle, [small.graphs["full"]])


def test_what_the_log_says_is_in_the_error(
    small: Small, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The engine goes on without its provider, and only its log says why."""
    load, fails = onnxruntime.InferenceSession, True

    def saying(path: str, options: Any, **_: Any) -> Any:
        os.write(2, b"\x1b[0;93m2026 [W:onnxruntime:, a.cc:1 F] Removing initializer 'w'.\x1b[m\n")
        os.write(2, b"\x1b[1;31m2026 [E:onnxruntime:Default, b.cc:2 operator()] /src/c.cc:3 ns::Provider& ns::Get() ")
        os.write(2, b"[ONNXRuntimeError] : 1 : FAIL : Failed to load library x.so\n\x1b[m\nsaid by another\n")
        session = load(path, options, providers=["CPUExecutionProvider"])
        monkeypatch.setattr(session, "get_providers", lambda: [] if fails else ["CPUExecutionProvider"])
        return session

    monkeypatch.setattr(onnxruntime, "InferenceSession", saying)
    engine, graphs = OnTheCpu(EngineOptions()), [small.graphs["full"]]
    with pytest.raises(EngineError, match=r"check that CUDA and cuDNN are there \(Failed to load library x\.so\)$"):
        engine.load(small.bundle, graphs)
    assert capfd.readouterr() == ("", "said by another\n")
    fails = False
    engine.load(small.bundle, graphs)
    assert [line[:20] for line in capfd.readouterr().err.splitlines()] == ["2026 [E:onnxruntime:", "said by another"]


def test_a_buffer_that_there_is_no_room_for_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = OnTheCpu(EngineOptions())

    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA failure 2:\nout of memory")

    monkeypatch.setattr(onnxruntime.OrtValue, "ortvalue_from_shape_and_type", fail)
    with pytest.raises(EngineError, match=r"no buffer of float32 \[2, 3\]: CUDA failure 2: out of memory"):
        engine.allocate((2, 3), "float32")
