"""A graph as a PyTorch module gives what ONNX Runtime gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tests.tiny_families import FAMILY_VARIANTS
from tests.toy_bundle import Toy, build
from tgate_engine.bundle import Bundle
from tgate_engine.errors import EngineError
from tgate_engine.manifest import GraphSpec, Macs, TensorSpec, resolve
from tgate_engine.rows import OUTPUTS
from tgate_runtime.backends.aoti.graph import OnnxModule, Weights, trace

CPU = torch.device("cpu")
Arrays = Mapping[str, NDArray[Any]]


def random_inputs(spec: GraphSpec, batch: int) -> dict[str, NDArray[Any]]:
    """Words of a tiny vocabulary, masks of which some are set, numbers."""
    rng = np.random.default_rng(1)
    found: dict[str, NDArray[Any]] = {}
    for tensor in spec.inputs:
        shape = resolve(tensor.shape, batch)
        if tensor.dtype == "int64":
            found[tensor.name] = rng.integers(0, 12, shape)
        elif "mask" in tensor.name:
            found[tensor.name] = (rng.random(shape) < 0.7).astype(np.float32)
        else:
            found[tensor.name] = rng.standard_normal(shape).astype(np.float32)
    return found


def by_onnxruntime(bundle: Bundle, spec: GraphSpec, inputs: Arrays) -> list[NDArray[Any]]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(bundle.file(spec.file), options, providers=["CPUExecutionProvider"])
    found: list[NDArray[Any]] = session.run(list(spec.output_names()), dict(inputs))
    return found


def by_torch(module: Any, spec: GraphSpec, inputs: Arrays) -> list[NDArray[Any]]:
    with torch.no_grad():
        found = module(*(torch.from_numpy(inputs[name]) for name in spec.input_names()))
    return [tensor.numpy() for tensor in found]


def same(spec: GraphSpec, got: list[NDArray[Any]], want: list[NDArray[Any]], tolerance: float) -> None:
    for tensor, a, b in zip(spec.outputs, got, want, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), tensor.name
        if a.dtype == np.uint8:  # a number half way between two may be rounded to either
            assert np.abs(a.astype(int) - b.astype(int)).max() <= max(1, 255 * tolerance), tensor.name
        else:
            assert np.abs(a - b).max() <= tolerance * np.abs(b).max(), tensor.name


def every_graph_agrees(path: Path) -> None:
    bundle = Bundle.open(path)
    weights = Weights(bundle.file(bundle.manifest.weights), CPU)
    for name, spec in bundle.manifest.graphs.items():
        module = OnnxModule(bundle.file(spec.file), spec, weights)
        tolerance = 1e-3 if name == bundle.manifest.image else 1e-4  # it resizes to grids that are rounded differently
        for batch in sorted(set(bundle.manifest.batch)):
            inputs = random_inputs(spec, batch)
            same(spec, by_torch(module, spec, inputs), by_onnxruntime(bundle, spec, inputs), tolerance)


def test_the_small_sdxl(mini_bundle: Path) -> None:
    every_graph_agrees(mini_bundle)


def test_a_family_of_transformers(family_bundle: Callable[[str], tuple[Path, Path]]) -> None:
    every_graph_agrees(family_bundle("pixart_sigma_a")[1])


@pytest.mark.slow
@pytest.mark.parametrize("variant", list(FAMILY_VARIANTS))
def test_every_family(family_bundle: Callable[[str], tuple[Path, Path]], variant: str) -> None:
    every_graph_agrees(family_bundle(variant)[1])


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return Bundle.open(build(tmp_path_factory.mktemp("onnx-torch") / "toy", Toy(batch=(1, 4))))


@pytest.fixture(scope="module")
def weights(toy: Bundle) -> Weights:
    return Weights(toy.file(toy.manifest.weights), CPU)


def test_traced_once_for_every_batch(toy: Bundle, weights: Weights) -> None:
    for name in ("full", "reuse_cross"):
        spec = toy.manifest.graphs[name]
        program = trace(OnnxModule(toy.file(spec.file), spec, weights), (1, 4), CPU).module()
        for batch in (1, 3, 4):
            inputs = random_inputs(spec, batch)
            same(spec, by_torch(program, spec, inputs), by_onnxruntime(toy, spec, inputs), 1e-5)


def test_a_batch_in_the_graph_s_own_arithmetic_of_shapes(tiny_bundle: Callable[..., Path]) -> None:
    """An exported graph, unlike the toy's, reshapes to sizes that it computes from its inputs' shapes."""
    bundle = Bundle.open(tiny_bundle("conv_projection", batch=(1, 4)))
    spec = bundle.manifest.graphs["reuse_cross"]
    module = OnnxModule(bundle.file(spec.file), spec, Weights(bundle.file(bundle.manifest.weights), CPU))
    program = trace(module, bundle.manifest.batch, CPU).module()
    for batch in (1, 4):
        inputs = random_inputs(spec, batch)
        same(spec, by_torch(program, spec, inputs), by_onnxruntime(bundle, spec, inputs), 1e-4)


# --- weights ------------------------------------------------------------------------------------


def test_graphs_share_the_pages_of_the_weight_file(toy: Bundle, weights: Weights) -> None:
    where: dict[str, set[int]] = {}
    for spec in toy.manifest.graphs.values():
        module = OnnxModule(toy.file(spec.file), spec, weights)
        for buffer, (name, _) in module.weight_names.items():
            where.setdefault(name, set()).add(getattr(module, buffer).data_ptr())
    assert len(where) > 8
    assert all(len(addresses) == 1 for addresses in where.values())
    raw = toy.file(toy.manifest.weights).stat().st_size
    addresses = sorted(address for found in where.values() for address in found)
    assert addresses[-1] - addresses[0] < raw  # one mapping


def test_narrow_weights_are_made_once(weights: Weights) -> None:
    first = weights.tensor("w.out", torch.bfloat16)
    assert first.dtype == torch.bfloat16
    assert weights.tensor("w.out", torch.bfloat16) is first
    assert weights.tensor("w.out").dtype == torch.float32


# --- bfloat16 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", ["full", "reuse_cross", "unguided"])
def test_products_in_bfloat16_and_the_sampler_in_float32(toy: Bundle, weights: Weights, graph: str) -> None:
    spec = toy.manifest.graphs[graph]
    narrow = OnnxModule(toy.file(spec.file), spec, weights, torch.bfloat16)
    inputs = random_inputs(spec, 2)
    inputs["step"][:, OUTPUTS.start] = 0  # this step's output: what is left of the sampler reads inputs alone
    got, want = by_torch(narrow, spec, inputs), by_onnxruntime(toy, spec, inputs)
    same(spec, got, want, 3e-2)
    found = dict(zip(spec.output_names(), zip(got, want, strict=True), strict=True))
    output, wanted = found["output"]
    assert np.abs(output - wanted).max() > 1e-4 * np.abs(wanted).max()  # it was computed in less than float32
    np.testing.assert_allclose(*found["next_latents"], rtol=1e-6, atol=1e-6)


def test_the_small_sdxl_in_bfloat16(mini_bundle: Path) -> None:
    bundle = Bundle.open(mini_bundle)
    spec = bundle.manifest.graphs["reuse_cross"]
    weights = Weights(bundle.file(bundle.manifest.weights), CPU)
    inputs = random_inputs(spec, 1)
    module = OnnxModule(bundle.file(spec.file), spec, weights, torch.bfloat16)
    same(spec, by_torch(module, spec, inputs), by_onnxruntime(bundle, spec, inputs), 3e-2)


# --- faults -------------------------------------------------------------------------------------


def one_node(path: Path, node: Any, *initializers: Any) -> GraphSpec:
    """A graph y = node(x, ...) over float32 [1, 4, 6]."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4, 6]) for name in ("x", "y")]
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], list(initializers))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    path.write_bytes(model.SerializeToString())
    x, y = (TensorSpec(name=name, dtype="float32", shape=(1, 4, 6)) for name in ("x", "y"))
    return GraphSpec(file=path.name, inputs=(x,), outputs=(y,), macs=Macs(paper=0, all=0))


