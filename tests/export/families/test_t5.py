"""T5's mask and what attention makes of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tgate_engine.errors import ExportError
from tgate_export.families.t5 import T5Text, attention_bias, end_token


class Encoder(nn.Module):
    config = SimpleNamespace(eos_token_id=1)

    def forward(self, ids: Tensor, attention_mask: Tensor | None) -> Any:
        seen = ids if attention_mask is None else ids * attention_mask
        return SimpleNamespace(last_hidden_state=seen[..., None].float())


@pytest.mark.parametrize(
    ("ids", "mask"),
    [
        ([5, 6, 1, 0, 0], [1, 1, 1, 0, 0]),
        ([5, 0, 6, 1, 0], [1, 1, 1, 1, 0]),  # a prompt that spells padding out
        ([1, 0, 0, 0, 0], [1, 0, 0, 0, 0]),
        ([5, 6, 7, 8, 1], [1, 1, 1, 1, 1]),
    ],
)
def test_what_counts_ends_with_the_end_token(ids: list[int], mask: list[int]) -> None:
    states, made = T5Text(Encoder())(torch.tensor([ids]))
    assert made.tolist() == [mask]
    assert states[0, :, 0].tolist() == [i * m for i, m in zip(ids, mask, strict=True)]


def test_an_encoder_may_see_padding_that_the_network_does_not() -> None:
    states, made = T5Text(Encoder(), masked=False)(torch.tensor([[5, 1, 9]]))
    assert made.tolist() == [[1, 1, 0]]
    assert states[0, :, 0].tolist() == [5, 1, 9]


def test_a_mask_as_what_is_added_to_scores() -> None:
    bias = attention_bias(torch.tensor([[1.0, 0.0]]), torch.zeros(1, dtype=torch.float16))
    assert bias.shape == (1, 1, 2)
    assert bias.dtype == torch.float16
    assert bias.tolist() == [[[0.0, -10000.0]]]


def test_an_encoder_that_names_no_end_is_refused() -> None:
    family: Any = SimpleNamespace(config=lambda *_: {"eos_token_id": [1, 2]})
    checkpoint: Any = SimpleNamespace(where="here")
    with pytest.raises(ExportError, match=r"text_encoder/config.json has eos_token_id = \[1, 2\]"):
        end_token(family, checkpoint, "text_encoder")
