"""A graph as a PyTorch module gives what ONNX Runtime gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from tests.runtime.engines.small import WEIGHTS, Arrays, Small, assert_close, outside, random_inputs, save, tensor
from tests.tiny_families import FAMILY_VARIANTS
from tgate_engine.bundle import Bundle
from tgate_engine.errors import EngineError
from tgate_engine.graph import BATCH, IMAGE, GraphSpec
from tgate_engine.step import GUIDANCE, STEP
from tgate_runtime.engines.aoti.graph import OnnxModule, Weights, trace

CPU = torch.device("cpu")


def by_onnxruntime(path: Path, spec: GraphSpec, inputs: Arrays) -> dict[str, NDArray[Any]]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return dict(zip(spec.output_names(), session.run(list(spec.output_names()), dict(inputs)), strict=True))


def by_torch(module: Any, spec: GraphSpec, inputs: Arrays) -> dict[str, NDArray[Any]]:
    with torch.no_grad():
        outputs = module(*(torch.from_numpy(inputs[name]) for name in spec.input_names()))
    return {name: each.numpy() for name, each in zip(spec.output_names(), outputs, strict=True)}


# --- whole models -------------------------------------------------------------------------------


def every_graph_agrees(path: Path) -> None:
    bundle = Bundle.open(path)
    weights = Weights(bundle.file(bundle.manifest.weights), CPU)
    for spec in (spec for shape in bundle.manifest.shapes for spec in shape.graphs.values()):
        module = OnnxModule(bundle.file(spec.file).read_bytes(), spec, weights)
        tolerance = 1e-3 if spec.role == IMAGE else 1e-4  # it resizes to grids that are rounded differently
        for batch in sorted(set(spec.batch)):
            inputs = random_inputs(spec, batch)
            want = by_onnxruntime(bundle.file(spec.file), spec, inputs)
            assert_close(spec, by_torch(module, spec, inputs), want, tolerance)


def test_the_small_sdxl(mini_bundle: Path) -> None:
    every_graph_agrees(mini_bundle)


@pytest.mark.slow
def test_a_batch_that_varies(shipped_bundle: Path, tiny_bundle: Callable[..., Path]) -> None:
    every_graph_agrees(shipped_bundle)
    every_graph_agrees(tiny_bundle("conv_projection", batch=(1, 4)))


def test_a_family_of_transformers(family_bundle: Callable[[str], tuple[Path, Path]]) -> None:
    every_graph_agrees(family_bundle("pixart_sigma_a")[1])


@pytest.mark.slow
@pytest.mark.parametrize("variant", list(FAMILY_VARIANTS))
def test_every_family(family_bundle: Callable[[str], tuple[Path, Path]], variant: str) -> None:
    every_graph_agrees(family_bundle(variant)[1])


# --- tracing ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(small: Small) -> Weights:
    return Weights(small.bundle.file(WEIGHTS), CPU)


@pytest.mark.parametrize("name", ["full", "reuse", "text", "decoder"])
def test_traced_once_for_every_batch(small: Small, shared: Weights, name: str) -> None:
    spec = small.graphs[name]
    module = OnnxModule(small.bundle.file(spec.file).read_bytes(), spec, shared)
    program = trace(module, CPU).module()
    for batch in (1, 3, 4):
        inputs = random_inputs(spec, batch)
        want = small.expected(name, inputs)
        assert_close(spec, by_torch(module, spec, inputs), want)
        assert_close(spec, by_torch(program, spec, inputs), want)


def test_traced_for_one_batch_alone(tmp_path: Path) -> None:
    alone = Small(tmp_path / "bundle", batch=(2, 2))
    spec = alone.graphs["full"]
    module = OnnxModule(alone.bundle.file(spec.file).read_bytes(), spec, Weights(alone.bundle.file(WEIGHTS), CPU))
    inputs = random_inputs(spec, 2)
    assert_close(spec, by_torch(trace(module, CPU).module(), spec, inputs), alone.expected("full", inputs))


def test_a_batch_in_the_graph_s_own_arithmetic_of_shapes(tmp_path: Path, shared: Weights) -> None:
    """An exported graph reshapes to sizes that it computes from its inputs' shapes: here to [2 * batch, 3 / 1, 2]."""
    node = helper.make_node
    nodes = [
        node("Shape", ["x"], ["batch"], start=0, end=1),
        node("Mul", ["batch", "two"], ["rows"]),
        node("Shape", ["x"], ["columns"], start=1),
        node("Squeeze", ["columns", "first"], ["column"]),
        node("Div", ["column", "four"], ["third"]),
        node("Reshape", ["third", "one"], ["thirds"]),
        node("Concat", ["rows", "thirds", "two"], ["shape"], axis=0),
        node("Reshape", ["x", "shape"], ["y"]),
    ]
    numbers = {"two": [2], "first": [0], "four": 4, "one": [1]}
    initializers = [numpy_helper.from_array(np.array(each), name) for name, each in numbers.items()]
    spec = save(tmp_path / "g.onnx", nodes, [tensor("x", BATCH, 12)], [tensor("y", "rows", 3, 2)], initializers)
    program = trace(OnnxModule((tmp_path / "g.onnx").read_bytes(), spec, shared), CPU).module()
    for batch in (1, 4):
        inputs = random_inputs(spec, batch)
        want = by_onnxruntime(tmp_path / "g.onnx", spec, inputs)
        assert want["y"].shape == (2 * batch, 3, 2)
        np.testing.assert_array_equal(by_torch(program, spec, inputs)["y"], want["y"])


