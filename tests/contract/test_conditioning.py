"""What conditions the denoiser, for both halves of guidance."""

from __future__ import annotations

import numpy as np
import pytest

from tgate_engine.conditioning import half_names, halves, masked_halves, reference_halves
from tgate_engine.manifest import Conditioning

TEXT = Conditioning(name="text", source="text")
SAME = Conditioning(name="mask", source="text", negative="same")
ZEROS = Conditioning(name="picture", source="image", negative="zeros")
SIZES = Conditioning(name="sizes", source="constant")

POSITIVE = {"text": np.array([[1.0, 2.0]]), "mask": np.array([[1]]), "picture": np.array([[5.0]])}
NEGATIVE = {"text": np.array([[3.0, 4.0]]), "mask": np.array([[0]]), "picture": np.array([[6.0]])}
CONSTANTS = {"sizes": (512.0, 768.0)}


def rows(*tensors: Conditioning, negative: bool = True, guided: bool = True) -> dict[str, list[list[float]]]:
    given = halves(tensors, CONSTANTS, POSITIVE, NEGATIVE if negative else None, guided=guided)
    return {name: values.tolist() for name, values in given.items()}


def test_each_half_has_its_own_text() -> None:
    assert rows(TEXT) == {"text.positive": [[1, 2]], "text.negative": [[3, 4]]}


def test_no_negative_text_is_zeros() -> None:
    assert rows(TEXT, negative=False) == {"text.positive": [[1, 2]], "text.negative": [[0, 0]]}


@pytest.mark.parametrize("negative", [True, False])
def test_what_the_negative_half_takes_whatever_the_negative_prompt_is(negative: bool) -> None:
    assert rows(SAME, ZEROS, SIZES, negative=negative) == {
        "mask.positive": [[1]],
        "mask.negative": [[1]],
        "picture.positive": [[5]],
        "picture.negative": [[0]],
        "sizes.positive": [[512, 768]],
        "sizes.negative": [[512, 768]],
    }


def test_without_guidance_there_is_the_prompts_half_alone() -> None:
    assert rows(TEXT, SAME, ZEROS, SIZES, guided=False) == {
        "text.positive": [[1, 2]],
        "mask.positive": [[1]],
        "picture.positive": [[5]],
        "sizes.positive": [[512, 768]],
    }


def test_what_a_negative_prompt_becomes_may_be_another_output() -> None:
    """As where layers are left out for the prompt alone."""
    negative = {**NEGATIVE, "text.negative": np.array([[7.0, 8.0]])}
    given = halves([TEXT], {}, POSITIVE, negative, guided=True)
    assert given["text.negative"].tolist() == [[7, 8]]


def test_dtypes_are_kept_and_constants_are_float32() -> None:
    bits = {"text": np.array([[1, 2]], np.uint16)}
    given = halves([TEXT, SIZES], CONSTANTS, bits, None, guided=True)
    assert {name: values.dtype for name, values in given.items()} == {
        "text.positive": np.uint16,
        "text.negative": np.uint16,
        "sizes.positive": np.float32,
        "sizes.negative": np.float32,
    }


def test_nothing_is_changed_in_place() -> None:
    before = POSITIVE["text"].copy()
    given = halves([TEXT, ZEROS], {}, POSITIVE, None, guided=True)
    given["text.negative"] += 1
    given["picture.negative"] += 1
    np.testing.assert_array_equal(POSITIVE["text"], before)
    assert POSITIVE["picture"].tolist() == [[5]]


@pytest.mark.parametrize("guided", [True, False])
def test_what_lies_around_a_mask_comes_from_its_picture_alone(guided: bool) -> None:
    around = Conditioning(name="around", source="masked", negative="same")
    assert not halves([around], {}, {}, None, guided=guided)
    mask, latents = np.array([[0, 1]], np.float32), np.array([[[2, 3]], [[4, 5]]], np.float32)
    rows = masked_halves([TEXT, around], mask, latents, guided=guided)
    assert {name: values.tolist() for name, values in rows.items()} == {
        f"around.{which}": [[[[0, 1]], [[2, 3]], [[4, 5]]]]
        for which in (("negative", "positive") if guided else ("positive",))
    }
    assert not reference_halves([around], {}, 1.0, guided=guided)


def test_every_name_that_a_graph_may_take() -> None:
    assert half_names([TEXT, SIZES]) == ("text.negative", "text.positive", "sizes.negative", "sizes.positive")
