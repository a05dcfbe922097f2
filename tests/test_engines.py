"""Every engine that runs here gives what the written-out reference gives, and refuses what it cannot do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from tests import toy_model
from tests.processor import needs_bfloat16
from tests.test_runner import GUIDANCE, compare, finished, noise, relative
from tests.tiny_families import FAMILY_VARIANTS
from tests.toy_bundle import Toy, build, make_plan, random_conditioning
from tgate_cli.inspect import memory
from tgate_cli.main import main
from tgate_engine.bundle import Bundle
from tgate_engine.errors import BundleError, EngineError
from tgate_engine.manifest import resolve
from tgate_engine.schedule import Schedule
from tgate_runtime.backends import ENGINES, Backend, EngineOptions, backend, installed
from tgate_runtime.backends.openvino import OpenVino
from tgate_runtime.backends.ort import OrtCpu
from tgate_runtime.backends.ort_cuda import OrtCuda
from tgate_runtime.binding import Binding
from tgate_runtime.runner import run
from tgate_runtime.session import Session, graphs_of
from tgate_runtime.verify import verify
from tgate_runtime.weights import map_weights

GRAPHS = ("full", "reuse_self", "reuse_cross", "reuse_both", "unguided")


class OnTheCpu(OrtCuda):
    """The CUDA engine with the CPU in place of the GPU: everything but CUDA itself."""

    provider = "CPUExecutionProvider"
    kind = "cpu"

    def providers(self, captured: bool) -> list[tuple[str, dict[str, str]]]:
        return [(self.provider, {})]


WAYS: dict[str, Callable[[], Backend]] = {
    "ort-cpu fast": lambda: OrtCpu(EngineOptions(threads=1, memory="fast")),
    "ort-cpu shared": lambda: OrtCpu(EngineOptions(threads=1, memory="shared")),
    "ort-cuda shared, on the CPU": lambda: OnTheCpu(EngineOptions(memory="shared")),
    "ort-cuda fast, on the CPU": lambda: OnTheCpu(EngineOptions(memory="fast")),
    "openvino": lambda: OpenVino(EngineOptions(threads=1, precision="f32")),
}


def opened(bundle: Bundle, engine: Backend) -> Session:
    return Session(bundle, engine, engine.load(bundle, graphs_of(bundle, graphs=GRAPHS)))


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(build(tmp_path_factory.mktemp("engines") / "toy", Toy(batch=(1, 4))))


@pytest.fixture(scope="module", params=list(WAYS))
def session(request: pytest.FixtureRequest, toy: Bundle) -> Iterator[Session]:
    with opened(toy, WAYS[request.param]()) as found:
        yield found


def schedule(**settings: Any) -> Schedule:
    return Schedule(**{"steps": 9, "gate": 5, "self_interval": 2, "warm_up": 1} | settings)


@pytest.mark.parametrize(("k", "f", "batch"), [(1, 1, 1), (2, 1, 2), (3, 2, 3)])
def test_every_step_equals_the_reference(session: Session, k: int, f: int, batch: int) -> None:
    plan = make_plan("p", schedule(self_interval=k, fidelity_interval=f), Toy(), session.manifest.graphs)
    compare(session, plan, m=5, k=k, f=f, warm_up=1, batch=batch, tolerance=1e-5)


def test_requests_in_several_threads_do_not_meet(session: Session) -> None:
    plan = make_plan("p", schedule(), Toy(), session.manifest.graphs)
    bindings = [Binding(session, plan, 1) for _ in range(4)]
    alone = [finished(binding, seed) for seed, binding in enumerate(bindings)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            together = list(pool.map(finished, bindings, range(4)))
            for got, want in zip(together, alone, strict=True):
                np.testing.assert_array_equal(got, want)


def test_one_request_after_another_at_any_batch(session: Session) -> None:
    """Buffers of a request that is over leave their addresses to those of the next, of another shape."""
    plan = make_plan("p", schedule(), Toy(), session.manifest.graphs)
    alone = {batch: finished(Binding(session, plan, batch), seed=batch) for batch in (1, 2, 3, 4)}
    for batch in (4, 1, 3, 2, 1, 4, 2):
        np.testing.assert_array_equal(finished(Binding(session, plan, batch), seed=batch), alone[batch])


def test_a_carry_outlives_steps_that_do_not_write_it(session: Session) -> None:
    """An engine that reuses memory for outputs which nobody bound must not reuse a carry's."""
    plan = make_plan("p", schedule(steps=8, gate=6, self_interval=3), Toy(), session.manifest.graphs)
    binding = Binding(session, plan, 1)
    rows = random_conditioning(1)
    before: dict[str, Any] = {}
    for done in run(binding, latents=noise(1), conditioning=rows, guidance_scale=GUIDANCE):
        now = {name: buffer.read() for name, buffer in binding.carries().items()}
        for name in before.keys() - set(done.step.writes):
            np.testing.assert_array_equal(now[name], before[name])
        before = now


