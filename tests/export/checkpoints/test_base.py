"""What model_index.json names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tgate_engine.errors import ExportError
from tgate_export.checkpoints.base import Checkpoint, Tensors


class Bare(Checkpoint):
    where = "here"

    def __init__(self, **index: Any) -> None:
        self.model_index = index

    def config(self, component: str) -> Mapping[str, Any]:
        raise NotImplementedError

    def scheduler_config(self) -> Mapping[str, Any]:
        raise NotImplementedError

    def tensors(self, component: str) -> Tensors:
        raise NotImplementedError

    def tokenizer(self, name: str) -> Path:
        raise NotImplementedError

    def token_limit(self, name: str) -> int | None:
        raise NotImplementedError

    def licence(self) -> str:
        raise NotImplementedError


def test_a_class_that_is_named_or_is_not() -> None:
    checkpoint = Bare(unet=["diffusers", "UNet2DConditionModel"])
    assert checkpoint.named_class("unet") == "UNet2DConditionModel"
    assert checkpoint.named_class("vae") is None
    assert (checkpoint.further("x.json"), checkpoint.directory("unet")) == (None, None)


@pytest.mark.parametrize(
    ("entry", "words"),
    [([None, None], "says that there is no unet"), ("UNet", "has unet = 'UNet'"), (["a", "b", "c"], "has unet =")],
)
def test_what_names_no_class_is_refused(entry: Any, words: str) -> None:
    with pytest.raises(ExportError, match=f"here: model_index.json {words}"):
        Bare(unet=entry).named_class("unet")
