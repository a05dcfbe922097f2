"""What conditions a request: from an encoder, or from tensors that were encoded ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.toy_bundle import Toy, build
from tgate_engine.errors import RequestError
from tgate_runtime.conditioning import conditioning_inputs, conditioning_of, from_embeddings, rows_of
from tgate_runtime.session import Session


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Session]:
    path = build(tmp_path_factory.mktemp("conditioning") / "toy", Toy(sizes=((4, 4), (8, 2))))
    with Session.open(path, plans=[], threads=1) as opened:
        yield opened


def encoded(number: float) -> dict[str, NDArray[np.float32]]:
    """What the text graph may give for one prompt."""
    return {"text": np.full((1, 8, 4), number, np.float32), "pooled": np.full((1, 4), number, np.float32)}


def embeddings(count: int = 2) -> dict[str, NDArray[Any]]:
    rng = np.random.default_rng(0)
    shapes = {"text": (count, 8, 4), "pooled": (count, 4)}
    return {
        f"{name}.{half}": rng.standard_normal(shape).astype(np.float32)
        for name, shape in shapes.items()
        for half in ("negative", "positive")
    }


EMPTY = {
    f"{name}.{half}": np.zeros((0, *shape), np.float32)
    for name, shape in (("text", (8, 4)), ("pooled", (4,)))
    for half in ("negative", "positive")
}


def hole(count: int) -> NDArray[np.float32]:
    """[2, 4] with so many values that are none."""
    values = np.ones(8, np.float32)
    values[:count] = [np.nan, np.inf, -np.inf][:count]
    return values.reshape(2, 4)


def test_constants_are_those_of_the_size(several: Session) -> None:
    default, wide = (conditioning_of(several, encoded(1), encoded(2), size=size) for size in (None, "8x2"))
    assert default["time_ids.positive"].tolist() == default["time_ids.negative"].tolist() == [[0.25, -0.5]]
    assert wide["time_ids.positive"].tolist() == wide["time_ids.negative"].tolist() == [[0.5, -0.25]]
    for rows in (default, wide):
        assert np.all(rows["text.positive"] == 1)
        assert np.all(rows["pooled.negative"] == 2)
    assert not conditioning_of(several, encoded(1), None)["text.negative"].any()


def test_the_inputs_of_all_denoising_graphs(several: Session) -> None:
    inputs = conditioning_inputs(several)
    assert list(inputs) == [
        f"{name}.{half}" for name in ("text", "pooled", "time_ids") for half in ("negative", "positive")
    ]
    assert inputs["text.positive"].shape == ("batch", 8, 4)


def test_embeddings_are_taken_as_they_are_with_the_constants_of_the_size(several: Session) -> None:
    tensors = embeddings(3)
    rows = from_embeddings(several, tensors, size="8x2")
    assert set(rows) == set(conditioning_inputs(several))
    for name, values in tensors.items():
        np.testing.assert_array_equal(rows[name], values)
    assert rows["time_ids.negative"].tolist() == [[0.5, -0.25]] * 3


def test_numbers_of_half_precision_are_numbers(several: Session) -> None:
    half = {name: values.astype(np.float16) for name, values in embeddings().items()}
    for name, values in from_embeddings(several, half).items():
        assert values.dtype == np.float32
        if name in half:
            np.testing.assert_array_equal(values, half[name].astype(np.float32))


def test_more_tensors_than_are_needed_are_ignored(several: Session) -> None:
    assert "other" not in from_embeddings(several, {**embeddings(), "other": np.zeros(3)})


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"text.negative": None}, r"the embeddings lack text\.negative \(they have text\.positive, pooled\.negative"),
        ({"pooled.positive": np.zeros((3, 4), np.float32)}, r"must be for as many images each, got \[2, 3\]"),
        (dict.fromkeys(["text.negative", "text.positive"], np.zeros((0, 8, 4), np.float32)), r"each, got \[0, 2\]"),
        (EMPTY, r"as many images each, got \[0\], wanted is one number of at least 1"),
        ({"pooled.positive": [[0.0] * 4] * 2}, r"pooled\.positive must be a NumPy array, got list"),
        (
            {"pooled.positive": np.zeros((2, 4), np.int64)},
            r"pooled\.positive must be float32, got int64; make them with",
        ),
        ({"pooled.positive": np.zeros((2, 4), object)}, r"pooled\.positive must be float32, got object"),
        ({"pooled.positive": np.zeros((2, 4), "U3")}, r"pooled\.positive must be float32, got <U3"),
        ({"pooled.positive": np.zeros((2, 2, 2), np.float32)}, r"\[N, 4\], got \[2, 2, 2\]"),
        ({"pooled.positive": hole(3)}, r"pooled\.positive must be finite numbers in float32; 3 of 8 are not finite"),
        ({"text.negative": np.full((2, 8, 4), 1e39)}, r"text\.negative must be finite .*; 64 of 64 are not finite"),
        (
            {"text.positive": np.zeros((2, 7, 4), np.float32)},
            r"text\.positive must have shape \[N, 8, 4\], got \[2, 7",
        ),
        ({"pooled.positive": np.float32(1)}, r"pooled\.positive must have shape \[N, 4\], got \[\]"),
    ],
)
def test_embeddings_that_do_not_fit(several: Session, change: dict[str, Any], says: str) -> None:
    tensors = {name: values for name, values in {**embeddings(), **change}.items() if values is not None}
    with pytest.raises(RequestError, match=says):
        from_embeddings(several, tensors)


def test_rows_are_those_of_the_tensors_that_the_bundle_takes(several: Session) -> None:
    """Whatever else a stranger's file holds does not ask for more images."""
    more: dict[str, Any] = {**embeddings(2), "foreign": np.zeros((1000, 3), np.float32), "scale": np.float32(1)}
    assert rows_of(more, several.manifest) == 2
    assert len(from_embeddings(several, more)["text.positive"]) == 2
    assert rows_of({"foreign": np.zeros((9, 3))}, several.manifest) == 0
    assert rows_of({}, several.manifest) == 0


@pytest.mark.parametrize("order", ["<", ">"])
def test_numbers_of_either_byte_order_are_numbers(several: Session, order: str) -> None:
    there = {name: values.astype(f"{order}f8") for name, values in embeddings().items()}
    for name, values in embeddings().items():
        got = from_embeddings(several, there)[name]
        np.testing.assert_array_equal(got, values)
        assert got.dtype == np.float32
        assert got.dtype.isnative


def test_no_embeddings(several: Session) -> None:
    with pytest.raises(RequestError, match=r"\(they have nothing\); make them with `tgate embed` for this model"):
        from_embeddings(several, {})
