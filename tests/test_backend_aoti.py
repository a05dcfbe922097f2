"""AOTInductor: what is compiled once is found again, over one set of weights."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch._inductor import cpp_builder

from tests import toy_model
from tests.test_aoti_graph import by_onnxruntime, random_inputs, same
from tests.toy_bundle import Toy, build
from tgate_engine.bundle import Bundle
from tgate_engine.errors import EngineError
from tgate_engine.manifest import GraphSpec, resolve
from tgate_runtime.backends import EngineOptions
from tgate_runtime.backends.aoti import Aoti, AotiExecutable, TorchBuffer
from tgate_runtime.session import graphs_of
from tgate_runtime.verify import verify

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these are the numbers of a CPU")


@pytest.fixture(scope="module")
def cache_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        path = tmp_path_factory.mktemp("cache")
        patch.setenv("TGATE_CACHE", str(path))
        yield path


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(build(tmp_path_factory.mktemp("aoti") / "toy", Toy(batch=(1, 3))))


@pytest.fixture(scope="module")
def loaded(toy: Bundle, cache_directory: Path) -> dict[str, AotiExecutable]:
    """Every graph that the toy's plan takes; compiled here, and nowhere else unless a test says so."""
    heard: list[tuple[int, int, str]] = []
    names = graphs_of(toy)
    found = Aoti(EngineOptions()).load(toy, names, lambda *news: heard.append(news))
    assert [(done, total) for done, total, _ in heard] == [(i, len(names)) for i in range(len(names) + 1)]
    assert tuple(name for _, _, name in heard[:-1]) == names
    return found


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was compiled")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", refuse)


def called(graph: AotiExecutable, inputs: dict[str, NDArray[Any]], batch: int) -> list[NDArray[Any]]:
    spec = graph.spec
    buffers = {t.name: TorchBuffer(resolve(t.shape, batch), t.dtype, torch.device("cpu")) for t in ends(spec)}
    for name, values in inputs.items():
        buffers[name].write(values)
    graph.bind({n: buffers[n] for n in spec.input_names()}, {n: buffers[n] for n in spec.output_names()})()
    return [buffers[name].read() for name in spec.output_names()]


def ends(spec: GraphSpec) -> tuple[Any, ...]:
    return (*spec.inputs, *spec.outputs)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_every_graph_gives_what_onnxruntime_gives(toy: Bundle, loaded: dict[str, AotiExecutable], batch: int) -> None:
    for graph in loaded.values():
        inputs = random_inputs(graph.spec, batch)
        same(graph.spec, called(graph, inputs, batch), by_onnxruntime(toy, graph.spec, inputs), 1e-5)


@pytest.mark.usefixtures("loaded", "no_compiler")
def test_goldens_pass_and_nothing_is_compiled_again(toy: Bundle) -> None:
    checked = verify(toy, engine="aoti")
    assert len(checked) == 2
    assert all(golden.ok for golden in checked), checked


@pytest.mark.usefixtures("loaded", "no_compiler")
def test_other_weights_of_the_same_structure_need_no_compilation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = {name: np.ones_like(values) for name, values in toy_model.weights().items()}
    monkeypatch.setattr(toy_model, "weights", lambda: weights)
    other = Bundle.open(build(tmp_path / "toy", Toy(batch=(1, 3))))
    for graph in Aoti(EngineOptions(build=False)).load(other, graphs_of(other)).values():
        inputs = random_inputs(graph.spec, 2)
        same(graph.spec, called(graph, inputs, 2), by_onnxruntime(other, graph.spec, inputs), 1e-5)


