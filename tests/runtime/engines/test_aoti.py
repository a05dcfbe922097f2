"""AOTInductor: what is compiled once is found again, over one set of weights."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from onnx import helper
from torch._inductor import async_compile, cpp_builder
from torch._inductor.runtime import cache_dir_utils

from tests.runtime.engines.on_torch import CPU, called
from tests.runtime.engines.small import Small, assert_close, random_inputs, save, tensor
from tgate_engine.bundle import Bundle, digests_of
from tgate_engine.errors import EngineError
from tgate_runtime.cache import digest_of
from tgate_runtime.engines import aoti
from tgate_runtime.engines.aoti import Aoti, AotiExecutable, TorchBuffer
from tgate_runtime.engines.aoti import graph as graph_code
from tgate_runtime.engines.aoti.inductor import flags, start_compilers, working_in
from tgate_runtime.engines.aoti.operators import OPERATORS
from tgate_runtime.engines.protocol import EngineOptions

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="these are the numbers of a CPU")


@pytest.fixture(scope="module")
def loaded(small: Small, shared_cache: Path) -> dict[str, AotiExecutable]:
    """The small bundle's graphs, by name; compiled here or by test_every_engine.py, nowhere else unless a test says
    so."""
    files = Aoti(EngineOptions(threads=1)).load(small.bundle, tuple(small.graphs.values()))
    return {name: files[spec.file] for name, spec in small.graphs.items()}


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something was compiled")

    monkeypatch.setattr(torch._inductor, "aot_compile", refuse)


# --- weights ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("loaded", "no_compiler")
def test_other_weights_of_the_same_structure_need_no_compilation(tmp_path: Path) -> None:
    other = Small(tmp_path / "bundle", seed=5)
    graphs = Aoti(EngineOptions(build=False)).load(other.bundle, tuple(other.graphs.values()))
    for name, spec in other.graphs.items():
        inputs = random_inputs(spec, 2)
        assert_close(spec, called(graphs[spec.file], inputs), other.expected(name, inputs))


class Short(torch.nn.Module):
    """Weights that Inductor writes into the code if it may: short ones, and ones of a single number."""

    def __init__(self, make: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.register_buffer("scale", make(8))
        self.register_buffer("bias", make(8))
        self.register_buffer("matrix", make(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.layer_norm(x, (8,), self.scale, self.bias) * self.matrix.mT[None]


def test_weights_never_become_code(tmp_path: Path) -> None:
    x, other = torch.randn(8, 8), Short(torch.randn)
    program = torch.export.export(Short(torch.ones), (x,))
    path = str(tmp_path / "short.pt2")
    torch._inductor.aoti_compile_and_package(program, package_path=path, inductor_configs=flags(channels_last=False))
    model = torch._inductor.aoti_load_package(path)
    model.load_constants(dict(other.named_buffers()), check_full_update=True, user_managed=True)
    torch.testing.assert_close(model(x), other(x))


def test_graphs_read_the_same_memory(loaded: dict[str, AotiExecutable]) -> None:
    full, reuse = ({c.data_ptr() for c in loaded[name].constants.values()} for name in ("full", "reuse"))
    assert len(full & reuse) >= 2
    assert len(reuse - full) <= 1  # a constant of its own at most


def test_an_entry_holds_no_weights(small: Small, loaded: dict[str, AotiExecutable]) -> None:
    (entry,) = Aoti(EngineOptions()).build(small.bundle, [small.graphs["full"]]).values()
    content = (entry / "graph.so").read_bytes()
    for values in small.weights.values():
        assert values.tobytes()[:32] not in content
    assert sorted(file.name for file in entry.iterdir()) == [
        "constants.safetensors",
        "entry.json",
        "graph.so",
        "weights.json",
    ]


def test_carries_of_bfloat16_and_products_of_bfloat16(tmp_path: Path, shared_cache: Path) -> None:
    half = Small(tmp_path / "bundle", batch=(1, 1), carry_dtype="bfloat16")
    spec = half.graphs["reuse"]
    graph = Aoti(EngineOptions(precision="bf16", threads=1)).load(half.bundle, [spec])[spec.file]
    inputs = random_inputs(spec, 1)
    got, want = called(graph, inputs), half.expected("reuse", inputs)
    assert_close(spec, got, want, 5e-2)
    assert np.abs(got["output"] - want["output"]).max() > 1e-4 * np.abs(want["output"]).max()


def test_float16_is_for_the_denoiser_alone(small: Small) -> None:
    """Text encoders and decoders overflow in it."""
    engine = Aoti(EngineOptions())
    engine.options = EngineOptions(precision="f16", memory="shared")
    narrowed = {name: engine._compute(small.bundle, spec) for name, spec in small.graphs.items()}
    assert narrowed == {"full": torch.float16, "reuse": torch.float16, "text": None, "decoder": None}
    engine.options = EngineOptions(precision="bf16", memory="shared")
    assert {engine._compute(small.bundle, spec) for spec in small.graphs.values()} == {torch.bfloat16}


# --- the cache ----------------------------------------------------------------------------------


def test_a_damaged_entry_is_built_again(
    small: Small,
    loaded: dict[str, AotiExecutable],
    shared_cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(shared_cache, tmp_path / "cache")
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path / "cache"))
    engine, decoder, text = Aoti(EngineOptions(threads=1)), small.graphs["decoder"], small.graphs["text"]
    (entry,) = engine.build(small.bundle, [decoder]).values()
    raw = bytearray((entry / "graph.so").read_bytes())
    raw[len(raw) // 2] ^= 1
    (entry / "graph.so").write_bytes(raw)
    heard: list[str] = []
    graphs = engine.load(small.bundle, [decoder, text], lambda *news: heard.append("{}/{} {}".format(*news)))
    assert heard == ["0/1 decoder", "1/1 decoder"]
    inputs = random_inputs(decoder, 1)
    np.testing.assert_array_equal(
        called(graphs[decoder.file], inputs)["image"], called(loaded["decoder"], inputs)["image"]
    )


@pytest.mark.usefixtures("no_compiler")
def test_without_leave_to_build(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path))
    says = r"engine aoti has not compiled .*: full\.onnx, text\.onnx; run tgate build .* --engine aoti"
    with pytest.raises(EngineError, match=says):
        Aoti(EngineOptions(build=False)).load(small.bundle, [small.graphs["full"], small.graphs["text"]])


def test_the_key_is_what_a_graph_is_compiled_from(small: Small, tmp_path: Path, shared_cache: Path) -> None:
    def key(of: Small, **options: Any) -> dict[str, Any]:
        engine = Aoti(EngineOptions(**options))
        return engine._key(of.bundle, of.graphs["full"], engine._weights(of.bundle))

    own = key(small)
    assert key(Small(tmp_path / "weights", seed=5)) == own
    others = [key(Small(tmp_path / "batch", batch=(1, 2))), key(small, precision="bf16")]
    assert [sorted(name for name in own if other[name] != own[name]) for other in others] == [["batch"], ["compute"]]


def test_the_order_of_outputs_is_part_of_the_key(small: Small, shared_cache: Path) -> None:
    """They are returned by place: a bundle that lists them in another order is another library."""
    engine = Aoti(EngineOptions())
    weights, spec = engine._weights(small.bundle), small.graphs["full"]
    keys = [
        engine._key(small.bundle, each, weights)
        for each in (
            spec,
            replace(spec, outputs=spec.outputs[::-1]),
            replace(spec, outputs=spec.outputs[:1]),
            replace(spec, inputs=spec.inputs[::-1]),
        )
    ]
    assert len({digest_of(key) for key in keys}) == len(keys)


def test_the_graph_is_part_of_the_key_and_not_what_the_manifest_says_of_it(tmp_path: Path, shared_cache: Path) -> None:
    """A bundle that is opened without checking digests could take, or leave, the entry of another."""
    mine, theirs = Small(tmp_path / "mine"), Small(tmp_path / "theirs")
    spec = mine.graphs["full"]
    (tmp_path / "theirs" / spec.file).write_bytes((tmp_path / "mine" / "reuse.onnx").read_bytes())
    assert mine.bundle.manifest.files == theirs.bundle.manifest.files
    engine = Aoti(EngineOptions())
    keys = [engine._key(of.bundle, spec, engine._weights(of.bundle)) for of in (mine, theirs)]
    assert [name for name in keys[0] if keys[0][name] != keys[1][name]] == ["graph"]


@pytest.mark.parametrize("before", [None, "/somewhere"])
def test_compilers_work_where_nobody_else_can_reach(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: str | None
) -> None:
    """By default it is /tmp/torchinductor_<user>, which a stranger can make first, and whose libraries are loaded."""
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path / "cache"))
    names = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "TMPDIR")
    for name in names:
        monkeypatch.setenv(name, before) if before else monkeypatch.delenv(name, raising=False)
    seen: list[Path] = []

    def look(*_: Any, options: dict[str, Any], **__: Any) -> list[str]:
        seen.extend(map(Path, (cache_dir_utils.cache_dir(), cache_dir_utils.triton_cache_dir(0), os.environ["TMPDIR"])))
        assert not options["aot_inductor.precompile_headers"]  # they lie where the environment does not reach
        (seen[0] / "half").write_text("half")
        raise RuntimeError("out of luck")

    monkeypatch.setattr(torch._inductor, "aot_compile", look)
    temporary = tempfile.gettempdir()
    with pytest.raises(EngineError, match="out of luck"):
        Aoti(EngineOptions()).load(small.bundle, [small.graphs["decoder"]])
    stage, work = seen[0].parent, seen[0]
    assert stage.parent == tmp_path / "cache"
    assert seen == [work] * 3
    assert [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()] == []
    assert [os.environ.get(name) for name in names] == [before] * 3
    assert tempfile.gettempdir() == temporary


@pytest.mark.slow
def test_the_processes_that_compile_begin_anew_in_each_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's kernels are compiled by processes that stay, and would go on to a directory that is gone."""
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 2)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        with working_in(tmp_path / name):
            start_compilers()  # none where Triton is not installed
            told = async_compile.AsyncCompile.process_pool().submit(tempfile.gettempdir).result(60)
        assert told == str(tmp_path / name)
        (tmp_path / name).rmdir()


