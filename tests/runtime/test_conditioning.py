"""What conditions a request: from an encoder, or from tensors that were encoded ahead of time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tests.toy_bundle import Toy, build
from tgate_engine.errors import RequestError
from tgate_runtime.conditioning import conditioning_inputs, conditioning_of, from_embeddings
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


def test_no_embeddings(several: Session) -> None:
    with pytest.raises(RequestError, match=r"\(they have nothing\); make them with `tgate embed` for this model"):
        from_embeddings(several, {})