def test_an_operator_that_is_not_in_the_table(tmp_path: Path, weights: Weights) -> None:
    spec = one_node(tmp_path / "g.onnx", helper.make_node("Asinh", ["x"], ["y"]))
    with pytest.raises(EngineError, match=r"knows no operator Asinh, which g\.onnx has"):
        OnnxModule(tmp_path / "g.onnx", spec, weights)


def test_a_form_of_an_operator_that_is_not_written(tmp_path: Path, weights: Weights) -> None:
    pads = numpy_helper.from_array(np.array([0, 0, 1, 0, 0, 1]), "pads")
    spec = one_node(tmp_path / "g.onnx", helper.make_node("Pad", ["x", "pads"], ["y"], mode="edge"), pads)
    module = OnnxModule(tmp_path / "g.onnx", spec, weights)
    with pytest.raises(EngineError, match=r"knows no Pad in mode edge of axes .*, which g\.onnx has"):
        module(torch.zeros(1, 4, 6))


def test_a_weight_that_the_file_does_not_have(tmp_path: Path, weights: Weights) -> None:
    tensor = TensorProto(name="w.absent", data_type=TensorProto.FLOAT, dims=(6, 6))
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="weights.safetensors")
    spec = one_node(tmp_path / "g.onnx", helper.make_node("MatMul", ["x", "w.absent"], ["y"]), tensor)
    with pytest.raises(EngineError, match=r"weight w\.absent is not in the weight file"):
        OnnxModule(tmp_path / "g.onnx", spec, weights)


@pytest.mark.parametrize("content", [b"", b"nonsense"])
def test_a_file_that_is_no_graph(tmp_path: Path, weights: Weights, content: bytes) -> None:
    spec = one_node(tmp_path / "g.onnx", helper.make_node("Tanh", ["x"], ["y"]))
    (tmp_path / "g.onnx").write_bytes(content)
    with pytest.raises(EngineError, match=r"g\.onnx"):
        OnnxModule(tmp_path / "g.onnx", spec, weights)