FULL = """
import sys
from pathlib import Path
from tests.runtime.engines.small import Small
from tgate_engine.errors import EngineError
from tgate_runtime.engines.aoti import Aoti
from tgate_runtime.engines.protocol import EngineOptions

small = Small(Path(sys.argv[1]))
try:
    Aoti(EngineOptions(threads=1)).build(small.bundle, [small.graphs["decoder"]])
except EngineError as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small file system")
@pytest.mark.slow
def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    """An archive's writer used to end the process. The compilers find no space either, and write nowhere else."""
    disk, temporary = tmp_path / "disk", tmp_path / "temporary"
    disk.mkdir()
    temporary.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k,mode=700", "none", disk], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        ended = subprocess.run(
            [sys.executable, "-c", FULL, str(tmp_path / "bundle")],
            env={
                **os.environ,
                "TGATE_CACHE": str(disk / "cache"),
                "TMPDIR": str(temporary),
                "TORCHINDUCTOR_VEC_ISA_OK": "1",  # not tried out, which takes several compilations
            },
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert ended.returncode == 0, ended.stderr
        assert ended.stdout.startswith(f"there is no space left in the engine cache {disk / 'cache'}; free some")
        assert ended.stdout.count("\n") == 1
        assert [path.suffix for path in (disk / "cache").iterdir()] == [".lock"]
        assert list(temporary.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_an_operator_that_inductor_has_no_code_for(
    small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is left to PyTorch: the library finds its name in a list that lies beside it."""
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(graph_code, "OPERATORS", {**OPERATORS, "Round": lambda _, x: torch.linalg.matrix_exp(x)})
    x, y = (tensor(name, 3, 3) for name in "xy")
    file = tmp_path / "bundle" / "odd.onnx"
    bundle = Small(tmp_path / "bundle").bundle
    spec = save(file, [helper.make_node("Round", ["x"], ["y"])], [x], [y], batch=(1, 1))
    bundle = Bundle(bundle.path, replace(bundle.manifest, files=digests_of(bundle.path)))
    graph = Aoti(EngineOptions(threads=1)).load(bundle, [spec])[spec.file]
    values = np.array([[0, 1, 0], [0, 0, 2], [0, 0, 0]], np.float32)
    np.testing.assert_allclose(called(graph, {"x": values})["y"], [[1, 1, 1], [0, 1, 2], [0, 0, 1]], atol=1e-6)


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
    settings = flags(channels_last=False)
    assert settings["aot_inductor.compile_wrapper_opt_level"] == "O0"
    assert "aot_inductor.enable_line_tables" not in settings
    assert settings["always_keep_tensor_constants"]  # what results depend on is never left out


def test_float32_is_float32_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    assert Aoti(EngineOptions(device=1)).device == torch.device("cuda", 1)
    assert not torch.backends.cudnn.allow_tf32
    with pytest.raises(EngineError, match="there is no GPU 2; PyTorch sees 2"):
        Aoti(EngineOptions(device=2))


def test_a_machine_without_a_compiler(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path))

    def absent() -> str:
        raise RuntimeError("No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')\nmore")

    monkeypatch.setattr(cpp_builder, "get_cpp_compiler", absent)
    with pytest.raises(EngineError, match=r"finds none: install g\+\+ or set CXX") as error:
        Aoti(EngineOptions()).load(small.bundle, [small.graphs["decoder"]])
    assert "\n" not in str(error.value)


def test_what_pytorch_cannot_compile_is_one_line(small: Small, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path))

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("\n\nout of luck\nand a long trace")

    monkeypatch.setattr(torch._inductor, "aot_compile", fail)
    with pytest.raises(EngineError, match=r"cannot compile decoder\.onnx: RuntimeError: out of luck$"):
        Aoti(EngineOptions()).load(small.bundle, [small.graphs["decoder"]])
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


def test_a_tensor_that_a_kernel_could_not_read_is_copied() -> None:
    """On a GPU alone: a CPU reads any address."""
    tensor = torch.arange(8.0)
    assert aoti._aligned(tensor[1:]).data_ptr() == tensor[1:].data_ptr()
    copy = SimpleNamespace()
    for address, want in ((32, None), (36, copy)):
        stand_in = SimpleNamespace(is_cuda=True, data_ptr=lambda address=address: address, clone=lambda: copy)
        assert aoti._aligned(stand_in) is (want or stand_in)


def test_the_tensor_of_a_view_is_contiguous_and_the_same_memory() -> None:
    buffer = TorchBuffer.zeros((5, 3), "float32", CPU)
    view = buffer.rows(2, 2)
    assert view.tensor.is_contiguous()
    assert view.address == view.tensor.data_ptr() == buffer.tensor[2:].data_ptr()
