"""Prompts encoded ahead of time: what is refused before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tgate_engine.errors import ExportError
from tgate_export.embed import embed


def test_a_model_that_a_picture_conditions_has_no_prompt(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="svd is conditioned by an image, not by a prompt"):
        embed("svd", ["a"], tmp_path / "e.safetensors")
    assert not list(tmp_path.iterdir())


def test_rows_are_prompts_and_the_negative_half_is_shared(tmp_path: Path) -> None:
    file = tmp_path / "e.safetensors"
    names = embed("mini-pixart", ["a red circle", "a green star"], file, negative_prompt="a photo")
    tensors = load_file(file)
    assert (
        set(names)
        == set(tensors)
        == {f"{name}.{half}" for name in ("prompt_embeds", "prompt_mask") for half in ("negative", "positive")}
    )
    text, negative = tensors["prompt_embeds.positive"], tensors["prompt_embeds.negative"]
    assert text.dtype == np.float32
    assert text.shape[0] == 2
    assert not np.array_equal(text[0], text[1])
    assert np.array_equal(negative[0], negative[1])
    embed("mini-pixart", ["a green star"], tmp_path / "one.safetensors", negative_prompt="a photo")
    assert np.array_equal(load_file(tmp_path / "one.safetensors")["prompt_embeds.positive"][0], text[1])
