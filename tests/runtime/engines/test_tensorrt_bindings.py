"""The engine on the bindings of TensorRT itself: that all it names and calls is there. TensorRT is not."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from onnx import helper

from tests.runtime.engines.bindings import Like, fitting, in_place_of_rtx, loaded, maker, named
from tests.runtime.engines.fake_gpu import FakeGpu
from tests.runtime.engines.small import Small, save, tensor
from tgate_engine.errors import EngineError
from tgate_engine.graph import BATCH, GraphSpec
from tgate_runtime.engines.protocol import EngineOptions

pytest.importorskip("polygraphy")
pytest.importorskip("cuda.bindings")
pytest.importorskip("tensorrt_rtx", reason="the engine is imported with it first, and put back")

Calls = list[tuple[str, tuple[Any, ...]]]
# What TensorRT-RTX alone has, asked for where it is there alone.
RTX_ONLY = {"DynamicShapesKernelSpecializationStrategy", "ComputeCapability"}


@pytest.fixture(scope="module")
def trt(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return loaded(tmp_path_factory.mktemp("stub"))


@pytest.fixture(scope="module")
def engine(trt: Any) -> Iterator[Any]:
    """The engine's package, on those bindings."""
    with in_place_of_rtx(trt) as package:
        yield package


@pytest.fixture
def gpu(engine: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeGpu:
    monkeypatch.setenv("TGATE_CACHE", str(tmp_path / "cache"))
    fake = FakeGpu()
    fake.install(monkeypatch, engine.cuda.cuda)
    hopper = {"cudaDevAttrComputeCapabilityMajor": 9, "cudaDevAttrComputeCapabilityMinor": 0}
    monkeypatch.setattr(engine.cuda.cuda, "cudaDeviceGetAttribute", lambda name, _device: (0, hopper[name.name]))
    return fake


def stand_ins(engine: Any, monkeypatch: pytest.MonkeyPatch, answers: Mapping[str, Any], calls: Calls) -> Calls:
    """What the engine makes objects of, replaced; gives the list that collects their calls."""
    for name in ("Builder", "OnnxParser", "Runtime", "Refitter", "OnnxParserRefitter"):
        monkeypatch.setattr(engine.trt, name, maker(getattr(engine.trt, name), answers, calls))
    return calls


def answers_of(trt: Any, spec: GraphSpec, more: Iterable[str]) -> dict[str, Any]:
    """What TensorRT would say of the engine of a graph in float32 that takes ``more`` besides."""
    inputs = {each.name for each in spec.inputs} | {*more}
    tensors = sorted(inputs | {each.name for each in spec.outputs})
    return {
        "Builder.build_serialized_network": b"plan",
        "OnnxParser.num_errors": 0,
        "INetworkDefinition.num_inputs": 0,
        "INetworkDefinition.num_outputs": 0,
        "INetworkDefinition.num_layers": 0,
        "ICudaEngine.num_io_tensors": len(tensors),
        "ICudaEngine.get_tensor_name": lambda index: tensors[index],
        "ICudaEngine.get_tensor_dtype": trt.DataType.FLOAT,
        "ICudaEngine.get_tensor_mode": lambda name: (
            trt.TensorIOMode.INPUT if name in inputs else trt.TensorIOMode.OUTPUT
        ),
        "ICudaEngine.device_memory_size_v2": 4096,
        "Refitter.get_missing_weights": ["w.self"],
    }


# --- what is there ------------------------------------------------------------------------------


def test_the_bindings_have_all_that_the_engine_names(trt: Any, engine: Any) -> None:
    names = set(named(engine))
    assert {"Runtime", "OnnxParserRefitter", "TempfileControlFlag.ALLOW_IN_MEMORY_FILES"} < names
    missing = {name for name in names if not _there(trt, name)}
    assert missing == RTX_ONLY


def _there(trt: Any, name: str) -> bool:
    first, _, second = name.partition(".")
    return hasattr(trt, first) and (not second or hasattr(getattr(trt, first), second))


def test_the_builder_has_every_flag(trt: Any, engine: Any) -> None:
    assert not engine.RTX
    for memory in ("shared", "fast"):
        assert engine.flags(EngineOptions(memory=memory)).keys() <= trt.BuilderFlag.__members__.keys()


def test_the_reason_for_identical_weights_is_as_the_docs_say(trt: Any) -> None:
    """A plan that is stripped and has no word of how it is refitted takes REFIT_IDENTICAL, and networks are typed."""
    assert "REFIT_IDENTICAL is enabled by default" in trt.BuilderFlag.__doc__
    assert "Strongly typed mode is always enabled" in trt.NetworkDefinitionCreationFlag.__doc__


def test_a_stand_in_takes_no_more_than_the_class(trt: Any) -> None:
    calls: Calls = []
    context = Like(trt.IExecutionContext, {}, calls)
    assert context.set_input_shape("x", (1, 3)) is True
    assert calls == [("IExecutionContext.set_input_shape", ("x", (1, 3)))]
    with pytest.raises(AttributeError, match="IExecutionContext has no execute_v3"):
        context.execute_v3(0)
    with pytest.raises(AttributeError, match="has no engine that can be set"):
        context.engine = None
    for wrong in ((), ("x",), ("x", (1,), 2)):
        with pytest.raises(TypeError, match="no signature takes"):
            context.set_input_shape(*wrong)
    with pytest.raises(TypeError, match=r"no signature takes 1 arguments and \['form'\]"):
        context.set_input_shape(form=1)
    assert fitting("f(self: A, b: B, c: C = <D.E: 0>) -> None", None, 1) == "(self: A, b: B, c: C = <D.E: 0>) -> None"


# --- what is called -----------------------------------------------------------------------------


@pytest.mark.parametrize("memory", ["shared", "fast"])
def test_a_graph_is_built(engine: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str) -> None:
    """By Polygraphy, which TensorRT 11 took names away from."""
    trt, shape = engine.trt, (BATCH, 2, 16, 8)
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"])
    spec = save(tmp_path / "a.onnx", [node], [tensor(n, *shape) for n in "qkv"], [tensor("y", *shape)], batch=(1, 4))
    calls: Calls = []

    def takes(index: int) -> Like:
        own = {"name": "qkv"[index], "shape": (-1, 2, 16, 8), "is_shape_tensor": False}
        return Like(trt.ITensor, {f"ITensor.{name}": value for name, value in own.items()}, calls)

    answers = answers_of(trt, spec, ()) | {
        "INetworkDefinition.num_inputs": 3,
        "INetworkDefinition.get_input": takes,
        "INetworkDefinition.num_layers": 1,
        "ILayer.type": trt.LayerType.ATTENTION_INPUT,
    }
    stand_ins(engine, monkeypatch, answers, calls)
    options = EngineOptions(memory=memory)
    assert engine.build_engine(tmp_path / "a.onnx", spec, options) == b"plan"
    # The last word on each flag: Polygraphy has one before.
    changes = {"IBuilderConfig.set_flag": True, "IBuilderConfig.clear_flag": False}
    last = {args[0]: changes[key] for key, args in calls if key in changes}
    assert {name: last[getattr(trt.BuilderFlag, name)] for name in engine.flags(options)} == engine.flags(options)
    assert ("IAttention.decomposable", (True,)) in calls
    profiled = [args for key, args in calls if key == "IOptimizationProfile.set_shape"]
    assert [(name, *map(tuple, shapes)) for name, *shapes in profiled] == [
        (name, (1, 2, 16, 8), (4, 2, 16, 8), (4, 2, 16, 8)) for name in "qkv"
    ]


@pytest.mark.parametrize("memory", ["shared", "fast"])
def test_a_bundle_is_built_loaded_and_called(
    engine: Any, gpu: FakeGpu, small: Small, monkeypatch: pytest.MonkeyPatch, memory: str
) -> None:
    trt, spec = engine.trt, small.graphs["full"]
    weights = engine.weight_spans(engine.read_model(small.bundle.file(spec.file))) if memory == "shared" else {}
    answers = answers_of(trt, spec, weights)
    calls = stand_ins(engine, monkeypatch, answers, [])
    own = engine.TensorRt(EngineOptions(memory=memory))
    executable = own.load(small.bundle, [spec])[spec.file]
    shapes = {each.name: each.resolve(2) for each in (*spec.inputs, *spec.outputs)}
    buffers = {name: own.allocate(shape, "float32") for name, shape in shapes.items()}
    outputs = {name: buffers[name] for name in spec.output_names()}
    call = executable.bind({name: buffers[name] for name in spec.input_names()}, outputs)
    call()
    call()
    of = {key: [args for other, args in calls if other == key] for key, _ in calls}
    assert of["Runtime.deserialize_cuda_engine"] == [(b"plan",)]
    addresses: dict[str, int] = dict(of["IExecutionContext.set_tensor_address"])
    assert addresses.keys() == shapes.keys() | weights.keys()
    assert {name: addresses[name] for name in shapes} == {name: buffer.address for name, buffer in buffers.items()}
    assert dict(of["IExecutionContext.set_input_shape"]) == {name: shapes[name] for name in spec.input_names()}
    assert [size for _, size in of["IExecutionContext.set_device_memory"]] == [4096]
    assert len(of["IExecutionContext.execute_async_v3"]) == 2  # a run to warm up, and one that is recorded
    assert gpu.launches == 1
    strategy = trt.ExecutionContextAllocationStrategy.USER_MANAGED
    assert of["IRuntimeConfig.set_execution_context_allocation_strategy"] == [(strategy,)]
    path = str(small.bundle.file(spec.file))
    assert of.get("OnnxParserRefitter.refit_from_file", []) == ([(path,)] if memory == "fast" else [])
    assert len(of.get("Refitter.refit_cuda_engine", [])) == (memory == "fast")


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("fails", ["OnnxParserRefitter.refit_from_file", "Refitter.refit_cuda_engine"])
def test_weights_that_are_missing_are_named(
    engine: Any, small: Small, monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    spec = small.graphs["full"]
    stand_ins(engine, monkeypatch, answers_of(engine.trt, spec, ()) | {fails: False}, [])
    with pytest.raises(EngineError, match=r"TensorRT cannot refit full\.onnx from the bundle's weights: w\.self$"):
        engine.TensorRt(EngineOptions(memory="fast")).load(small.bundle, [spec])


def test_without_rtx_the_weights_are_private_unless_asked(engine: Any) -> None:
    assert engine.TensorRt(EngineOptions()).options.memory == "fast"
    with pytest.raises(EngineError, match="builds for the GPU at hand alone; leave out the architecture"):
        engine.TensorRt(EngineOptions(architecture="sm_90"))