class Small(torch.nn.Module):
    """Weights that Inductor writes into the code if it may: short ones, and ones of a single number."""

    def __init__(self, make: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.register_buffer("scale", make(8))
        self.register_buffer("bias", make(8))
        self.register_buffer("matrix", make(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, (8,), self.scale, self.bias) * self.matrix.mT[None]


def test_weights_never_become_code(tmp_path: Path) -> None:
    x, other = torch.randn(8, 8), Small(torch.randn)
    program = torch.export.export(Small(torch.ones), (x,))
    path = str(tmp_path / "small.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=Aoti(EngineOptions()).flags())
    model = torch._inductor.aoti_load_package(path)
    model.load_constants(dict(other.named_buffers()), check_full_update=True, user_managed=True)
    torch.testing.assert_close(model(x), other(x))


def test_graphs_read_the_same_memory(loaded: dict[str, AotiExecutable]) -> None:
    full, reuse = ({c.data_ptr() for c in loaded[name].constants.values()} for name in ("full", "reuse_cross"))
    assert len(full & reuse) >= 4
    assert len(reuse - full) <= 1  # a constant of its own at most


def test_a_call_reads_its_inputs_in_place(toy: Bundle, loaded: dict[str, AotiExecutable]) -> None:
    engine, graph = Aoti(EngineOptions()), loaded["decoder"]
    latents = engine.allocate((1, *toy_model.LATENTS), "float32")
    image = engine.allocate(graph.spec.outputs[0].shape, "uint8")  # type: ignore[arg-type]
    call = graph.bind({"latents": latents}, {"image": image})
    assert dict(call.addresses) == {"latents": latents.address, "image": image.address}
    call()
    before = image.read()
    latents.tensor.fill_(2.0)
    call()
    assert (image.read() != before).any()


def test_threads_do_not_meet(loaded: dict[str, AotiExecutable]) -> None:
    graph = loaded["full"]
    inputs = [
        random_inputs(graph.spec, 1) | {"latents": np.full((1, *toy_model.LATENTS), i, np.float32)} for i in range(4)
    ]
    alone = [called(graph, each, 1) for each in inputs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda each: called(graph, each, 1), inputs * 5))
    for i, found in enumerate(together):
        for got, want in zip(found, alone[i % 4], strict=True):
            # How many threads share a loop differs between callers, and with it the order of sums.
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_carries_of_bfloat16_and_products_of_bfloat16(tmp_path: Path, cache_directory: Path) -> None:
    toy = Bundle.open(build(tmp_path / "toy", Toy(batch=(1, 1), carry_dtype="bfloat16")))
    graph = Aoti(EngineOptions(precision="bf16")).load(toy, ["reuse_cross"])["reuse_cross"]
    spec = toy.manifest.graphs["reuse_cross"]
    rng = np.random.default_rng(1)
    inputs: dict[str, NDArray[Any]] = {}
    for tensor in spec.inputs:
        values = rng.standard_normal(resolve(tensor.shape, 1)).astype(np.float32)
        inputs[tensor.name] = (values.view(np.uint32) >> 16).astype(np.uint16) if tensor.dtype == "bfloat16" else values
    got = dict(zip(spec.output_names(), called(graph, inputs, 1), strict=True))
    exact = Aoti(EngineOptions()).load(toy, ["reuse_cross"])["reuse_cross"]
    want = dict(zip(spec.output_names(), called(exact, inputs, 1), strict=True))
    assert {name: values.dtype for name, values in got.items()} == {name: v.dtype for name, v in want.items()}
    error = np.abs(got["output"] - want["output"]).max() / np.abs(want["output"]).max()
    assert 1e-4 < error < 5e-2


# --- the cache ----------------------------------------------------------------------------------


def test_a_damaged_entry_is_built_again(
    toy: Bundle,
    loaded: dict[str, AotiExecutable],
    cache_directory: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(cache_directory, tmp_path / "cache")
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path / "cache"))
    engine = Aoti(EngineOptions())
    entry = engine.build(toy, ["decoder"])["decoder"]
    raw = bytearray((entry / "graph.pt2").read_bytes())
    raw[len(raw) // 2] ^= 1
    (entry / "graph.pt2").write_bytes(raw)
    heard: list[str] = []
    found = engine.load(toy, ["decoder", "text"], lambda done, total, name: heard.append(f"{done}/{total} {name}"))
    assert heard == ["0/1 decoder", "1/1 decoder"]
    inputs = random_inputs(loaded["decoder"].spec, 1)
    np.testing.assert_array_equal(called(found["decoder"], inputs, 1)[0], called(loaded["decoder"], inputs, 1)[0])


def test_the_package_holds_no_weights(toy: Bundle, loaded: dict[str, AotiExecutable]) -> None:
    entry = Aoti(EngineOptions()).build(toy, ["full"])["full"]
    content = (entry / "graph.pt2").read_bytes()
    for values in toy_model.weights().values():
        assert values.tobytes()[:32] not in content
    assert sorted(file.name for file in entry.iterdir()) == [
        "constants.safetensors",
        "entry.json",
        "graph.pt2",
        "weights.json",
    ]


@pytest.mark.usefixtures("no_compiler")
def test_without_leave_to_build(toy: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path))
    with pytest.raises(EngineError, match=r"graphs full, text .* are not compiled .*: tgate build .* --engine aoti"):
        Aoti(EngineOptions(build=False)).load(toy, ["full", "text"])


# --- what it refuses ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (EngineOptions(memory="fast"), "always keeps one copy of the weights"),
        (EngineOptions(architecture="sm_90"), "compiles for the machine it runs on"),
        (EngineOptions(precision="f16"), "f16 on a GPU alone"),
        (EngineOptions(device=1), "there is no GPU 1; PyTorch sees 0"),
    ],
)
def test_options_it_cannot_follow(options: EngineOptions, says: str) -> None:
    with pytest.raises(EngineError, match=says):
        Aoti(options)