def test_the_text_and_the_decoder_run_too(session: Session, toy: Bundle) -> None:
    from tgate_runtime.pipeline import Pipeline

    got = Pipeline(session)("a red cat", seed=1)
    with Pipeline.open(toy, threads=1) as pipe:
        want = pipe("a red cat", seed=1)
    assert relative(got.latents, want.latents) < 1e-5
    difference = np.asarray(got.images[0], np.int16) - np.asarray(want.images[0], np.int16)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_openvino_binds_carries_of_half_precision(tmp_path: Path, dtype: str) -> None:
    bundle = Bundle.open(build(tmp_path / "toy", Toy(carry_dtype=dtype)))
    plan = make_plan("p", schedule(), Toy(), bundle.manifest.graphs)
    with opened(bundle, WAYS["openvino"]()) as session:
        got = finished(Binding(session, plan, 2))
    rows = random_conditioning(2, seed=1)
    steps = toy_model.trajectory(
        toy_model.weights(), plan.sampler, noise(2), rows, GUIDANCE, guided=True, m=5, k=2, f=1, warm_up=1
    )
    assert relative(got, steps[-1]) < (1e-2 if dtype == "float16" else 6e-2)


@needs_bfloat16
@pytest.mark.parametrize("batch", [1, 3])
def test_openvino_in_bfloat16_takes_any_batch(toy: Bundle, batch: int) -> None:
    plan = make_plan("p", schedule(), Toy(), toy.manifest.graphs)
    with opened(toy, OpenVino(EngineOptions(threads=1, precision="bf16"))) as session:
        compare(session, plan, m=5, k=2, f=1, warm_up=1, batch=batch, tolerance=6e-2)


@needs_bfloat16
def test_the_timestep_is_not_rounded_to_bfloat16(mini_bundle: Path) -> None:
    """The network is asked at 801, whose nearest bfloat16 is 800, and at 800: it must answer differently."""
    bundle = Bundle.open(mini_bundle)
    engine = OpenVino(EngineOptions(threads=1, precision="bf16"))
    with Session(bundle, engine, engine.load(bundle, graphs_of(bundle))) as session:
        plan = bundle.manifest.plan("default")
        binding = Binding(session, plan, 1)
        specs = {t.name: t for t in bundle.manifest.graphs[plan.steps[0].graph].inputs}
        rng = np.random.default_rng(0)
        rows = {
            name: rng.standard_normal(resolve(specs[name].shape, 1)).astype(np.float32)
            for name in binding.conditioning()
        }
        start = rng.standard_normal((1, *bundle.manifest.latents)).astype(np.float32)
        outputs = []
        for timestep in (801.0, 800.0):
            step = replace(plan.steps[0], call=replace(plan.steps[0].call, timestep=timestep))
            binding.begin(start, rows)
            binding.set_step(step, 5.0)()
            outputs.append(binding.latents())
        assert not np.array_equal(outputs[0], outputs[1])


def test_openvino_says_which_precision_it_took() -> None:
    assert OpenVino(EngineOptions()).options.precision in ("f32", "bf16")
    assert OpenVino(EngineOptions(precision="f32")).options.precision == "f32"


