"""Encoders in eager PyTorch: outputs by name, and a line where they do not fit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_export.conditioning import encode


class Pair(nn.Module):
    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        return ids.to(torch.bfloat16), ids.sum(dim=1)


def test_outputs_have_their_names_and_are_float32() -> None:
    tensors = encode(Pair(), ["text", "pooled"], torch.tensor([[1, 2, 3]]))
    assert {name: t.dtype for name, t in tensors.items()} == {"text": torch.float32, "pooled": torch.float32}
    assert tensors["pooled"].tolist() == [6.0]


def test_encoders_that_do_not_run_are_one_line() -> None:
    with pytest.raises(ExportError, match=r"the encoders do not run .*their configurations do not fit each other"):
        encode(nn.Linear(3, 4), ["text"], torch.zeros(1, 5))