def test_options_are_settled() -> None:
    engine = Aoti(EngineOptions(precision="f32"))
    assert (engine.name, engine.version, engine.options.memory) == ("aoti", torch.__version__, "shared")


def test_flags_that_this_pytorch_has_not_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch 2.11 has no enable_line_tables, and raises for settings that it does not know."""
    monkeypatch.setattr(torch._inductor, "config", SimpleNamespace(**{"aot_inductor.compile_wrapper_opt_level": "O1"}))
    flags = Aoti(EngineOptions()).flags()
    assert flags["aot_inductor.compile_wrapper_opt_level"] == "O0"
    assert "aot_inductor.enable_line_tables" not in flags
    assert flags["always_keep_tensor_constants"]  # what results depend on is never left out


def test_float32_is_float32_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert Aoti(EngineOptions(device=1)).device == torch.device("cuda", 1)
    assert not torch.backends.cudnn.allow_tf32
    with pytest.raises(EngineError, match="there is no GPU 2; PyTorch sees 2"):
        Aoti(EngineOptions(device=2))


def test_a_machine_without_a_compiler(toy: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path))

    def absent() -> str:
        raise RuntimeError("No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')\nmore")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", absent)
    with pytest.raises(EngineError, match=r"finds none: install g\+\+ or set CXX") as error:
        Aoti(EngineOptions()).load(toy, ["decoder"])
    assert "\n" not in str(error.value)


def test_what_pytorch_cannot_compile_is_one_line(toy: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path))

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("\n\nout of luck\nand a long trace")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", fail)
    with pytest.raises(EngineError, match=r"cannot compile decoder\.onnx: RuntimeError: out of luck$"):
        Aoti(EngineOptions()).load(toy, ["decoder"])
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_buffers_of_other_shapes_are_refused(loaded: dict[str, AotiExecutable]) -> None:
    graph = loaded["full"]
    make = functools.partial(TorchBuffer, device=torch.device("cpu"))
    inputs = {t.name: make(resolve(t.shape, 2), t.dtype) for t in graph.spec.inputs}
    outputs = {"output": make((2, *toy_model.LATENTS), "float32")}
    graph.bind(inputs, outputs)()
    for name, shape in (("latents.1", (1, *toy_model.LATENTS)), ("step", (2, 3))):
        with pytest.raises(EngineError, match=rf"{name} is .* got a buffer of"):
            graph.bind(inputs | {name: make(shape, "float32")}, outputs)
    large = {t.name: make(resolve(t.shape, 4), t.dtype) for t in graph.spec.inputs}
    with pytest.raises(EngineError, match="for 1 to 3 images"):
        graph.bind(large, {"output": make((4, *toy_model.LATENTS), "float32")})


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16", "int64", "uint8"])
@pytest.mark.parametrize("shape", [(1,), (3, 5), ()])
def test_buffers_are_aligned_zeroed_and_fixed(dtype: str, shape: tuple[int, ...]) -> None:
    buffer = Aoti(EngineOptions()).allocate(shape, dtype)
    assert buffer.address % 64 == 0
    assert not buffer.read().any()
    values = np.ones(shape, buffer.read().dtype)
    buffer.write(values)
    copy = buffer.read()
    np.testing.assert_array_equal(copy, values)
    copy[...] = 0
    np.testing.assert_array_equal(buffer.read(), values)
    assert buffer.address == buffer.tensor.data_ptr()


def test_a_buffer_takes_only_what_fits() -> None:
    buffer = Aoti(EngineOptions()).allocate((2, 3), "bfloat16")
    with pytest.raises(EngineError, match="bfloat16 takes uint16 arrays, got float32"):
        buffer.write(np.zeros((2, 3), np.float32))
    with pytest.raises(EngineError, match=r"shape \(2, 3\) takes no array of shape \(2, 4\)"):
        buffer.write(np.zeros((2, 4), np.uint16))
    buffer.write(np.ones(1, np.uint16))
    assert buffer.read().all()


@pytest.mark.slow
@pytest.mark.usefixtures("cache_directory")
def test_goldens_pass_on_the_small_sdxl(mini_bundle: Path) -> None:
    checked = verify(Bundle.open(mini_bundle), engine="aoti")
    assert checked
    assert all(golden.ok for golden in checked), checked