def test_goldens_pass_on_openvino(mini_bundle: Path) -> None:
    checked = verify(Bundle.open(mini_bundle), engine="openvino", precision="f32")
    assert checked
    for golden in checked:
        assert golden.ok, golden


@pytest.mark.parametrize("variant", list(FAMILY_VARIANTS))
def test_every_family_passes_its_goldens_on_openvino(
    family_bundle: Callable[[str], tuple[Path, Path]], variant: str
) -> None:
    checked = verify(Bundle.open(family_bundle(variant)[1]), engine="openvino", precision="f32", threads=1)
    assert checked
    for golden in checked:
        assert golden.ok, golden


@needs_bfloat16
def test_bfloat16_stays_near_and_is_not_float32(mini_bundle: Path) -> None:
    checked = verify(Bundle.open(mini_bundle), engine="openvino", precision="bf16")
    errors = [golden.error for golden in checked]
    assert all(golden.ok for golden in checked), checked
    assert max(errors) > 1e-3  # bfloat16 has 8 bits of mantissa: anything finer was not computed in it


# --- what they refuse ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "options", "says"),
    [
        ("ort-cpu", {"precision": "bf16"}, "computes in the dtype that the bundle was exported with"),
        ("ort-cuda", {}, "has no CUDAExecutionProvider: pip uninstall onnxruntime"),
        ("ort-cuda", {"threads": 2}, "ort-cuda computes on a GPU; leave out --threads"),
        ("openvino", {"memory": "shared"}, "take --engine ort-cpu --memory shared"),
        ("openvino", {"device": 3}, "engine openvino runs on the CPU; leave out --device"),
        ("ort-cpu", {"architecture": "sm_90"}, "engine ort-cpu runs on the CPU; leave out --device and --architecture"),
        ("ort-cpu", {"device": -1}, "a device is a whole number from 0, got -1"),
        ("ort-cpu", {"memory": "huge"}, "memory must be one of shared, fast, got 'huge'"),
        ("openvino", {"precision": "f8"}, "precision must be one of f32, bf16, f16, got 'f8'"),
    ],
)
def test_options_that_cannot_be_followed(engine: str, options: Any, says: str) -> None:
    with pytest.raises(EngineError, match=says):
        backend(engine, **options)


@pytest.mark.parametrize("engine", ["ort-cpu", "openvino"])
def test_a_damaged_graph_is_one_line(tmp_path: Path, engine: str) -> None:
    path = build(tmp_path / "toy")
    bundle = Bundle.open(path)
    bundle.file("full.onnx").write_bytes(b"nonsense")
    with pytest.raises(EngineError, match=r"cannot load full\.onnx") as error:
        backend(engine, threads=1).load(bundle, ["full"])
    assert "\n" not in str(error.value)


def test_a_missing_engine_says_what_brings_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "tgate_runtime.backends.openvino")
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(EngineError, match=r"needs openvino, .* pip install 'tgate-engine\[openvino\]'"):
        backend("openvino")


def test_every_engine_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    found = {entry["name"]: entry for entry in installed()}
    assert list(found) == list(ENGINES)
    assert (found["ort-cpu"]["version"], found["ort-cpu"]["says"]) == (onnxruntime.__version__, "ready")
    assert found["ort-cuda"]["version"] == ""
    assert main(["engines"]) == 0
    out = capsys.readouterr().out
    assert all(name in out for name in ENGINES)


