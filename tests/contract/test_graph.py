"""A graph's signature: sizes for a batch, and the batch of sizes."""

from __future__ import annotations

import pytest

from tgate_engine.graph import BATCH, DENOISE, ROLES, Dim, GraphSpec, Macs, TensorSpec


def tensor(name: str, *shape: Dim, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def graph(*inputs: TensorSpec) -> GraphSpec:
    outputs = (tensor("y", BATCH, 2), tensor("z", 1))
    return GraphSpec(
        file="g.onnx", role=DENOISE, batch=(1, 4), inputs=inputs, outputs=outputs, macs=Macs(paper=1, all=2)
    )


def test_shapes_for_a_batch() -> None:
    assert tensor("x", BATCH, 2, 50).resolve(3) == (3, 2, 50)
    assert tensor("x", 1, 77).resolve(3) == (1, 77)
    assert tensor("x").resolve(3) == ()


@pytest.mark.parametrize(
    ("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2), ("int64", 8), ("uint8", 1)]
)
def test_bytes_for_a_batch(dtype: str, size: int) -> None:
    assert tensor("x", BATCH, 2, 5, dtype=dtype).size_bytes(3) == 30 * size
    assert tensor("x", dtype=dtype).size_bytes(3) == size


def test_names_are_in_the_order_of_the_signature() -> None:
    spec = graph(tensor("b", BATCH), tensor("a", 1))
    assert spec.input_names() == ("b", "a")
    assert spec.output_names() == ("y", "z")


def test_the_batch_of_inputs_is_told_by_those_that_have_one() -> None:
    spec = graph(tensor("constant", 7), tensor("scalar"), tensor("x", BATCH, 2))
    assert spec.batch_of({"constant": (7,), "scalar": (), "x": (3, 2)}) == 3
    assert graph(tensor("constant", 7)).batch_of({"constant": (7,)}) == 1


def test_what_roles_there_are() -> None:
    assert set(ROLES) == {"denoise", "text", "image", "decode", "encode", "control"}
