"""Whole graphs give the same numbers after all rewrites, with the launches that a GPU would be glad of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from tests.runtime.engines.ort_cuda.lowering.small import Array, operators, results, small
from tests.runtime.engines.small import random_inputs
from tgate_engine.bundle import Bundle
from tgate_engine.dtypes import decode
from tgate_engine.graph import GraphSpec
from tgate_engine.step import STEP, TIMESTEP
from tgate_runtime.engines.ort_cuda.lowering import lower
from tgate_runtime.engines.ort_cuda.lowering.laid import Laid
from tgate_runtime.weights import Weight, map_weights

LARGEST = float(np.finfo(np.float16).max)
ATTENTION = """(float[n, 4, 6] x) => (float[n, 4, 4] y)
    { a = Transpose<perm = [0, 2, 1]>(x)  b = MatMul(x, a)  y = Softmax<axis = 1>(b) }"""


def with_weights(bundle: Bundle, spec: GraphSpec, half: bool) -> bytes:
    """A graph that holds its weights; with ``half``, float16 wherever it was float32."""
    model = onnx.load_model_from_string(bundle.read(spec.file))
    weights = map_weights(bundle.file(bundle.manifest.weights))
    factors = {node.input[2] for node in model.graph.node if node.op_type == "Resize"}
    for tensor in model.graph.initializer:
        outside = tensor.data_location == TensorProto.EXTERNAL
        array = _decoded(weights[tensor.name]) if outside else numpy_helper.to_array(tensor)
        if half and array.dtype == np.float32 and tensor.name not in factors:
            array = array.clip(-LARGEST, LARGEST).astype(np.float16)
        tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    del model.graph.value_info[:]
    for value in (*model.graph.input, *model.graph.output) if half else ():
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = TensorProto.FLOAT16
    for node in model.graph.node if half else ():
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == TensorProto.FLOAT:
                attribute.i = TensorProto.FLOAT16
    return bytes(model.SerializeToString())


def _decoded(weight: Weight) -> Array:
    return decode(weight.array, weight.dtype)


def inputs_of(spec: GraphSpec, batch: int, half: bool) -> dict[str, Array]:
    inputs: dict[str, Any] = random_inputs(spec, batch)
    if STEP in inputs:
        inputs[STEP][:, TIMESTEP] = 601
    for name, array in inputs.items():
        if half and array.dtype == np.float32:
            inputs[name] = array.astype(np.float16)
    return inputs


def bundle_of(request: pytest.FixtureRequest, name: str) -> Bundle:
    if name.endswith("_bundle"):
        return Bundle.open(request.getfixturevalue(name))
    family: Callable[..., tuple[Path, Path]] = request.getfixturevalue("family_bundle")
    return Bundle.open(family(name)[1])


@pytest.mark.parametrize("half", [False, True], ids=["float32", "float16"])
@pytest.mark.parametrize(
    "name",
    [
        *("shipped_bundle", "mini_bundle", "sd15_a"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("sd21_v", "svd_a")),
    ],
)
def test_every_graph_gives_the_same(request: pytest.FixtureRequest, name: str, half: bool) -> None:
    """That of the text, of the decoder and of every step, of both embedded models and of small ones that have what the
    kernels take. In half precision sums are rounded elsewhere."""
    bundle = bundle_of(request, name)
    shape = bundle.manifest.shapes[0]
    for spec in shape.graphs.values():
        before = with_weights(bundle, spec, half)
        after = lower(before).data
        inputs = inputs_of(spec, shape.batch[1] if spec.role == "denoise" else 1, half)
        want, got = results(before, inputs), results(after, inputs)
        for output, array in want.items():
            assert (got[output].dtype, got[output].shape) == (array.dtype, array.shape)
            difference = np.abs(got[output].astype(np.float32) - array.astype(np.float32)).max()
            assert difference <= (2e-2 if half else 1e-5) * np.abs(array.astype(np.float32)).max(), (spec.file, output)
        if spec.role == "denoise":
            assert "Shape" not in operators(after)


@pytest.mark.parametrize("name", ["sd15_a", pytest.param("sd21_v", marks=pytest.mark.slow)])
def test_a_network_in_half_precision_is_transposed_where_it_begins_and_ends(
    request: pytest.FixtureRequest, name: str
) -> None:
    bundle = bundle_of(request, name)
    spec = bundle.manifest.shapes[0].graphs["full"]
    before = with_weights(bundle, spec, True)
    was, now = Counter(operators(before)), Counter(operators(lower(before).data))
    assert now["Transpose"] == 2
    assert now["NhwcConv"] == was["Conv"]
    assert now["GroupNorm"] + now["SkipGroupNorm"] == was["GroupNormalization"]
    assert now["SkipLayerNormalization"] == 2 * was["LayerNormalization"] / 3
    assert not any(now[each] for each in ("Conv", "GroupNormalization"))


def test_a_graph_that_nothing_changes_comes_back_as_it_is() -> None:
    data = small(ATTENTION)
    assert lower(data).data is data


def test_weights_outside_a_graph_are_named(mini_bundle: Path) -> None:
    """Each by its own name, or by that of the tensor that it is made of; what is left is asked for no more."""
    bundle = Bundle.open(mini_bundle)
    data = bundle.read("vae_decoder.onnx")
    lowered = lower(data)
    norm = "vae.decoder.mid_block.resnets.0.norm1.weight"
    assert lowered.weights[norm] == Laid(norm)
    places = {t.name for t in onnx.load_model_from_string(lowered.data).graph.initializer if t.external_data}
    assert places == set(lowered.weights)
    assert {laid.source for laid in lowered.weights.values()} <= set(map_weights(bundle.file("weights.safetensors")))