def test_an_engine_without_compilation_has_nothing_to_build(toy: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", str(toy.path), "--engine", "openvino", "--quiet"]) == 0
    assert "compiles nothing ahead of time" in capsys.readouterr().out


def test_a_weight_that_would_be_copied_is_an_error(toy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine says so in its log alone; here the log is made to say it."""
    load = onnxruntime.InferenceSession

    def copying(*args: Any, **settings: Any) -> Any:
        os.write(2, b"[W:onnxruntime:, a.cc:1 F] Cannot use user supplied initializer with name: (w) because the ORT\n")
        return load(*args, **settings)

    monkeypatch.setattr(onnxruntime, "InferenceSession", copying)
    with pytest.raises(EngineError, match=r"copied 1 weights of full\.onnx instead of sharing them"):
        OnTheCpu(EngineOptions(memory="shared")).load(toy, ["full"])


# --- ort-cuda, as far as a CPU goes -------------------------------------------------------------


def test_one_thread_works_on_the_gpu(toy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever asks: ONNX Runtime keeps a CUDA graph with its thread, and other threads' work breaks a capture."""
    plan = make_plan("p", schedule(), Toy(), toy.manifest.graphs)
    with opened(toy, OnTheCpu(EngineOptions())) as session:
        alone = [finished(Binding(session, plan, 1), seed) for seed in range(4)]
    heard: dict[str, set[int]] = {}

    def listen(cls: type, name: str) -> None:
        call = getattr(cls, name)

        def listening(*args: Any, **settings: Any) -> Any:
            heard.setdefault(name, set()).add(threading.get_ident())
            return call(*args, **settings)

        is_static = isinstance(vars(cls).get(name), staticmethod | classmethod)
        monkeypatch.setattr(cls, name, staticmethod(listening) if is_static else listening)

    for name in ("ortvalue_from_shape_and_type", "update_inplace", "numpy"):
        listen(onnxruntime.OrtValue, name)
    for name in ("__init__", "io_binding", "run_with_iobinding"):
        listen(onnxruntime.InferenceSession, name)
    with opened(toy, OnTheCpu(EngineOptions())) as session, ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda seed: finished(Binding(session, plan, 1), seed), range(4)))
    assert len(heard) == 6
    assert len(set().union(*heard.values())) == 1
    assert threading.get_ident() not in heard["__init__"]
    for got, want in zip(together, alone, strict=True):
        np.testing.assert_array_equal(got, want)