# --- weights ------------------------------------------------------------------------------------


def test_graphs_share_the_pages_of_the_weight_file(small: Small, shared: Weights) -> None:
    where: dict[str, set[int]] = {}
    for spec in small.graphs.values():
        module = OnnxModule(small.bundle.file(spec.file).read_bytes(), spec, shared)
        for buffer, (name, *_) in module.reads.items():
            where.setdefault(name, set()).add(getattr(module, buffer).data_ptr())
    assert where.keys() == small.weights.keys()
    assert all(len(addresses) == 1 for addresses in where.values())
    addresses = sorted(address for each in where.values() for address in each)
    assert addresses[-1] - addresses[0] < small.bundle.file(WEIGHTS).stat().st_size  # one mapping


def test_narrow_weights_are_made_once(shared: Weights) -> None:
    first = shared.tensor("w.out", torch.bfloat16)
    assert first.dtype == torch.bfloat16
    assert shared.tensor("w.out", torch.bfloat16) is first
    assert shared.tensor("w.out").dtype == torch.float32


# --- bfloat16 -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["full", "reuse"])
def test_products_in_bfloat16_and_what_follows_the_last_in_float32(small: Small, shared: Weights, name: str) -> None:
    spec = small.graphs[name]
    narrow = OnnxModule(small.bundle.file(spec.file).read_bytes(), spec, shared, torch.bfloat16)
    inputs = random_inputs(spec, 2)
    got, want = by_torch(narrow, spec, inputs), small.expected(name, inputs)
    assert_close(spec, got, want, 3e-2)
    error = np.abs(got["output"] - want["output"]).max()
    assert error > 1e-4 * np.abs(want["output"]).max()  # it was computed in less than float32
    weight = inputs[STEP][:, GUIDANCE].reshape(-1, 1, 1, 1)
    np.testing.assert_allclose(got["next_latents"], inputs["latents"] + weight * got["output"], rtol=1e-6, atol=1e-6)


def test_the_small_sdxl_in_bfloat16(mini_bundle: Path) -> None:
    bundle = Bundle.open(mini_bundle)
    spec = bundle.manifest.shapes[0].graphs["reuse_cross"]
    module = OnnxModule(
        bundle.file(spec.file).read_bytes(), spec, Weights(bundle.file(bundle.manifest.weights), CPU), torch.bfloat16
    )
    inputs = random_inputs(spec, 1)
    want = by_onnxruntime(bundle.file(spec.file), spec, inputs)
    assert_close(spec, by_torch(module, spec, inputs), want, 3e-2)


# --- faults -------------------------------------------------------------------------------------


def one(path: Path, node: Any, *initializers: Any) -> GraphSpec:
    """A graph y = node(x, ...) over float32 [1, 4, 6]."""
    return save(path, [node], [tensor("x", 1, 4, 6)], [tensor("y", 1, 4, 6)], initializers)


def test_an_operator_that_is_not_in_the_table(tmp_path: Path, shared: Weights) -> None:
    spec = one(tmp_path / "g.onnx", helper.make_node("Asinh", ["x"], ["y"]))
    with pytest.raises(EngineError, match=r"knows no operator Asinh, which g\.onnx has"):
        OnnxModule((tmp_path / "g.onnx").read_bytes(), spec, shared)


def test_a_form_of_an_operator_that_is_not_written(tmp_path: Path, shared: Weights) -> None:
    pads = numpy_helper.from_array(np.array([0, 0, 1, 0, 0, 1]), "pads")
    spec = one(tmp_path / "g.onnx", helper.make_node("Pad", ["x", "pads"], ["y"], mode="edge"), pads)
    module = OnnxModule((tmp_path / "g.onnx").read_bytes(), spec, shared)
    with pytest.raises(EngineError, match=r"knows no Pad in mode edge of axes .*, which g\.onnx has"):
        module(torch.zeros(1, 4, 6))


def test_a_weight_that_the_file_does_not_have(tmp_path: Path, shared: Weights) -> None:
    absent = outside("w.absent", 0, 144, (6, 6))
    spec = one(tmp_path / "g.onnx", helper.make_node("MatMul", ["x", "w.absent"], ["y"]), absent)
    with pytest.raises(EngineError, match=r"weight w\.absent is not in the weight file"):
        OnnxModule((tmp_path / "g.onnx").read_bytes(), spec, shared)


def test_an_input_of_a_dtype_that_no_bundle_has(tmp_path: Path, shared: Weights) -> None:
    spec = one(tmp_path / "g.onnx", helper.make_node("Neg", ["x"], ["y"]))
    info = helper.make_tensor_value_info("x", TensorProto.DOUBLE, [1, 4, 6])
    graph = helper.make_graph([helper.make_node("Neg", ["x"], ["y"])], "g", [info], [info])
    (tmp_path / "g.onnx").write_bytes(helper.make_model(graph).SerializeToString())
    with pytest.raises(EngineError, match="does not have the inputs its manifest says: x float32, x unknown"):
        OnnxModule((tmp_path / "g.onnx").read_bytes(), spec, shared)