def test_only_denoising_graphs_are_captured(toy: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs around the denoiser may hold nodes without CUDA kernels, and a graph that is not captured is not run
    before it is called."""
    asked: dict[str, Any] = {}
    load, runs = onnxruntime.InferenceSession, []

    def on_the_cpu(path: str, options: Any, *, providers: Any, enable_fallback: int) -> Any:
        assert enable_fallback == 0
        asked[Path(path).stem] = providers[0][1]
        return load(path, options, providers=["CPUExecutionProvider"])

    engine = OnTheCpu(EngineOptions())
    monkeypatch.setattr(onnxruntime, "InferenceSession", on_the_cpu)
    monkeypatch.setattr(OnTheCpu, "providers", OrtCuda.providers)
    monkeypatch.setattr(load, "run_with_iobinding", lambda *args: runs.append(args))
    found = engine.load(toy, ["full", "text", "decoder"])
    assert {name: "enable_cuda_graph" in own for name, own in asked.items()} == {
        **{"full": True, "text": False, "decoder": False}
    }
    assert {own["use_tf32"] for own in asked.values()} == {"0"}
    for name, executable in found.items():
        spec = toy.manifest.graphs[name]
        ends = [{t.name: (resolve(t.shape, 1), t.dtype) for t in tensors} for tensors in (spec.inputs, spec.outputs)]
        buffers = [{name: engine.allocate(*kind) for name, kind in kinds.items()} for kinds in ends]
        before = len(runs)
        executable.bind(*buffers)
        assert len(runs) - before == (name == "full")


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


def test_what_the_log_says_is_in_the_error(
    toy: Bundle, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The engine goes on without its provider, and only its log says why."""
    load, fails = onnxruntime.InferenceSession, True

    def saying(path: str, options: Any, **_: Any) -> Any:
        os.write(2, b"\x1b[0;93m2026 [W:onnxruntime:, a.cc:1 F] Removing initializer 'w'.\x1b[m\n")
        os.write(2, b"\x1b[1;31m2026 [E:onnxruntime:Default, b.cc:2 operator()] /src/c.cc:3 ns::Provider& ns::Get() ")
        os.write(2, b"[ONNXRuntimeError] : 1 : FAIL : Failed to load library x.so\n\x1b[m\nsaid by another\n")
        found = load(path, options, providers=["CPUExecutionProvider"])
        monkeypatch.setattr(found, "get_providers", lambda: [] if fails else ["CPUExecutionProvider"])
        return found

    monkeypatch.setattr(onnxruntime, "InferenceSession", saying)
    engine = OnTheCpu(EngineOptions())
    with pytest.raises(EngineError, match=r"check that CUDA and cuDNN are there \(Failed to load library x\.so\)$"):
        engine.load(toy, ["full"])
    assert capfd.readouterr() == ("", "said by another\n")
    fails = False
    engine.load(toy, ["full"])
    assert [line[:20] for line in capfd.readouterr().err.splitlines()] == ["2026 [E:onnxruntime:", "said by another"]


def test_buffers_fail_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = OnTheCpu(EngineOptions())
    buffer = engine.allocate((2, 3), "float32")
    with pytest.raises(EngineError, match="takes float32 arrays, got float64"):
        buffer.write(np.zeros((2, 3)))

    def fail(*_: Any) -> None:
        raise RuntimeError("CUDA failure 700:\nan illegal memory access")

    for name in ("ortvalue_from_shape_and_type", "update_inplace", "numpy"):
        monkeypatch.setattr(onnxruntime.OrtValue, name, fail)
    calls: list[Callable[[], Any]] = [
        *(lambda: engine.allocate((2, 3), "float32"), lambda: buffer.write(np.zeros((2, 3), np.float32)), buffer.read)
    ]
    for call in calls:
        with pytest.raises(EngineError, match=r"buffer of float32 \[2, 3\]: CUDA failure 700: an illegal"):
            call()


# --- memory -------------------------------------------------------------------------------------


def test_the_weight_file_is_mapped_as_the_graphs_name_it(mini_bundle: Path) -> None:
    import onnx
    from onnx.external_data_helper import load_external_data_for_tensor
    from onnx.numpy_helper import to_array

    bundle = Bundle.open(mini_bundle)
    weights = map_weights(bundle.file(bundle.manifest.weights))
    model = onnx.load(bundle.file("full.onnx"), load_external_data=False)
    outside = [tensor for tensor in model.graph.initializer if tensor.external_data]
    assert len(outside) > 100
    for tensor in outside:
        load_external_data_for_tensor(tensor, str(mini_bundle))
        np.testing.assert_array_equal(weights[tensor.name].array, to_array(tensor))


@pytest.mark.parametrize("cut", [0, 4, 100])
def test_a_weight_file_that_is_cut_short(tmp_path: Path, toy: Bundle, cut: int) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(toy.file(toy.manifest.weights).read_bytes()[:cut])
    with pytest.raises(BundleError, match="is not a whole weight file"):
        map_weights(path)


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SD 1.5's own sizes at 256x256, with random weights: 3.4 GB."""
    from tgate_engine.report import Silent
    from tgate_export.build import ExportSettings, export

    path = tmp_path_factory.mktemp("sd15") / "bundle"
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
        output=path,
    )
    return export(settings, Silent())


def held(bundle: Path, *what: str) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.holds", str(bundle), *what]
    found: dict[str, int] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


@pytest.mark.slow
def test_shared_memory_holds_one_copy_of_the_weights(sd15: Path) -> None:
    """Three graphs take at most 1.3 times the proportional set size of one."""
    one = held(sd15, "graphs", "full")["after"]
    three = held(sd15, "graphs", "full", "reuse_self", "reuse_cross")["after"]
    assert one > 3 * 2**30
    assert three < 1.3 * one


@pytest.mark.slow
def test_the_memory_of_a_request_is_known_before_it_starts(sd15: Path) -> None:
    bundle = Bundle.open(sd15, check_digests=False)
    need = memory(bundle.manifest.plan("default"), bundle.manifest)
    measured = held(sd15, "plan", "default")
    taken = measured["after"] - measured["before"]
    assert need["peak"] < taken < 1.1 * need["peak"]
    # Beside the weights the engine takes more than is planned: its arena splits, and keeps what it freed.
    assert taken - need["weights"] < 3 * (need["request"] + need["scratch"])
